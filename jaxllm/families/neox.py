"""Families with queries, keys and values in one matrix, grouped by head, after GPT-NeoX."""

from __future__ import annotations

from jaxllm.config import Block, ModelConfig, QKNorm
from jaxllm.families.base import ACTIVATIONS, Family, Rule, attention, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.names import NEOX
from jaxllm.families.rope import rope, slopes


def gpt_neox(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    bias = c.flag("attention_bias", True)
    mixer = attention(s, rope=rope(c, s.head_dim, partial=0.25), qkv_bias=bias, out_bias=bias)
    wiring = "split" if c.flag("use_parallel_residual", True) else None
    return decoder(c, s, Block(mixer, dense(s, gated=False, bias=True), s.norm, parallel=wiring))


def falcon(c: Fields) -> ModelConfig:
    """Falcon 7B (one kv head), 40B and 11B (new decoder), and the RefinedWeb models (ALiBi, sequential)."""
    c.expect("apply_residual_connection_post_layernorm", False)
    c.skip("ff_factor")
    new = c.flag("new_decoder_architecture", c.raw("n_head_kv") is not None)
    grouped = c.int("num_kv_heads|n_head_kv", c.int("num_attention_heads|n_head"))
    one = c.flag("multi_query", True) and not new
    kv_heads = 1 if one else grouped
    act = c.choice("activation", ACTIVATIONS, "gelu")
    s = sizes(c, act=act, norm="layer", tied=True, kv_heads=kv_heads)
    bias = c.flag("bias", False)
    if c.flag("alibi", False):
        place = dict(alibi=slopes(s.heads, scale=s.head_dim**-0.5))  # added before the scores are scaled
    else:
        place = dict(rope=rope(c, s.head_dim))
    mixer = attention(s, qkv_bias=bias, out_bias=bias, **place)
    block = Block(mixer, dense(s, gated=False, bias=bias), s.norm, parallel=_falcon_wiring(c, new))
    return decoder(c, s, block)


def _falcon_wiring(c: Fields, new: bool) -> str | None:
    parallel = c.flag("parallel_attn", True)
    norms = c.int("num_ln_in_parallel_attn", 2 if new else 1)
    if new and norms == 2:
        return "split"
    return "shared" if new or parallel else None


def bloom(c: Fields) -> ModelConfig:
    c.expect("apply_residual_connection_post_layernorm", False)
    c.skip("slow_but_exact|offset_alibi|skip_bias_add|skip_bias_add_qkv|masked_softmax_fusion")
    c.skip("attention_softmax_in_fp32|bias_dropout_fusion|n_inner")
    s = sizes(c, act="gelu_tanh", norm="layer", tied=True, hidden=4 * c.int("hidden_size|n_embed"))
    mixer = attention(s, qkv_bias=True, out_bias=True, alibi=slopes(s.heads))
    block = Block(mixer, dense(s, gated=False, bias=True), s.norm)
    return decoder(c, s, block, embed_norm=s.norm)


def persimmon(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    qk_norm = QKNorm(s.norm, "head") if c.flag("qk_layernorm", True) else None
    turned = rope(c, s.head_dim, partial=0.5)
    mixer = attention(s, rope=turned, qkv_bias=True, out_bias=True, qk_norm=qk_norm)
    return decoder(c, s, Block(mixer, dense(s, gated=False, bias=True), s.norm))


PERSIMMON = (Rule(r"model\.embed_tokens", "embed"), *NEOX)

FAMILIES = {
    "gpt_neox": Family(gpt_neox, NEOX),
    "falcon": Family(falcon, NEOX),
    "RefinedWebModel": Family(falcon, NEOX),
    "RefinedWeb": Family(falcon, NEOX),
    "bloom": Family(bloom, NEOX),
    "persimmon": Family(persimmon, PERSIMMON),
}
