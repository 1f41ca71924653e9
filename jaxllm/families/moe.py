"""Families of routed experts around a Llama-like attention."""

from __future__ import annotations

from typing import Any

from jaxllm.config import Block, ModelConfig, MoE, QKNorm
from jaxllm.families.base import Family, Rule, Sizes, attention, decoder, dense, sizes, windows
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import gate_up, stacked_down, stacked_gate_up
from jaxllm.families.llama import llama_attention
from jaxllm.families.names import LLAMA, MOE, L
from jaxllm.families.rope import rope

EXPERTS = "num_local_experts|num_experts|n_routed_experts"


def experts(c: Fields, s: Sizes, **changes: Any) -> MoE:
    """The usual routed experts of a config, with the fields of MoE that differ."""
    count, chosen = c.int(EXPERTS), c.int("num_experts_per_tok|experts_per_token")
    if chosen > count:
        c.problem(f"{chosen} of {count} experts cannot be chosen; num_experts_per_tok must not exceed them")
    usual = dict(experts=count, top_k=chosen, hidden=c.int("moe_intermediate_size", s.hidden), act=s.act)
    return MoE(**(usual | changes))


def mixtral(c: Fields) -> ModelConfig:
    s = sizes(c)
    c.skip("router_jitter_noise")  # noise in training only
    mixer = llama_attention(c, s, rope=rope(c, s.head_dim, theta=1e6))
    return decoder(c, s, Block(mixer, experts(c, s, renorm=True), s.norm))


def olmoe(c: Fields) -> ModelConfig:
    s = sizes(c)
    mixer = llama_attention(c, s, qk_norm=QKNorm(s.norm, "full"), clip=c.number("clip_qkv", None))
    return decoder(c, s, Block(mixer, experts(c, s, renorm=c.flag("norm_topk_prob", False)), s.norm))


def qwen2_moe(c: Fields) -> ModelConfig:
    s = sizes(c)
    shared = c.int("shared_expert_intermediate_size", 5632)
    moe = experts(c, s, renorm=c.flag("norm_topk_prob", False), shared=shared, shared_gate=True)
    width = _qwen2_windows(c, s)
    turned, bias = rope(c, s.head_dim), c.flag("qkv_bias", True)
    sparse = sparse_layers(c, s)

    def layer(i: int) -> Block:
        mixer = attention(s, rope=turned, qkv_bias=bias, window=width[i])
        return Block(mixer, moe if sparse[i] else dense(s), s.norm)

    return decoder(c, s, layer)


def _qwen2_windows(c: Fields, s: Sizes) -> list[int | None]:
    """Where a sliding window is in use, every second layer below max_window_layers has it."""
    most = c.number("max_window_layers", 28)
    if not c.flag("use_sliding_window", False):
        c.skip("layer_types|sliding_window")
        return [None] * s.layers
    width = c.int("sliding_window", 4096)
    if c.raw("layer_types") is not None:
        return windows(c, s, width=width)
    return [width if i % 2 == 0 and i < most else None for i in range(s.layers)]


def sparse_layers(c: Fields, s: Sizes) -> list[bool]:
    """Which layers have routed experts: every decoder_sparse_step-th but those in mlp_only_layers."""
    step, plain = c.int("decoder_sparse_step", 1), c.items("mlp_only_layers", default=[])
    return [i not in plain and (i + 1) % step == 0 for i in range(s.layers)]


def qwen3_moe(c: Fields) -> ModelConfig:
    s = sizes(c)
    moe = experts(c, s, renorm=c.flag("norm_topk_prob", False))
    width = c.int("sliding_window", 4096) if c.flag("use_sliding_window", False) else None
    c.skip("sliding_window")
    mixer = llama_attention(c, s, qk_norm=QKNorm(s.norm, "head"), window=width)
    sparse = sparse_layers(c, s)
    return decoder(c, s, lambda i: Block(mixer, moe if sparse[i] else dense(s), s.norm))


def granitemoe(c: Fields) -> ModelConfig:
    s = sizes(c)
    mixer = llama_attention(c, s, scale=c.number("attention_multiplier", 1.0))
    moe = experts(c, s, score="softmax_topk")
    block = Block(mixer, moe, s.norm, residual=c.number("residual_multiplier", 1.0))
    embed, logits = c.number("embedding_multiplier", 1.0), c.number("logits_scaling", 1.0)
    return decoder(c, s, block, embed_scale=embed, logit_scale=1 / logits)


def phimoe(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    c.skip("input_jitter_noise")  # noise in training only
    c.expect("num_experts_per_tok", 2)
    moe = experts(c, s, score="sparsemixer", jitter=c.number("router_jitter_noise", 0.01))
    mixer = llama_attention(c, s, rope=rope(c, s.head_dim, theta=1e6))
    return decoder(c, s, Block(mixer, moe, s.norm), head_bias=c.flag("lm_head_bias", False))


# What a gpt_oss config without rope_parameters means.
YARN = dict(
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)


def gpt_oss(c: Fields) -> ModelConfig:
    s = sizes(c)
    c.expect("swiglu_alpha", 1.702)
    c.expect("swiglu_limit", 7.0)
    c.skip("initial_context_length|experts_per_token")
    turned, width = rope(c, s.head_dim, theta=150000.0, usual=YARN), windows(c, s, every=2, width=128)
    bias = c.flag("attention_bias", True)
    moe = experts(c, s, act="clamped_swiglu", score="softmax_topk", bias=True, router_bias=True)

    def layer(i: int) -> Block:
        mixer = attention(s, rope=turned, qkv_bias=bias, out_bias=bias, sinks=True, window=width[i])
        return Block(mixer, moe, s.norm)

    return decoder(c, s, layer)


def _layers(*rows: tuple) -> tuple[Rule, ...]:
    return tuple(Rule(L + name, r"layers.\1." + path, *split) for name, path, *split in rows)


SPARSE = (*MOE, *LLAMA)
GRANITEMOE = (
    *_layers(
        (r"block_sparse_moe\.input_linear", "ffn", gate_up),
        (r"block_sparse_moe\.output_linear", "ffn.down"),
    ),
    *SPARSE,
)
GPT_OSS = (
    *_layers(
        (r"self_attn\.sinks", "mixer.sinks"),
        (r"mlp\.router", "ffn.router"),
        (r"mlp\.experts\.gate_up_proj(?:_bias)?", "ffn", stacked_gate_up),
        (r"mlp\.experts\.down_proj(?:_bias)?", "ffn", stacked_down),
    ),
    *LLAMA,
)

FAMILIES = {
    "mixtral": Family(mixtral, SPARSE),
    "olmoe": Family(olmoe, SPARSE),
    "qwen2_moe": Family(qwen2_moe, SPARSE),
    "qwen3_moe": Family(qwen3_moe, SPARSE),
    "granitemoe": Family(granitemoe, GRANITEMOE),
    "phimoe": Family(phimoe, SPARSE),
    "gpt_oss": Family(gpt_oss, GPT_OSS),
}
