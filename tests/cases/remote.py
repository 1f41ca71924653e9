"""Families that only exist with remote code, made from tiny checkpoints that transformers saved."""

import math

import numpy as np

from tests.cases.case import Case
from tests.cases.relatives import GRANITE
from tests.convert import changed, convert, fuse
from tests.tiny import common

QKV = ("q_proj", "k_proj", "v_proj")


def grouped(q: np.ndarray, k: np.ndarray, v: np.ndarray, kv_heads: int = 2) -> np.ndarray:
    """For each kv head its queries, its key and its value."""
    parts = [x.reshape(kv_heads, -1, 16, *x.shape[1:]) for x in (q, k, v)]
    return np.concatenate(parts, 1).reshape(-1, *q.shape[1:])


def lengthened(tensors: dict) -> dict:
    """Rows of the head with other lengths than 1."""
    w = tensors["lm_head.weight"]
    scale = np.random.default_rng(1).uniform(0.2, 5.0, (len(w), 1))
    return tensors | {"lm_head.weight": (w * scale).astype(w.dtype)}


def unit_head(model) -> None:
    import torch

    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))


def alibi(model) -> None:
    """Positions as slopes in the mask instead of rotations."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    heads = model.config.num_attention_heads

    def add(module, args, kwargs):
        mask = kwargs["attention_mask"]
        slopes = build_alibi_tensor(torch.ones(1, mask.shape[-1]), heads, torch.float32)
        return args, kwargs | {"attention_mask": (mask + slopes[None]).to(mask.dtype)}

    model.model.rotary_emb.inv_freq.zero_()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(add, with_kwargs=True)


def split_experts(tensors: dict) -> dict:
    """Granite's stacked experts and shared expert as one matrix each."""
    out = {}
    for name, x in tensors.items():
        layer, _, rest = name.partition(".block_sparse_moe.")
        if rest == "router.layer.weight":
            out[f"{layer}.mlp.gate.weight"] = x
        elif rest == "input_linear.weight":
            for e, (gate, up) in enumerate(zip(*np.split(x, 2, 1), strict=True)):
                out[f"{layer}.mlp.experts.{e}.gate_proj.weight"] = gate
                out[f"{layer}.mlp.experts.{e}.up_proj.weight"] = up
        elif rest == "output_linear.weight":
            out |= {f"{layer}.mlp.experts.{e}.down_proj.weight": w for e, w in enumerate(x)}
        elif name.endswith("shared_mlp.input_linear.weight"):
            gate, up = np.split(x, 2)
            stem = name.removesuffix("shared_mlp.input_linear.weight") + "mlp.shared_experts."
            out |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        else:
            out[name.replace("shared_mlp.output_linear", "mlp.shared_experts.down_proj")] = x
    return out


def without_shared(tensors: dict) -> dict:
    return {k: v for k, v in tensors.items() if ".shared_expert" not in k}


