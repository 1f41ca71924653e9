"""MLC-LLM's architectures: what they are here, how they name tensors, and what they make of the hub's.

Source: the loaders and configs of github.com/mlc-ai/mlc-llm, python/mlc_llm/model. Data and numpy only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.families import family
from jaxllm.families.base import Family, Rule
from jaxllm.families.layouts import fused_qkv, gate_up, up_gate
from jaxllm.families.names import L

Values = Mapping[str, Any]


class Fused(NamedTuple):
    """Tensors of the hub that MLC-LLM keeps as one, on the out axis; "*" in a part numbers experts, stacked."""

    target: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One of MLC-LLM's model types."""

    family: str  # the model type it is here
    rules: tuple[Rule, ...] = ()  # names that only MLC-LLM has, before the family's own
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of Family that differ
    usual: Values = field(default_factory=dict)  # what its configs do not record
    config: Callable[[dict], dict] = lambda values: values  # further changes to a recorded config
    # ---- how it is written; `fused` None: it is only read
    fused: tuple[Fused, ...] | None = None
    names: tuple[tuple[str, str], ...] = ()  # the hub's name -> MLC-LLM's, by the first pattern that matches
    copies: tuple[tuple[str, tuple[str, ...]], ...] = ()  # a hub's tensor -> what is made of it besides itself
    head: str = "tied"  # "tied": absent where the config ties it; "never", "always"
    turn: Callable[[str, np.ndarray, Values], np.ndarray] = lambda name, x, values: x


def _rows(*rows: tuple) -> tuple[Rule, ...]:
    return tuple(Rule(L + name, r"layers.\1." + path, *split) for name, path, *split in rows)


