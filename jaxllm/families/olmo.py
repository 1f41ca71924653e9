"""OLMo: norms without parameters; from 2 on norms after each sublayer and over all queries or keys at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.config import Block, ModelConfig, Norm, QKNorm
from jaxllm.families.base import NORMS, Family, Sizes, attention, decoder, dense, sizes, windows
from jaxllm.families.fields import Fields
from jaxllm.families.names import LLAMA, SANDWICH
from jaxllm.families.rope import rope, ropes


def olmo(c: Fields) -> ModelConfig:
    s = replace(sizes(c), norm=Norm("layer", 1e-5))
    bias = c.flag("attention_bias", False)
    clip = c.number("clip_qkv", None)
    mixer = attention(s, rope=rope(c, s.head_dim), clip=clip, qkv_bias=bias, out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s), s.norm))


def olmo2(c: Fields) -> ModelConfig:
    s = sizes(c)
    table = rope(c, s.head_dim)
    return decoder(c, s, lambda i: _layer(c, s, rope=table))


def olmo3(c: Fields) -> ModelConfig:
    """Three of four layers slide; only the others have the scaled rotary table."""
    s = sizes(c)
    window = windows(c, s, every=4, width=4096)
    table = ropes(c, s.head_dim, theta=500000.0, local="rope_theta", local_theta=500000.0)
    turned = [table["sliding_attention" if w else "full_attention"] for w in window]
    return decoder(c, s, lambda i: _layer(c, s, rope=turned[i], window=window[i]))


def _layer(c: Fields, s: Sizes, **attn: Any) -> Block:
    bias = c.flag("attention_bias", False)
    mixer = attention(s, qk_norm=QKNorm(s.norm, "full"), qkv_bias=bias, out_bias=bias, **attn)
    return Block(mixer, dense(s), s.norm, pre=False, post=True)


FAMILIES = {
    "olmo": Family(olmo, LLAMA, unit_norm=NORMS),
    "olmo2": Family(olmo2, (*SANDWICH, *LLAMA)),
    "olmo3": Family(olmo3, (*SANDWICH, *LLAMA)),
}
