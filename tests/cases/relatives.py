"""Families that are Llama with one thing changed."""

import numpy as np

from tests.cases.case import Case
from tests.cases.llama import LLAMA3
from tests.convert import changed, convert, fuse, old_spelling
from tests.tiny import common

DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LONG = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.2],
    long_factor=[1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0, 12.0],
)
SIX = dict(short_factor=LONG["short_factor"][:6], long_factor=LONG["long_factor"][:6], partial_rotary_factor=0.75)
GRANITE = dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0)
HUNYUAN = dict(
    use_cla=False,
    cla_share_factor=2,
    use_qk_norm=True,
    norm_type="rms",
    vit_type=None,
    vit_token=64,
    im_start_id=5,
    num_experts=1,
    num_shared_expert=1,
    pool_type="last",
)
QWEN = (
    (r"^model\.layers", "transformer.h"),
    (r"^model\.embed_tokens", "transformer.wte"),
    (r"^model\.norm", "transformer.ln_f"),
    (r"self_attn\.o_proj", "attn.c_proj"),
    (r"self_attn", "attn"),
    (r"mlp\.up_proj", "mlp.w1"),
    (r"mlp\.gate_proj", "mlp.w2"),
    (r"mlp\.down_proj", "mlp.c_proj"),
    (r"input_layernorm", "ln_1"),
    (r"post_attention_layernorm", "ln_2"),
)


def qwen_config(old: dict) -> dict:
    new = dict(
        model_type="qwen",
        intermediate_size=2 * old["intermediate_size"],
        kv_channels=old["hidden_size"] // old["num_attention_heads"],
        layer_norm_epsilon=old["rms_norm_eps"],
        rotary_emb_base=10000,
        rotary_pct=1.0,
        seq_length=128,
        max_position_embeddings=512,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        no_bias=True,
        emb_dropout_prob=0.0,
        scale_attn_weights=True,
        use_flash_attn="auto",
    )
    return new | {k: old[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")}


def with_mtp(tensors: dict) -> dict:
    return tensors | {"model.mtp_layers.0.input_proj.weight": np.ones((64, 128), np.float32)}


def longrope(**changes) -> dict:
    return common(rope_parameters=LONG, original_max_position_embeddings=8, pad_token_id=0, **changes)


CASES = {
    "internlm3": Case("internlm3", common(head_dim=None)),
    "internlm3-bias": Case("internlm3", common(attention_bias=True, mlp_bias=True, rope_parameters=DYNAMIC)),
    "internlm3-old": Case(
        "internlm3",
        common(attention_bias=True, mlp_bias=True, rope_parameters=DYNAMIC),
        convert=old_spelling(lambda old: dict(qkv_bias=True, bias=True, attention_bias=None, mlp_bias=None)),
    ),
    "seed_oss": Case("seed_oss", common(head_dim=16)),
    "seed_oss-out": Case("seed_oss", common(head_dim=32, attention_bias=False, attention_out_bias=True)),
    "helium": Case("helium", common(head_dim=16)),
    "helium-bias": Case(
        "helium", common(head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "smollm3": Case("smollm3", common(no_rope_layers=[1, 1, 1, 0], num_hidden_layers=4)),
    "smollm3-slide": Case(
        "smollm3", common(use_sliding_window=True, sliding_window=8, no_rope_layer_interval=2, num_hidden_layers=3)
    ),
    "smollm3-old": Case(
        "smollm3",
        common(
            use_sliding_window=True,
            sliding_window=8,
            no_rope_layer_interval=2,
            num_hidden_layers=3,
            tie_word_embeddings=False,
        ),
        convert=old_spelling(lambda old: dict(no_rope_layers=None)),
    ),
    "granite": Case("granite", common(**GRANITE)),
    "granite-bias": Case(
        "granite", common(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **GRANITE)
    ),
    "phi3": Case("phi3", common(sliding_window=None)),
    "phi3-slide": Case("phi3", common(sliding_window=8, partial_rotary_factor=0.5, tie_word_embeddings=True)),
    "phi3-short": Case("phi3", common(rope_parameters=LONG, original_max_position_embeddings=64)),
    "phi3-long": Case("phi3", longrope(), max_len=128),
    "phi3-long-old": Case(
        "phi3", longrope() | dict(rope_parameters=LONG | SIX), convert=old_spelling(), max_len=128
    ),
    "arcee": Case("arcee", common()),
    "arcee-yarn": Case("arcee", common(rope_parameters=YARN, attention_bias=True, mlp_bias=True)),
    "ernie4_5": Case("ernie4_5", common(head_dim=32)),
    "ernie4_5-bias": Case("ernie4_5", common(head_dim=16, use_bias=True, tie_word_embeddings=False)),
    "hunyuan_v1_dense": Case("hunyuan_v1_dense", common(head_dim=16)),
    "hunyuan_v1_dense-alpha": Case(
        "hunyuan_v1_dense",
        common(head_dim=32, attention_bias=True, rope_parameters=DYNAMIC | dict(alpha=50.0, factor=1.0)),
        convert=old_spelling(lambda old: HUNYUAN),
    ),
    "exaone4": Case("exaone4", common(sliding_window=8, num_hidden_layers=4)),
    "exaone4-full": Case("exaone4", common(sliding_window=None, layer_types=["full_attention"] * 2)),
    "exaone4-old": Case(
        "exaone4", common(sliding_window=8, rope_parameters=LLAMA3, num_hidden_layers=4), convert=old_spelling()
    ),
    "qwen2-slide": Case(
        "qwen2", common(use_sliding_window=True, sliding_window=8, max_window_layers=2, num_hidden_layers=3)
    ),
    "qwen3-old": Case(
        "qwen3",
        common(head_dim=32, use_sliding_window=True, sliding_window=8, max_window_layers=1, rope_parameters=YARN),
        convert=old_spelling(),
    ),
    "mimo": Case(
        "qwen2",
        common(),
        convert=convert(changed("mimo", attention_bias=True, num_nextn_predict_layers=1), tensors=with_mtp),
    ),
    "mimo-tied": Case(
        "qwen2",
        common(tie_word_embeddings=True),
        convert=convert(changed("mimo", attention_bias=True, head_dim=16), tensors=with_mtp),
    ),
    "qwen": Case(
        "qwen2",
        common(num_key_value_heads=4),
        convert=convert(qwen_config, QWEN, lambda t: fuse(t, "c_attn", ("q_proj", "k_proj", "v_proj"))),
    ),
    "qwen-wide": Case(
        "qwen2",
        common(num_key_value_heads=8, num_attention_heads=8),
        convert=convert(qwen_config, QWEN, lambda t: fuse(t, "c_attn", ("q_proj", "k_proj", "v_proj"))),
    ),
}
