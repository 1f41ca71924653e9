"""Cohere's Command: LayerNorm without bias, one for both sublayers, which run side by side."""

from __future__ import annotations

from dataclasses import replace

from jaxllm.config import Attention, Block, ModelConfig, Norm, QKNorm
from jaxllm.families.base import Family, Sizes, attention, decoder, dense, sizes, windows
from jaxllm.families.fields import Fields
from jaxllm.families.names import LLAMA
from jaxllm.families.rope import rope


def cohere(c: Fields) -> ModelConfig:
    s = _sizes(c)
    qk_norm = QKNorm(s.norm, "heads") if c.flag("use_qk_norm", False) else None
    mixer = _attention(c, s, theta=500000.0)
    return _decoder(c, s, [replace(mixer, qk_norm=qk_norm)] * s.layers)


def cohere2(c: Fields) -> ModelConfig:
    """Three of four layers slide; the others have no positions."""
    c.skip("order_of_interleaved_layers|layer_switch|use_embedding_sharing|use_parallel_embedding")
    for name, only in (("use_gated_activation", True), ("use_parallel_block", True), ("use_qk_norm", False)):
        c.expect(name, only)
    c.expect("position_embedding_type", "rope_gptj")
    s = _sizes(c)
    window = windows(c, s, every=c.int("sliding_window_pattern", 4), width=4096)
    mixer = _attention(c, s, theta=10000.0)
    return _decoder(c, s, [replace(mixer, window=w, rope=mixer.rope if w else None) for w in window])


def _sizes(c: Fields) -> Sizes:
    return replace(sizes(c, tied=True), norm=Norm("layer", c.number("layer_norm_eps", 1e-5)))


def _attention(c: Fields, s: Sizes, *, theta: float) -> Attention:
    bias = c.flag("attention_bias", False)
    return attention(s, rope=rope(c, s.head_dim, theta=theta), qkv_bias=bias, out_bias=bias)


def _decoder(c: Fields, s: Sizes, mixers: list[Attention]) -> ModelConfig:
    mlp = dense(s)
    layer = lambda i: Block(mixers[i], mlp, s.norm, parallel="shared")
    return decoder(c, s, layer, logit_scale=c.number("logit_scale", 0.0625))


FAMILIES = {
    "cohere": Family(cohere, LLAMA, interleaved=True),
    "cohere2": Family(cohere2, LLAMA, interleaved=True),
}
