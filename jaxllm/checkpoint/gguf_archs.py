"""GGUF's architectures as jaxllm's families: what is said otherwise, and how the tensors are called.

The converter of llama.cpp brings most layouts to one form. What is left: queries and keys of some architectures
have rotary pairs of neighbours (`interleaved`), either because the model is like that or because the converter
reorders them; and a few names mean something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf_keys import Keys
from jaxllm.config import Block
from jaxllm.families.base import Rule
from jaxllm.families.layouts import fused_qkv, gate_up, latent_kv

Config = dict[str, Any]


def _named(name: str) -> Callable[[np.ndarray, str, Block], dict[str, np.ndarray]]:
    """A split that takes nothing apart: the tensor is the leaf `name`."""

    def split(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
        return {name: x}

    return split


def _as_row(x: np.ndarray, leaf: str, block: Block) -> dict[str, np.ndarray]:
    """A vector [in] as the matrix [1, in] that it is."""
    return {"shared_gate.w": x.reshape(1, -1)}


def _layers(*rows: tuple) -> tuple[Rule, ...]:
    return tuple(Rule(r"blk\.(\d+)\." + name, r"layers.\1." + path, *split) for name, path, *split in rows)


USUAL = (
    Rule("token_embd", "embed"),
    Rule("token_embd_norm", "embed_norm"),
    Rule("position_embd", "positions"),
    Rule("output_norm", "norm"),
    Rule("output", "head"),
    *_layers(
        ("attn_norm", "mixer.pre"),
        ("attn_([qkv])", r"mixer.\2"),
        ("attn_qkv", "mixer", fused_qkv),
        ("attn_output", "mixer.o"),
        ("attn_([qk])_norm", r"mixer.\2_norm"),
        ("attn_sinks", "mixer", _named("sinks")),
        ("post_attention_norm", "mixer.post"),
        ("ffn_norm", "ffn.pre"),
        ("post_ffw_norm", "ffn.post"),
        ("ffn_(gate|up|down)", r"ffn.\2"),
        ("ffn_gate_inp", "ffn.router"),
        (r"ffn_(gate|up|down)\.(\d+)", r"ffn.\2@\3"),
        ("ffn_(gate|up|down)_exps", r"ffn.\2"),
        ("ffn_gate_up_exps", "ffn", gate_up),
        ("exp_probs_b", "ffn.router", _named("correction")),
        ("ffn_(gate|up|down)_shexp", r"ffn.shared.\2"),
        ("ffn_gate_inp_shexp", "ffn", _as_row),
    ),
)
LATENT = (
    *_layers(
        ("attn_q_a", "mixer.q_a"),
        ("attn_q_b", "mixer.q"),
        ("attn_q_a_norm", "mixer.q_norm"),
        ("attn_kv_a_mqa", "mixer.kv_a"),
        ("attn_kv_a_norm", "mixer.kv_norm"),
        ("attn_kv_b", "mixer", latent_kv),
        ("attn_k_b", "mixer", _named("k_b")),
        ("attn_v_b", "mixer", _named("v_b")),
    ),
    *USUAL,
)
FUSED_UP = (*_layers(("ffn_up", "ffn", gate_up)), *USUAL)
POST_IS_PRE = (*_layers(("post_attention_norm", "ffn.pre")), *USUAL)
TWO_NORMS = (*_layers(("attn_norm", "ffn.pre"), ("attn_norm_2", "mixer.pre")), *USUAL)


@dataclass(frozen=True)
class Arch:
    """One architecture: the model type it is, and what its files leave unsaid.

    act: None where the family has but one, and no field for it.
    more: further fields of the config, which win over the common ones; None takes one away.
    """

    model_type: str
    act: str | None = "silu"
    interleaved: bool = False
    rotary: bool = True
    rules: tuple[Rule, ...] | Callable[[Keys], tuple[Rule, ...]] = USUAL
    more: Callable[[Keys, Config], Config] = lambda keys, config: {}


# ---- what differs ------------------------------------------------------------------------------------------


def _biases(keys: Keys, config: Config) -> Config:
    return {"attention_bias": keys.has("attn_q.bias"), "mlp_bias": keys.has("ffn_up.bias")}


def _experts(keys: Keys, config: Config) -> Config:
    """Routed experts under every name that families have for them."""
    width = keys.int("expert_feed_forward_length", config["intermediate_size"])
    return {
        "num_experts_per_tok": keys.int("expert_used_count"),
        "moe_intermediate_size": width,
        "intermediate_size": config["intermediate_size"] or width,
    }


def _llama(keys: Keys, config: Config) -> Config:
    """Llama, Mistral, and Mixtral where there are experts."""
    if not keys.int("expert_count", 0):
        return _biases(keys, config)
    biased = {"attention_bias": keys.has("attn_q.bias"), "model_type": "mixtral"}
    return biased | _experts(keys, config) | {"num_local_experts": keys.int("expert_count")}


def _qwen(keys: Keys, config: Config) -> Config:
    """Its feed_forward_length counts both matrices that are multiplied."""
    return {"kv_channels": config["head_dim"], "seq_length": config["max_position_embeddings"]}


def _qwen2moe(keys: Keys, config: Config) -> Config:
    shared = keys.int("expert_shared_feed_forward_length", 0) or config["intermediate_size"]
    own = {"shared_expert_intermediate_size": shared, "qkv_bias": keys.has("attn_q.bias")}
    return _experts(keys, config) | own | {"num_experts": keys.int("expert_count")}


def _qwen3moe(keys: Keys, config: Config) -> Config:
    own = {"num_experts": keys.int("expert_count"), "norm_topk_prob": True}
    return _experts(keys, config) | own | {"attention_bias": keys.has("attn_q.bias")}


def _olmoe(keys: Keys, config: Config) -> Config:
    own = {"num_experts": keys.int("expert_count"), "clip_qkv": keys.number("attention.clamp_kqv", None)}
    return _experts(keys, config) | own


def _scores(keys: Keys, config: Config, large: int) -> Config:
    """The scale of the scores is not stored: the largest model (told by its layers) has its own."""
    own = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": own if config["num_hidden_layers"] == large else config["head_dim"]}


def _gemma2(keys: Keys, config: Config) -> Config:
    caps = ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)
    return {name: keys.number(name, usual) for name, usual in caps} | _scores(keys, config, 46)


def _gemma3(keys: Keys, config: Config) -> Config:
    own = {
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", None),
    }
    return own | _scores(keys, config, 62)


def _phimoe(keys: Keys, config: Config) -> Config:
    own = {"num_local_experts": keys.int("expert_count"), "lm_head_bias": "output.bias" in keys.tensors}
    return _experts(keys, config) | own | {"attention_bias": keys.has("attn_q.bias")}


def _gptneox(keys: Keys, config: Config) -> Config:
    parallel = keys.raw("use_parallel_residual")
    own = {"use_parallel_residual": True if parallel is None else parallel}
    return own | {"attention_bias": keys.has("attn_qkv.bias")}


def _starcoder(keys: Keys, config: Config) -> Config:
    return {"multi_query": config["num_key_value_heads"] == 1}


def _starcoder2(keys: Keys, config: Config) -> Config:
    return {"use_bias": keys.has("attn_output.bias")}


def _stablelm(keys: Keys, config: Config) -> Config:
    keys.skip("use_parallel_residual")
    names = {"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"}
    found = {field: keys.has(tensor) for field, tensor in names.items()}
    return found | {"use_parallel_residual": not keys.has("ffn_norm.weight")}


def _falcon(keys: Keys, config: Config) -> Config:
    """One kv head: the 7B model; more: the 40B one with two norms, the 11B one with one."""
    heads = config["num_key_value_heads"]
    shape = {"num_kv_heads": heads, "multi_query": heads == 1, "new_decoder_architecture": heads > 1}
    return shape | {"num_ln_in_parallel_attn": 1 + keys.has("attn_norm_2.weight"), "parallel_attn": True}


def _falcon_rules(keys: Keys) -> tuple[Rule, ...]:
    return TWO_NORMS if keys.has("attn_norm_2.weight") else USUAL


def _bloom(keys: Keys, config: Config) -> Config:
    return {"intermediate_size": None}  # always four times the width


def _mpt(keys: Keys, config: Config) -> Config:
    attn = {
        "alibi": True,
        "alibi_bias_max": keys.number("attention.max_alibi_bias", 8.0),
        "clip_qkv": keys.number("attention.clamp_kqv", None),
    }
    ratio = {
        "d_model": config["hidden_size"],
        "expansion_ratio": config["intermediate_size"] / config["hidden_size"],
    }
    gone = dict.fromkeys(("intermediate_size", "hidden_act"))
    return gone | ratio | {"attn_config": {k: v for k, v in attn.items() if v}}


def _olmo(keys: Keys, config: Config) -> Config:
    return {"clip_qkv": keys.number("attention.clamp_kqv", None)}


def _olmo2(keys: Keys, config: Config) -> Config:
    own = {"model_type": "olmo3"} if config["sliding_window"] else {}
    return own | {"attention_bias": keys.has("attn_q.bias")}


def _cohere(keys: Keys, config: Config) -> Config:
    normed = {"use_qk_norm": True} if keys.has("attn_q_norm.weight") else {}
    return normed | {"logit_scale": keys.number("logit_scale"), "attention_bias": keys.has("attn_q.bias")}


def _granite(keys: Keys, config: Config) -> Config:
    names = {"attention_multiplier": "attention.scale", "residual_multiplier": "residual_scale"}
    names |= {"embedding_multiplier": "embedding_scale", "logits_scaling": "logit_scale"}
    found = {field: keys.number(name, 0) or None for field, name in names.items()}
    if found["attention_multiplier"] is None:
        found["attention_multiplier"] = config["head_dim"] ** -0.5
    return found | _biases(keys, config)


def _granitemoe(keys: Keys, config: Config) -> Config:
    return _granite(keys, config) | _experts(keys, config) | {"num_local_experts": keys.int("expert_count")}


def _minicpm(keys: Keys, config: Config) -> Config:
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    return {
        "scale_emb": keys.number("embedding_scale", 12.0),
        "scale_depth": keys.number("residual_scale", 1.4 * layers**-0.5) * layers**0.5,
        "dim_model_base": width / keys.number("logit_scale", width / 256),
    }


def _internlm2(keys: Keys, config: Config) -> Config:
    return {"bias": keys.has("attn_q.bias")}


def _baichuan(keys: Keys, config: Config) -> Config:
    """The 13B models, told by their 40 layers, have ALiBi and no rotary embedding."""
    if config["num_hidden_layers"] != 40:
        return {}
    gone = dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor", "max_position_embeddings"))
    return gone | {"model_max_length": config["max_position_embeddings"]}


def _routed(keys: Keys, config: Config) -> Config:
    """DeepSeek's router and its relatives."""
    return _experts(keys, config) | {
        "n_routed_experts": keys.int("expert_count"),
        "n_shared_experts": keys.int("expert_shared_count", 0),
        "first_k_dense_replace": keys.int("leading_dense_block_count", 0),
        "norm_topk_prob": bool(keys.raw("expert_weights_norm")),
    }


