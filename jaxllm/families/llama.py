"""Llama and the families that are Llama with one thing changed."""

from __future__ import annotations

from typing import Any

from jaxllm.config import Block, ModelConfig, Norm, QKNorm
from jaxllm.families.base import Family, Sizes, attention, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.names import LLAMA
from jaxllm.families.rope import rope


def llama(c: Fields, s: Sizes | None = None, **attn: Any) -> ModelConfig:
    """RMSNorm before, rotary, gated feed-forward; `attn` are the fields of Attention that differ."""
    s = s or sizes(c)
    bias = c.flag("attention_bias", False)
    usual = dict(rope=rope(c, s.head_dim), qkv_bias=bias, out_bias=bias, window=c.int("sliding_window", None))
    mixer = attention(s, **(usual | attn))
    return decoder(c, s, Block(mixer, dense(s, bias=c.flag("mlp_bias", False)), s.norm))


def window(c: Fields) -> int | None:
    """Qwen's sliding window, off unless use_sliding_window says otherwise (then on every layer it names)."""
    c.skip("max_window_layers|layer_types")
    width = c.int("sliding_window", None)
    return width if c.flag("use_sliding_window", False) else None


def qwen2(c: Fields) -> ModelConfig:
    return llama(c, qkv_bias=True, out_bias=False, window=window(c))


def qwen3(c: Fields) -> ModelConfig:
    return llama(c, qk_norm=QKNorm(Norm("rms", c.number("rms_norm_eps")), "head"), window=window(c))


FAMILIES = {
    "llama": Family(llama, LLAMA),
    "mistral": Family(llama, LLAMA),
    "qwen2": Family(qwen2, LLAMA),
    "qwen3": Family(qwen3, LLAMA),
}
