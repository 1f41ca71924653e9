"""Families whose checkpoints come with their own code: mostly Llama under other names."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxllm.config import Block, ModelConfig, MoE, Norm, QKNorm
from jaxllm.families.base import Family, Rule, Sizes, attention, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import fused_qkv, grouped_qkv
from jaxllm.families.llama import llama_attention
from jaxllm.families.names import LLAMA, MOE, L
from jaxllm.families.rope import rope, slopes


def baichuan(c: Fields) -> ModelConfig:
    """The 7B models rotate; the 13B ones, which say model_max_length only, have ALiBi (arXiv 2309.10305).

    Version 2, which says z_loss_weight, scales the head's rows to length 1.
    """
    rotary = c.raw("max_position_embeddings") is not None
    s = sizes(c, max_len=c.int("max_position_embeddings|model_max_length"))
    place = dict(rope=rope(c, s.head_dim)) if rotary else dict(alibi=slopes(s.heads))
    block = Block(attention(s, **place), dense(s), s.norm)
    return decoder(c, s, block, unit_head=c.raw("z_loss_weight") is not None)


def internlm(c: Fields) -> ModelConfig:
    """Its dynamic table is the plain one within the positions the model was made for."""
    rotary = c.section("rotary")
    rotary.choice("type", {"dynamic": None, "origin": None}, "dynamic")
    rotary.skip("scaling_factor")
    s, bias = sizes(c), c.flag("bias", True)
    table = rope(c, s.head_dim, theta=rotary.number("base", 10000))
    mixer = attention(s, rope=table, qkv_bias=bias, out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s), s.norm))


def internlm2(c: Fields) -> ModelConfig:
    s, bias = sizes(c), c.flag("bias", True)
    mixer = attention(s, rope=rope(c, s.head_dim), qkv_bias=bias, out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s), s.norm))


def orion(c: Fields) -> ModelConfig:
    """Llama with LayerNorm, whose epsilon is still called rms_norm_eps."""
    c.skip("max_sequence_length")
    s = sizes(c)
    s = replace(s, norm=Norm("layer", s.norm.eps, bias=True))
    return decoder(c, s, Block(llama_attention(c, s), dense(s), s.norm))


def minicpm(c: Fields) -> ModelConfig:
    """Scaled after maximal update parametrization (arXiv 2404.06395)."""
    c.skip("mup_denominator")
    s = sizes(c, tied=True)
    residual = c.number("scale_depth", 1.0) / math.sqrt(s.layers)
    block = Block(llama_attention(c, s), dense(s), s.norm, residual=residual)
    logit_scale = c.number("dim_model_base", 1.0) / s.width
    return decoder(c, s, block, embed_scale=c.number("scale_emb", 1.0), logit_scale=logit_scale)


def exaone(c: Fields) -> ModelConfig:
    s = sizes(c, tied=True)
    return decoder(c, s, Block(attention(s, rope=rope(c, s.head_dim)), dense(s), s.norm))


def deepseek(c: Fields) -> ModelConfig:
    """DeepSeekMoE (arXiv 2401.06066): Llama's attention, dense layers first, then routed and shared experts."""
    s, first = sizes(c), c.number("first_k_dense_replace", 0)
    hidden = c.int("moe_intermediate_size", 1407)
    experts = _routed(c, s, hidden, shared=_shared(c, 0) * hidden)
    sparse = lambda i: i >= first and i % c.int("moe_layer_freq", 1) == 0
    mixer, mlp = llama_attention(c, s), dense(s)
    return decoder(c, s, lambda i: Block(mixer, experts if sparse(i) else mlp, s.norm))


def _routed(c: Fields, s: Sizes, hidden: int, *, shared: int) -> MoE:
    """Softmax over all experts; the chosen ones' weights are made to sum to 1 where there are several."""
    c.expect("scoring_func", "softmax")
    top_k = c.int("num_experts_per_tok")
    renorm = c.flag("norm_topk_prob", False) and top_k > 1
    return MoE(c.int("n_routed_experts"), top_k, hidden, s.act, renorm=renorm, shared=shared)