def _deepseek(keys: Keys, config: Config) -> Config:
    if keys.number("expert_weights_scale", 1.0) == 1:
        keys.skip("expert_weights_scale")
    return _routed(keys, config) | {"attention_bias": keys.has("attn_q.bias")}


def _grouped(keys: Keys, config: Config) -> Config:
    routed = {"routed_scaling_factor": keys.number("expert_weights_scale", 0) or 1.0}
    groups = {"n_group": keys.int("expert_group_count", 1), "topk_group": keys.int("expert_group_used_count", 1)}
    return _routed(keys, config) | routed | groups


def _deepseek2(keys: Keys, config: Config) -> Config:
    """Version 2 where the router is a softmax, version 3 where it is a sigmoid with a correction."""
    keys.skip("attention.key_length|attention.value_length")
    turned = keys.int("rope.dimension_count")
    width = keys.int("attention.key_length_mla", config["head_dim"])
    values = keys.int("attention.value_length_mla", keys.int("attention.value_length", width))
    latent = {
        "q_lora_rank": keys.int("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": keys.int("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": width - turned,
        "v_head_dim": values,
        "num_key_value_heads": config["num_attention_heads"],
        **dict.fromkeys(("head_dim", "partial_rotary_factor")),
    }
    found = _grouped(keys, config) | latent | {"attention_bias": keys.has("attn_q_a.bias")}
    if keys.int("expert_gating_func", 1) == 2:
        return found | {"model_type": "deepseek_v3", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    limited = found["n_group"] > 1
    return found | {"topk_method": "group_limited_greedy" if limited else "greedy", "scoring_func": "softmax"}


def _glm4moe(keys: Keys, config: Config) -> Config:
    keys.skip("expert_gating_func")
    flags = {"use_qk_norm": keys.has("attn_q_norm.weight"), "attention_bias": keys.has("attn_q.bias")}
    return _grouped(keys, config) | flags


def _gpt_oss(keys: Keys, config: Config) -> Config:
    """Its rotary scaling is not rounded to whole dimensions."""
    own = {"num_local_experts": keys.int("expert_count"), "attention_bias": keys.has("attn_q.bias")}
    scaling = config["rope_scaling"]
    turned = scaling | {"truncate": False} if scaling and scaling["rope_type"] == "yarn" else scaling
    return _experts(keys, config) | own | {"rope_scaling": turned or {"rope_type": "default"}}


def _chatglm(keys: Keys, config: Config) -> Config:
    return {
        "multi_query_group_num": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "padded_vocab_size": config["vocab_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_ratio": config["rope_theta"] / 10000.0,
        "add_qkv_bias": keys.has("attn_qkv.bias") or keys.has("attn_q.bias"),
        **dict.fromkeys(("rope_theta", "partial_rotary_factor", "hidden_act")),
    }


def _seed_oss(keys: Keys, config: Config) -> Config:
    return _biases(keys, config) | {"attention_out_bias": keys.has("attn_output.bias")}


def _ernie(keys: Keys, config: Config) -> Config:
    return {"use_bias": keys.has("attn_q.bias")}


ARCHS: dict[str, Arch] = {
    "llama": Arch("llama", interleaved=True, more=_llama),
    "mistral3": Arch("mistral", interleaved=True, more=_llama),
    "smollm3": Arch("smollm3", interleaved=True, more=_biases),
    "granite": Arch("granite", interleaved=True, more=_granite),
    "granitemoe": Arch("granitemoe", interleaved=True, more=_granitemoe),
    "minicpm": Arch("minicpm", interleaved=True, more=_minicpm),
    "internlm2": Arch("internlm2", interleaved=True, more=_internlm2),
    "baichuan": Arch("baichuan", interleaved=True, more=_baichuan),
    "arcee": Arch("arcee", "relu2", interleaved=True, more=_biases),
    "ernie4_5": Arch("ernie4_5", interleaved=True, more=_ernie),
    "orion": Arch("orion", more=_biases),
    "seed_oss": Arch("seed_oss", rules=POST_IS_PRE, more=_seed_oss),
    "hunyuan-dense": Arch("hunyuan_v1_dense", more=_biases),
    "exaone": Arch("exaone"),
    "exaone4": Arch("exaone4"),
    "qwen": Arch("qwen", None, more=_qwen),
    "qwen2": Arch("qwen2"),
    "qwen2moe": Arch("qwen2_moe", more=_qwen2moe),
    "qwen3": Arch("qwen3", more=_biases),
    "qwen3moe": Arch("qwen3_moe", more=_qwen3moe),
    "gemma": Arch("gemma", "gelu_pytorch_tanh"),
    "gemma2": Arch("gemma2", "gelu_pytorch_tanh", more=_gemma2),
    "gemma3": Arch("gemma3_text", "gelu_pytorch_tanh", more=_gemma3),
    "phi2": Arch("phi", "gelu_new"),
    "phi3": Arch("phi3", rules=FUSED_UP),
    "phimoe": Arch("phimoe", more=_phimoe),
    "gpt2": Arch("gpt2", "gelu_new", rotary=False),
    "starcoder": Arch("gpt_bigcode", "gelu_pytorch_tanh", rotary=False, more=_starcoder),
    "starcoder2": Arch("starcoder2", "gelu_pytorch_tanh", more=_starcoder2),
    "gptneox": Arch("gpt_neox", "gelu", more=_gptneox),
    "stablelm": Arch("stablelm", more=_stablelm),
    "falcon": Arch("falcon", None, rules=_falcon_rules, more=_falcon),
    "bloom": Arch("bloom", None, rotary=False, more=_bloom),
    "mpt": Arch("mpt", "gelu", rotary=False, more=_mpt),
    "nemotron": Arch("nemotron", "relu2", more=_biases),
    "olmo": Arch("olmo", interleaved=True, more=_olmo),
    "olmo2": Arch("olmo2", more=_olmo2),
    "olmoe": Arch("olmoe", more=_olmoe),
    "command-r": Arch("cohere", interleaved=True, more=_cohere),
    "cohere2": Arch("cohere2", interleaved=True, more=_cohere),
    "deepseek": Arch("deepseek", interleaved=True, more=_deepseek),
    "deepseek2": Arch("deepseek_v2", interleaved=True, rules=LATENT, more=_deepseek2),
    "glm4": Arch("glm4", interleaved=True, rules=FUSED_UP, more=_biases),
    "glm4moe": Arch("glm4_moe", rules=POST_IS_PRE, more=_glm4moe),
    "chatglm": Arch("chatglm", interleaved=True, rules=FUSED_UP, more=_chatglm),
    "gpt-oss": Arch("gpt_oss", rules=POST_IS_PRE, more=_gpt_oss),
}
SKIPPED = (
    r"rope_freqs\.weight",
    r"rope_factors_(long|short)\.weight",
    r"blk\.\d+\.attn_rot_embd\.weight",
    r"blk\.\d+\.nextn\..*",
)
