"""Llama and the families that are Llama with one thing changed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from jaxllm.config import Attention, Block, ModelConfig, QKNorm
from jaxllm.families.base import Family, Rule, Sizes, attention, decoder, dense, sizes, windows
from jaxllm.families.fields import Fields
from jaxllm.families.names import LLAMA, SANDWICH, L
from jaxllm.families.rope import rope


def llama_attention(c: Fields, s: Sizes, **changes: Any) -> Attention:
    """Rotary on every dimension; `changes` are the fields of Attention that differ."""
    bias = c.flag("attention_bias", False)
    usual = dict(rope=rope(c, s.head_dim), qkv_bias=bias, out_bias=bias, window=c.int("sliding_window", None))
    return attention(s, **(usual | changes))


def llama(c: Fields, s: Sizes | None = None, **attn: Any) -> ModelConfig:
    """RMSNorm before, rotary, gated feed-forward; `attn` are the fields of Attention that differ."""
    s = s or sizes(c)
    mlp = dense(s, bias=c.flag("mlp_bias", False))
    return decoder(c, s, Block(llama_attention(c, s, **attn), mlp, s.norm))


def internlm3(c: Fields) -> ModelConfig:
    """Its own code spells the biases qkv_bias and bias."""
    s = sizes(c, head_dim=c.int("head_dim", 128))
    bias = c.flag("mlp_bias|bias", False)
    mixer = llama_attention(c, s, qkv_bias=c.flag("attention_bias|qkv_bias", False), out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s, bias=bias), s.norm))


def seed_oss(c: Fields) -> ModelConfig:
    s = sizes(c, head_dim=c.int("head_dim", 128))
    return llama(c, s, qkv_bias=c.flag("attention_bias", True), out_bias=c.flag("attention_out_bias", False))


def helium(c: Fields) -> ModelConfig:
    s = sizes(c, head_dim=c.int("head_dim", 128))
    return llama(c, s, rope=rope(c, s.head_dim, theta=100000.0), out_bias=False)


def smollm3(c: Fields) -> ModelConfig:
    """Every fourth layer has no positions, and only those may slide."""
    s = sizes(c, tied=True)
    every = c.int("no_rope_layer_interval", 4)
    turned = c.items("no_rope_layers", s.layers, [int((i + 1) % every != 0) for i in range(s.layers)])
    usual, width = llama_attention(c, s, rope=rope(c, s.head_dim, theta=2e6)), _smollm3_windows(c, s, turned)
    mlp = dense(s, bias=c.flag("mlp_bias", False))

    def layer(i: int) -> Block:
        mixer = replace(usual, rope=usual.rope if turned[i] else None, window=width[i])
        return Block(mixer, mlp, s.norm)

    return decoder(c, s, layer)


def _smollm3_windows(c: Fields, s: Sizes, turned: list[int]) -> list[int | None]:
    if not c.flag("use_sliding_window", False):
        c.skip("layer_types")
        return [None] * s.layers
    if c.raw("layer_types") is not None:
        return windows(c, s)
    width = c.int("sliding_window", None)
    return [None if r else width for r in turned]


def granite(c: Fields) -> ModelConfig:
    s = sizes(c)
    mixer = llama_attention(c, s, scale=c.number("attention_multiplier", 1.0))
    mlp = dense(s, bias=c.flag("mlp_bias", False))
    block = Block(mixer, mlp, s.norm, residual=c.number("residual_multiplier", 1.0))
    ends = dict(embed_scale=c.number("embedding_multiplier", 1.0), logit_scale=1 / c.number("logits_scaling", 1.0))
    return decoder(c, s, block, **ends)


def phi3(c: Fields) -> ModelConfig:
    c.skip("original_max_position_embeddings")  # rope reads it where it matters
    for name, only in (("full_attn_mod", 1), ("interpolate_factor", 1), ("lm_head_bias", False)):
        c.expect(name, only)
    return llama(c)


def arcee(c: Fields) -> ModelConfig:
    s = sizes(c)
    mlp = dense(s, gated=False, bias=c.flag("mlp_bias", False))
    return decoder(c, s, Block(llama_attention(c, s), mlp, s.norm))


def ernie4_5(c: Fields) -> ModelConfig:
    s = sizes(c, tied=True, head_dim=c.int("head_dim", 128))
    bias = c.flag("use_bias", False)
    mixer = llama_attention(c, s, rope=rope(c, s.head_dim, theta=500000.0), qkv_bias=bias, out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s, bias=bias), s.norm))


def hunyuan(c: Fields) -> ModelConfig:
    """Queries and keys are normed after they are rotated."""
    c.skip("attention_head_dim|cla_share_factor|moe_topk|norm_topk_prob|num_shared_expert")  # of other variants
    c.skip("|".join(name for name in c.values if re.match(_HUNYUAN_MULTIMODAL, name)))
    for name, only in (("use_cla", False), ("use_qk_norm", True), ("use_mla", False), ("num_experts", 1)):
        c.expect(name, only)
    for name, only in (("norm_type", "rms"), ("use_rotary_pos_emb", True), ("position_embedding_xdrope", False)):
        c.expect(name, only)
    s = sizes(c)
    return llama(c, s, qk_norm=QKNorm(s.norm, "head", after_rope=True))


def exaone4(c: Fields) -> ModelConfig:
    """Norms after each sublayer; where some layers slide, the others have no positions."""
    s = sizes(c)
    width = c.int("sliding_window", None)
    if c.raw("layer_types") is not None:
        c.skip("sliding_window_pattern")
    every = c.int("sliding_window_pattern", 4) if width and c.raw("layer_types") is None else 0
    window = windows(c, s, every=every)
    table, mlp = rope(c, s.head_dim), dense(s)

    def layer(i: int) -> Block:
        turned = table if window[i] or not width else None
        mixer = attention(s, qk_norm=QKNorm(s.norm, "head"), rope=turned, window=window[i])
        return Block(mixer, mlp, s.norm, pre=False, post=True)

    return decoder(c, s, layer)


_HUNYUAN_MULTIMODAL = (
    r"anyres_|vit_|(im|text|video|mask)_\w+_id$|pad_id|num_media|pool_type|class_num|dense_l|org_v"
)
HUNYUAN = (
    Rule(L + r"self_attn\.query_layernorm", r"layers.\1.mixer.q_norm"),
    Rule(L + r"self_attn\.key_layernorm", r"layers.\1.mixer.k_norm"),
)

FAMILIES = {
    "llama": Family(llama, LLAMA),
    "mistral": Family(llama, LLAMA),
    "internlm3": Family(internlm3, LLAMA),
    "seed_oss": Family(seed_oss, LLAMA),
    "helium": Family(helium, LLAMA, interleaved=True),
    "smollm3": Family(smollm3, LLAMA),
    "granite": Family(granite, LLAMA),
    "phi3": Family(phi3, LLAMA),
    "arcee": Family(arcee, LLAMA),
    "ernie4_5": Family(ernie4_5, LLAMA, interleaved=True),
    "hunyuan_v1_dense": Family(hunyuan, (*HUNYUAN, *LLAMA)),
    "exaone4": Family(exaone4, (*SANDWICH, *LLAMA)),
}