QWEN_MOE_NAMES = (
    "num_experts",
    "num_local_experts",
    "shared_expert_intermediate_size",
    "mlp_only_layers",
    "qkv_bias",
    "decoder_sparse_step",
    "sliding_window",
)
GRANITE_NAMES = tuple(GRANITE)
GRANITE_MOE = common(
    num_local_experts=4,
    num_experts_per_tok=2,
    intermediate_size=48,
    shared_intermediate_size=96,
    attention_multiplier=0.25,
)
MOE_NAMES = ("num_local_experts", "shared_intermediate_size", *GRANITE_NAMES)
SHARED_LIST = ((r"mlp\.shared_experts\.", "mlp.shared_experts.0."),)
INTERNLM2 = (
    (r"embed_tokens", "tok_embeddings"),
    (r"^lm_head", "output"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"self_attn", "attention"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)
EXAONE = (
    (r"^model\.layers", "transformer.h"),
    (r"^model\.embed_tokens", "transformer.wte"),
    (r"^model\.norm", "transformer.ln_f"),
    (r"self_attn\.o_proj", "attn.attention.out_proj"),
    (r"self_attn", "attn.attention"),
    (r"mlp\.gate_proj", "mlp.c_fc_0"),
    (r"mlp\.up_proj", "mlp.c_fc_1"),
    (r"mlp\.down_proj", "mlp.c_proj"),
    (r"input_layernorm", "ln_1"),
    (r"post_attention_layernorm", "ln_2"),
)
CHATGLM = (
    (r"^model\.layers", "transformer.encoder.layers"),
    (r"^model\.embed_tokens", "transformer.embedding.word_embeddings"),
    (r"^model\.norm", "transformer.encoder.final_layernorm"),
    (r"^lm_head", "transformer.output_layer"),
    (r"self_attn\.o_proj", "self_attention.dense"),
    (r"self_attn", "self_attention"),
    (r"mlp\.gate_up_proj", "mlp.dense_h_to_4h"),
    (r"mlp\.down_proj", "mlp.dense_4h_to_h"),
)


def chatglm(**values):
    """The config as ChatGLM 3 writes it."""

    def config(old: dict) -> dict:
        usual = dict(
            model_type="chatglm",
            add_bias_linear=False,
            add_qkv_bias=old["attention_bias"],
            apply_query_key_layer_scaling=True,
            apply_residual_connection_post_layernorm=False,
            attention_softmax_in_fp32=True,
            ffn_hidden_size=old["intermediate_size"],
            hidden_size=old["hidden_size"],
            kv_channels=old["head_dim"],
            layernorm_epsilon=old["rms_norm_eps"],
            multi_query_attention=True,
            multi_query_group_num=old["num_key_value_heads"],
            num_attention_heads=old["num_attention_heads"],
            num_layers=old["num_hidden_layers"],
            original_rope=True,
            padded_vocab_size=old["vocab_size"],
            post_layer_norm=True,
            rmsnorm=True,
            seq_length=128,
        )
        return usual | values

    return config


def minicpm(old: dict) -> dict:
    new = changed("minicpm", GRANITE_NAMES)(old)
    return new | dict(
        scale_emb=old["embedding_multiplier"],
        scale_depth=old["residual_multiplier"] * math.sqrt(old["num_hidden_layers"]),
        dim_model_base=old["hidden_size"] / old["logits_scaling"],
    )


def exaone(old: dict) -> dict:
    moved = dict(
        num_layers=old["num_hidden_layers"],
        activation_function=old["hidden_act"],
        layer_norm_epsilon=old["rms_norm_eps"],
    )
    gone = ("num_hidden_layers", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")
    return changed("exaone", gone)(old) | moved


CASES = {
    "baichuan": Case(
        "llama",
        common(num_key_value_heads=4),
        convert=convert(
            changed("baichuan", ("num_key_value_heads", "head_dim")), tensors=lambda t: fuse(t, "W_pack", QKV)
        ),
    ),
    "baichuan-13b": Case(
        "llama",
        common(num_key_value_heads=6, num_attention_heads=6, hidden_size=48),
        prepare=alibi,
        convert=convert(
            changed("baichuan", ("num_key_value_heads", "max_position_embeddings"), False, model_max_length=128),
            tensors=lambda t: fuse(t, "W_pack", QKV),
        ),
    ),
    "baichuan2": Case(
        "llama",
        common(num_key_value_heads=4),
        prepare=unit_head,
        convert=convert(
            changed("baichuan", ("num_key_value_heads",), model_max_length=128, z_loss_weight=0),
            tensors=lambda t: fuse(lengthened(t), "W_pack", QKV),
        ),
    ),
    "internlm2": Case(
        "llama",
        common(),
        convert=convert(changed("internlm2", bias=False), INTERNLM2, lambda t: fuse(t, "wqkv", QKV, grouped)),
    ),
    "internlm2-bias": Case(
        "llama",
        common(attention_bias=True, num_key_value_heads=1),
        convert=convert(
            changed("internlm2", ("attention_bias",), bias=True, rope_scaling=dict(type="dynamic", factor=2.0)),
            INTERNLM2,
            lambda t: fuse(t, "wqkv", QKV, lambda q, k, v: grouped(q, k, v, 1)),
        ),
    ),
    "internlm": Case(
        "llama",
        common(attention_bias=True, num_key_value_heads=4),
        convert=convert(changed("internlm", ("attention_bias", "num_key_value_heads"), False, bias=True)),
    ),
    "internlm-origin": Case(
        "llama",
        common(num_key_value_heads=4, rope_parameters=dict(rope_type="default", rope_theta=5000.0)),
        convert=convert(
            changed("internlm", ("num_key_value_heads",), False, bias=False, rotary=dict(base=5000, type="origin"))
        ),
    ),
    "orion": Case(
        "stablelm",
        common(partial_rotary_factor=1.0, use_qkv_bias=False),
        convert=convert(
            changed("orion", ("layer_norm_eps", "partial_rotary_factor", "qk_layernorm"), rms_norm_eps=1e-5)
        ),
    ),
    "minicpm": Case("granite", common(**GRANITE | dict(attention_multiplier=0.25)), convert=convert(minicpm)),
    "minicpm-tied": Case(
        "granite",
        common(**GRANITE | dict(attention_multiplier=0.25), tie_word_embeddings=True),
        convert=convert(lambda old: minicpm(old) | dict(tie_word_embeddings=None, mup_denominator=32)),
    ),
    "exaone": Case("llama", common(), convert=convert(exaone, EXAONE)),
    "exaone-tied": Case(
        "llama",
        common(tie_word_embeddings=True, head_dim=32),
        convert=convert(lambda old: exaone(old) | dict(tie_word_embeddings=None), EXAONE),
    ),
    "chatglm": Case(
        "glm",
        common(head_dim=16),
        convert=convert(chatglm(), CHATGLM, lambda t: fuse(t, "query_key_value", QKV)),
    ),
    "chatglm-ratio": Case(
        "glm",
        common(
            head_dim=16,
            attention_bias=False,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0, partial_rotary_factor=0.5),
        ),
        convert=convert(chatglm(rope_ratio=50.0), CHATGLM, lambda t: fuse(t, "query_key_value", QKV)),
    ),
    "deepseek": Case(
        "qwen2_moe",
        common(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=0,
            mlp_only_layers=[0],
            num_hidden_layers=3,
            qkv_bias=False,
        ),
        convert=convert(
            changed(
                "deepseek",
                QWEN_MOE_NAMES,
                first_k_dense_replace=1,
                n_routed_experts=4,
                n_shared_experts=None,
                scoring_func="softmax",
            ),
            tensors=without_shared,
        ),
    ),
    "deepseek-shared": Case(
        "granitemoeshared",
        GRANITE_MOE,
        convert=convert(
            changed(
                "deepseek",
                MOE_NAMES,
                n_routed_experts=4,
                n_shared_experts=2,
                moe_intermediate_size=48,
                norm_topk_prob=True,
            ),
            tensors=split_experts,
        ),
    ),
    "minimind": Case(
        "llama",
        common(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        convert=convert(
            changed("minimind", ("tie_word_embeddings", "attention_bias", "mlp_bias", "head_dim"), False)
        ),
    ),
    "minimind-moe": Case(
        "granitemoeshared",
        GRANITE_MOE | dict(shared_intermediate_size=48),
        convert=convert(
            changed(
                "minimind",
                (*MOE_NAMES, "attention_bias"),
                use_moe=True,
                n_routed_experts=4,
                n_shared_experts=1,
                scoring_func="softmax",
                norm_topk_prob=True,
            ),
            SHARED_LIST,
            split_experts,
        ),
    ),
    "minimind-3": Case(
        "qwen3",
        common(head_dim=32, tie_word_embeddings=True),
        convert=convert(
            changed("minimind", ("use_sliding_window", "sliding_window", "max_window_layers"), num_experts=4)
        ),
    ),
    "minimind-3-moe": Case(
        "qwen3_moe",
        common(
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            moe_intermediate_size=48,
            decoder_sparse_step=1,
        ),
        convert=convert(
            changed(
                "minimind",
                ("decoder_sparse_step", "num_local_experts", "sliding_window"),
                use_moe=True,
                num_experts=4,
            )
        ),
    ),
}