def _shared(c: Fields, usual: int) -> int:
    return 0 if c.raw("n_shared_experts") == 0 else c.int("n_shared_experts", usual)


def minimind(c: Fields) -> ModelConfig:
    """MiniMind 2, and 3, which says num_experts and norms queries and keys as Qwen 3 does."""
    third, width = c.raw("num_experts") is not None, c.int("hidden_size")
    usual = 64 * math.ceil(int(width * 8 / 3) / 64)
    s = sizes(c, tied=True, hidden=c.int("intermediate_size", usual))
    c.expect("inference_rope_scaling", False)
    c.skip("dropout|flash_attn")
    mixer = attention(s, rope=rope(c, s.head_dim, theta=1e6), qk_norm=QKNorm(s.norm, "head") if third else None)
    ffn = _minimind_experts(c, s, third) if c.flag("use_moe", False) else dense(s)
    c.skip(
        "num_experts_per_tok|n_routed_experts|n_shared_experts|scoring_func|norm_topk_prob|moe_intermediate_size"
    )
    return decoder(c, s, Block(mixer, ffn, s.norm))


def _minimind_experts(c: Fields, s: Sizes, third: bool) -> MoE:
    if not third:
        c.expect("n_shared_experts", 0, 1)
        return _routed(c, s, s.hidden, shared=_shared(c, 1) * s.hidden)
    renorm, hidden = c.flag("norm_topk_prob", True), c.int("moe_intermediate_size", s.hidden)
    return MoE(c.int("num_experts"), c.int("num_experts_per_tok", 1), hidden, s.act, renorm=renorm)


BAICHUAN = (Rule(L + r"self_attn\.W_pack", r"layers.\1.mixer", fused_qkv), *LLAMA)
INTERNLM2 = (
    Rule(r"model\.tok_embeddings", "embed"),
    Rule(r"model\.norm", "norm"),
    Rule(r"output", "head"),
    Rule(L + r"attention\.wqkv", r"layers.\1.mixer", grouped_qkv),
    Rule(L + r"attention\.wo", r"layers.\1.mixer.o"),
    Rule(L + r"feed_forward\.w1", r"layers.\1.ffn.gate"),
    Rule(L + r"feed_forward\.w3", r"layers.\1.ffn.up"),
    Rule(L + r"feed_forward\.w2", r"layers.\1.ffn.down"),
    Rule(L + r"attention_norm", r"layers.\1.mixer.pre"),
    Rule(L + r"ffn_norm", r"layers.\1.ffn.pre"),
)
EXAONE = (
    Rule(r"transformer\.wte", "embed"),
    Rule(r"transformer\.ln_f", "norm"),
    Rule(r"lm_head", "head"),
    Rule(L + r"attn\.attention\.([qkv])_proj", r"layers.\1.mixer.\2"),
    Rule(L + r"attn\.attention\.out_proj", r"layers.\1.mixer.o"),
    Rule(L + r"mlp\.c_fc_0", r"layers.\1.ffn.gate"),
    Rule(L + r"mlp\.c_fc_1", r"layers.\1.ffn.up"),
    Rule(L + r"mlp\.c_proj", r"layers.\1.ffn.down"),
    Rule(L + r"ln_1", r"layers.\1.mixer.pre"),
    Rule(L + r"ln_2", r"layers.\1.ffn.pre"),
)
MINIMIND = (Rule(L + r"mlp\.shared_experts\.0\.(gate|up|down)_proj", r"layers.\1.ffn.shared.\2"), *MOE, *LLAMA)

FAMILIES = {
    "baichuan": Family(baichuan, BAICHUAN),
    "internlm": Family(internlm, LLAMA),
    "internlm2": Family(internlm2, INTERNLM2),
    "orion": Family(orion, LLAMA),
    "minicpm": Family(minicpm, LLAMA),
    "exaone": Family(exaone, EXAONE, skip=(r"transformer\.rotary\.inv_freq",)),
    "deepseek": Family(deepseek, (*MOE, *LLAMA)),
    "minimind": Family(minimind, MINIMIND),
}
