"""The Qwen line and its relatives: Llama with biased queries, keys and values, or with normed ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Block, ModelConfig, QKNorm
from jaxllm.families.base import Family, Predictor, Rule, Sizes, attention, decoder, dense, sizes, windows
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import fused_qkv, halves_swapped
from jaxllm.families.llama import llama_attention
from jaxllm.families.names import LLAMA, L
from jaxllm.families.rope import rope


def sliding(c: Fields, s: Sizes) -> list[int | None]:
    """Every layer's window: none unless use_sliding_window says so, and then from max_window_layers on."""
    width, first = c.int("sliding_window", 4096), c.number("max_window_layers", 28)
    if not c.flag("use_sliding_window", False):
        c.skip("layer_types")
        return [None] * s.layers
    if c.raw("layer_types") is not None:
        return windows(c, s, width=width)
    return [width if i >= first else None for i in range(s.layers)]


def _stack(c: Fields, s: Sizes, **attn: Any) -> ModelConfig:
    mixer, mlp, width = llama_attention(c, s, **attn), dense(s), sliding(c, s)
    return decoder(c, s, lambda i: Block(replace(mixer, window=width[i]), mlp, s.norm))


def qwen(c: Fields) -> ModelConfig:
    """The first Qwen. Its extensions, a growing base and log-n attention, begin beyond seq_length positions."""
    c.skip(
        "max_position_embeddings|use_dynamic_ntk|use_logn_attn|scale_attn_weights|bf16|fp16|fp32|softmax_in_fp32"
    )
    c.expect("no_bias", True)
    hidden = c.int("intermediate_size|ffn_hidden_size") // 2
    longest = c.int("seq_length|max_position_embeddings")
    s = sizes(c, act="silu", head_dim=c.int("kv_channels"), hidden=hidden, max_len=longest)
    mixer = attention(s, rope=rope(c, s.head_dim), qkv_bias=True)
    return decoder(c, s, Block(mixer, dense(s), s.norm))


def qwen2(c: Fields) -> ModelConfig:
    return _stack(c, sizes(c), qkv_bias=True, out_bias=False)


def qwen3(c: Fields) -> ModelConfig:
    s = sizes(c, head_dim=c.int("head_dim", 128))
    return _stack(c, s, qk_norm=QKNorm(s.norm, "head"))


def mimo(c: Fields) -> ModelConfig:
    """Qwen 2 with a further layer that predicts the token after the next one."""
    c.expect("attention_bias", True)
    c.skip("num_nextn_predict_layers")
    return qwen2(c)


QWEN = (
    Rule(r"transformer\.wte", "embed"),
    Rule(r"transformer\.ln_f", "norm"),
    Rule(r"lm_head", "head"),
    Rule(r"transformer\.h\.(\d+)\.attn\.c_attn", r"layers.\1.mixer", fused_qkv),
    Rule(r"transformer\.h\.(\d+)\.attn\.c_proj", r"layers.\1.mixer.o"),
    Rule(r"transformer\.h\.(\d+)\.mlp\.w1", r"layers.\1.ffn.up"),
    Rule(r"transformer\.h\.(\d+)\.mlp\.w2", r"layers.\1.ffn.gate"),
    Rule(r"transformer\.h\.(\d+)\.mlp\.c_proj", r"layers.\1.ffn.down"),
    Rule(r"transformer\.h\.(\d+)\.ln_1", r"layers.\1.mixer.pre"),
    Rule(r"transformer\.h\.(\d+)\.ln_2", r"layers.\1.ffn.pre"),
)

_NEXT = r"model\.mtp_layers\.0\."
PREDICTOR = Predictor(
    pattern=_NEXT + ".*",
    prefix=_NEXT,
    rules=(
        Rule(L + "token_layernorm", "embed_norm"),
        Rule(L + "hidden_layernorm", "feature_norm"),
        Rule(L + "input_proj", "join", halves_swapped),  # it reads the hidden vector first
        Rule(L + "final_layernorm", "norm"),
    ),
    carried=True,
)

FAMILIES = {
    "qwen": Family(qwen, QWEN),
    "qwen2": Family(qwen2, LLAMA),
    "qwen3": Family(qwen3, LLAMA),
    "mimo": Family(mimo, LLAMA, skip=(r"model\.mtp_layers\..*",), predictor=PREDICTOR),
}