COMMON = _rows(
    (r"self_attn\.(?:c_attn|wqkv_pack)", "mixer", fused_qkv),
    (r"self_attn\.out_proj", "mixer.o"),
    (r"self_attn\.w_uk", "mixer.k_b"),
    (r"self_attn\.w_uv", "mixer.v_b"),
    (r"mlp\.moe_gate_up_proj", "ffn", gate_up),
    (r"mlp\.moe_down_proj", "ffn.down"),
    (r"mlp\.shared_experts?\.gate_up_proj", "ffn.shared", gate_up),
    (r"mlp\.e_score_correction_bias", "ffn.router.correction"),
    (r"moe\.e1_e3", "ffn", gate_up),
    (r"moe\.e2", "ffn.down"),
    (r"moe\.gate", "ffn.router"),
    (r"feed_forward\.gate_up_proj", "ffn", gate_up),
    (r"feed_forward\.shared_expert\.gate_up_proj", "ffn.shared", gate_up),
    (r"feed_forward\.router\.router", "ffn.router"),
)
PHI = (
    Rule(r"transformer\.embd", "embed"),
    Rule(r"transformer\.norm|lm_head\.ln", "norm"),
    Rule(r"lm_head(?:\.linear)?", "head"),
    *_rows(
        (r"ln", "mixer.pre"),
        (r"mixer\.(?:Wqkv|qkv_proj)", "mixer", fused_qkv),
        (r"mixer\.out_proj", "mixer.o"),
    ),
)
NEOX = _rows((r"attention\.query_key_value", "mixer", fused_qkv))
QWEN = _rows((r"mlp\.gate_up_proj", "ffn", up_gate))
INTERNLM2 = _rows((r"attention\.wqkv", "mixer", fused_qkv))
CHATGLM = (Rule(r"transformer\.embedding", "embed"),)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))
LLAMA = (Fused("self_attn.qkv_proj", QKV), GATE_UP)
PACK = (Fused("self_attn.wqkv_pack", QKV), GATE_UP)
QWEN2 = (Fused("self_attn.c_attn", QKV), GATE_UP)
EXPERTS = (
    Fused("mlp.moe_gate_up_proj", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    Fused("mlp.moe_down_proj", ("mlp.experts.*.down_proj",)),
    *(
        Fused(f"mlp.{shared}.gate_up_proj", (f"mlp.{shared}.gate_proj", f"mlp.{shared}.up_proj"))
        for shared in ("shared_expert", "shared_experts")
    ),
)
MIXTRAL = (
    Fused("moe.e1_e3", ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3")),
    Fused("moe.e2", ("block_sparse_moe.experts.*.w2",)),
    LLAMA[0],
)
PHI_NAMES = (
    (r"model\.embed_tokens\.", "transformer.embd."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"transformer.h.\1.ln."),
    (r"model\.layers\.(\d+)\.self_attn\.(?:dense|o_proj)\.", r"transformer.h.\1.mixer.out_proj."),
    (r"model\.layers\.(\d+)\.self_attn\.", r"transformer.h.\1.mixer."),
    (r"model\.layers\.(\d+)\.", r"transformer.h.\1."),
)
PHI1 = (*PHI_NAMES, (r"lm_head\.", "lm_head.linear."), (r"model\.final_layernorm\.", "lm_head.ln."))
PHI3 = (*PHI_NAMES, (r"model\.norm\.", "transformer.norm."))


# ---- what becomes of a tensor on the way to MLC-LLM ------------------------------------------------------


def _one_plus(name: str, x: np.ndarray, values: Values) -> np.ndarray:
    return (x + 1).astype(x.dtype) if re.search(r"norm\.weight$", name) else x


def _turned(name: str, x: np.ndarray, values: Values) -> np.ndarray:
    return x.T if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else x


def _neox_qkv(name: str, x: np.ndarray, values: Values) -> np.ndarray:
    if "query_key_value" not in name:
        return x
    heads = values["num_attention_heads"]
    return np.concatenate(np.split(x.reshape(heads, -1, *x.shape[1:]), 3, 1)).reshape(x.shape)


def _internlm2_qkv(name: str, x: np.ndarray, values: Values) -> np.ndarray:
    if not name.endswith("attention.wqkv.weight"):
        return x
    heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
    group, width = heads // shared, values["hidden_size"] // heads
    parts = np.split(x.reshape(shared, group + 2, width, x.shape[-1]), [group, group + 1], 1)
    return np.concatenate([part.reshape(-1, x.shape[-1]) for part in parts])


def _latent(name: str, x: np.ndarray, values: Values) -> np.ndarray:
    if not re.search(r"\.w_u[kv]$", name):
        return x
    heads, nope, v = (values[k] for k in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    x = x.reshape(heads, nope + v, values["kv_lora_rank"])
    return x[:, :nope].swapaxes(1, 2) if name.endswith("k") else x[:, nope:]


# ---- recorded configs ------------------------------------------------------------------------------------


def _phi(values: dict) -> dict:
    """Both spellings of phi: its own (n_embd, rotary_dim) and the hub's."""
    changed = dict(values)
    if "rotary_dim" in changed:
        head_dim = changed.get("head_dim") or changed["n_embd"] // changed["n_head"]
        changed["partial_rotary_factor"] = changed.pop("rotary_dim") / head_dim
    if "n_head_kv" in changed:
        changed["num_key_value_heads"] = changed.pop("n_head_kv")
    return changed


def _plain_rope(values: dict) -> dict:
    """GPT-J's "rope_scaling" only tells how its pairs lie."""
    return {k: v for k, v in values.items() if k != "rope_scaling"}


def _nested(values: dict) -> dict:
    """The text model inside, with the vocabulary that is said outside."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            "model_config has no text_config; make mlc-chat-config.json again with mlc_llm gen_config"
        )
    return {"text_config": {"vocab_size": values.get("vocab_size")} | hub_spelling(text)}


# MLC-LLM's own names in a config: the hub's, or None for what says nothing about the model.
FIELDS = {
    "position_embedding_base": "rope_theta",
    "context_window_size": "max_position_embeddings",
    "sliding_window_size": "sliding_window",
    "n_head_kv": "n_head_kv",
    **dict.fromkeys(
        ("prefill_chunk_size", "tensor_parallel_shards", "pipeline_parallel_stages", "max_batch_size")
    ),
    **dict.fromkeys(("disaggregation", "dtype", "ffn_out_dtype", "attention_sink_size", "weight_block_size")),
    **dict.fromkeys(("is_text_model", "kwargs")),
}


def hub_spelling(values: Values) -> dict:
    """A recorded config as config.json spells it; what both names say stays under the hub's."""
    inner = values.get("kwargs")
    merged = {**(inner if isinstance(inner, dict) else {}), **values}
    out = {k: v for k, v in merged.items() if k not in FIELDS}
    for name, to in FIELDS.items():
        value = merged.get(name)
        if to and type(value) in (int, float) and value > 0:
            out.setdefault(to, value)
    empty = ("rope_scaling", "original_max_position_embeddings", "n_inner", "moe_layers")
    return {k: v for k, v in out.items() if not (k in empty and v in (0, -1))}


def _table() -> dict[str, Architecture]:
    silu, tanh = {"hidden_act": "silu"}, {"hidden_act": "gelu_pytorch_tanh"}
    llama = Architecture("llama", usual=silu, fused=LLAMA)
    long = {"max_position_embeddings": 32768}  # a sliding window's model says -1
    plus = {"one_plus": None}  # 1 + w is what the files hold
    gemma = dict(changes=plus, usual=tanh, turn=_one_plus, head="never")
    wte = (("wte.weight", ("lm_head.weight",)), ("transformer.wte.weight", ("lm_head.weight",)))
    embed = (("model.embed_tokens.weight", ("lm_head.weight",)),)
    prefix = ((r"(wte|wpe|h|ln_f)\.", r"transformer.\1."),)
    kv_b = ((r"(.*)\.self_attn\.kv_b_proj\.weight", (r"\1.self_attn.w_uk", r"\1.self_attn.w_uv")),)
    latent = dict(usual=silu, copies=kv_b, turn=_latent, fused=(GATE_UP, *EXPERTS), head="always")
    correction = ((r"(.*)\.mlp\.gate\.e_score_correction_bias", r"\1.mlp.e_score_correction_bias"),)
    return {
        "llama": llama,
        "mistral": replace(llama, family="mistral", usual=silu | long),
        "gemma": Architecture("gemma", fused=LLAMA, **gemma),
        "gemma2": Architecture("gemma2", fused=LLAMA, **gemma),
        "gemma3": Architecture("gemma3", config=_nested, **{**gemma, "usual": {}}),
        "gemma3_text": Architecture("gemma3", config=_nested, **{**gemma, "usual": {}}),
        "gpt2": Architecture(
            "gpt2",
            changes={"conv1d": False},
            usual={"activation_function": "gelu_new"},
            fused=(),
            names=prefix,
            copies=wte,
            turn=_turned,
            head="never",
        ),
        "mixtral": Architecture(
            "mixtral", usual=silu, fused=MIXTRAL, names=((r"(.*)\.block_sparse_moe\.gate\.", r"\1.moe.gate."),)
        ),
        "gpt_neox": Architecture(
            "gpt_neox", NEOX, usual={"hidden_act": "gelu"}, fused=(), turn=_neox_qkv, head="always"
        ),
        "gpt_bigcode": Architecture(
            "gpt_bigcode", usual={"activation_function": "gelu_pytorch_tanh"}, fused=(), head="always"
        ),
        "phi-msft": Architecture("phi", PHI, usual={"hidden_act": "gelu_new"}, config=_phi),
        "phi": Architecture(
            "phi",
            PHI,
            usual={"hidden_act": "gelu_new"},
            config=_phi,
            fused=(Fused("self_attn.Wqkv", QKV),),
            names=PHI1,
            head="always",
        ),
        "phi3": Architecture("phi3", PHI, usual=silu, fused=(), names=PHI3),
        "qwen": Architecture(
            "qwen",
            QWEN,
            fused=(Fused("mlp.gate_up_proj", ("mlp.w1", "mlp.w2")),),
            head="always",
            usual={"no_bias": True},
        ),
        "qwen2": Architecture("qwen2", fused=QWEN2),
        "qwen2_moe": Architecture("qwen2_moe", fused=(QWEN2[0], *EXPERTS), head="always"),
        "qwen3": Architecture("qwen3", fused=QWEN2),
        "qwen3-embedding": Architecture("qwen3"),
        "qwen3_moe": Architecture("qwen3_moe", fused=(QWEN2[0], *EXPERTS)),
        "llama4": Architecture("llama4", config=_nested),
        "deepseek": Architecture("deepseek", usual=silu, fused=(*PACK, *EXPERTS)),
        "deepseek_v2": Architecture("deepseek_v2", **latent),
        "deepseek_v3": Architecture("deepseek_v3", names=correction, **latent),
        "stablelm": Architecture("stablelm", usual=silu, fused=LLAMA, head="always"),
        "baichuan": Architecture("baichuan", usual=silu, fused=(GATE_UP,), head="always"),
        "internlm": Architecture("internlm", usual=silu, fused=PACK, head="always"),
        "internlm2": Architecture(
            "internlm2",
            INTERNLM2,
            usual=silu,
            fused=(Fused("feed_forward.gate_up_proj", ("feed_forward.w1", "feed_forward.w3")),),
            turn=_internlm2_qkv,
            head="always",
        ),
        "orion": Architecture("orion", usual=silu, fused=LLAMA, head="always"),
        "chatglm": Architecture(
            "chatglm",
            CHATGLM,
            config=lambda v: {"padded_vocab_size": v.get("vocab_size")} | v,
            fused=(),
            names=((r"transformer\.embedding\.word_embeddings\.", "transformer.embedding."),),
            head="always",
        ),
        "starcoder2": Architecture("starcoder2", fused=(PACK[0],), copies=embed, head="never"),
        "cohere": Architecture(
            "cohere",
            usual=silu,
            fused=(LLAMA[0],),
            names=((r"(.*)\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),),
            head="never",
        ),
        "minicpm": Architecture("minicpm", usual=silu, fused=PACK),
        "gptj": Architecture(
            "gptj",
            config=_plain_rope,
            fused=(Fused("attn.c_attn", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),),
            head="always",
        ),
        "olmo": Architecture("olmo", usual=silu, fused=LLAMA),
        "olmo2": Architecture("olmo2", usual=silu, fused=LLAMA),
        "nemotron": Architecture("nemotron", usual={"hidden_act": "relu2"}, fused=(LLAMA[0],)),
    }


ARCHITECTURES = _table()
# The rest of MLC-LLM's list: what is missing here.
REFUSED = {
    "ministral3": "its attention, whose queries grow with their position",
    "phi3_v": "its vision tower",
    "llava": "its vision tower",
    "qwen3_5": "its mixer",
    "qwen3_5_text": "its mixer",
    "rwkv5": "its time-mixing recurrence",
    "rwkv6": "its time-mixing recurrence",
    "eagle": "a head that drafts for another model, which is not a model of its own",
    "medusa": "heads that draft for another model, which are not a model of their own",
    "bert": "encoders",
    "bert-bge": "encoders",
}


def architecture(model_type: Any) -> Architecture:
    """The row of a model_type in mlc-chat-config.json.

    Raises ConfigError, naming it, for one that is refused or unknown."""
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ConfigError(f"MLC-LLM's model type {model_type!r} is not read: jaxllm lacks {REFUSED[model_type]}")
    known = ", ".join(ARCHITECTURES)
    raise ConfigError(f"model type {str(model_type)[:60]!r} is none of MLC-LLM's that jaxllm reads: {known}")


def described(arch: Architecture) -> Family:
    """The family that reads an architecture's files: ours, with MLC-LLM's names before its own."""
    own = family(arch.family)
    return replace(own, rules=(*arch.rules, *COMMON, *own.rules), **arch.changes)


def config_values(arch: Architecture, recorded: Values) -> dict[str, Any]:
    """model_config of mlc-chat-config.json as config.json spells it.

    Raises ConfigError where it lacks what it must have."""
    try:
        values = arch.config(dict(recorded) if "text_config" in recorded else hub_spelling(recorded))
    except (TypeError, KeyError, ArithmeticError) as error:
        raise ConfigError(f"model_config does not fit its model type ({type(error).__name__}: {error})") from error
    return {**arch.usual, **values, "model_type": arch.family}
