"""BitNet b1.58 (arXiv 2402.17764): Llama with squared relu, and a norm before each sublayer's last map."""

from __future__ import annotations

from dataclasses import replace

from jaxllm.config import Block, ModelConfig
from jaxllm.families.base import Family, Rule, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.llama import llama_attention
from jaxllm.families.names import LLAMA, L
from jaxllm.families.rope import rope


def bitnet(c: Fields) -> ModelConfig:
    """What its linear maps round is in their weights, not here."""
    s = sizes(c)
    if s.heads * s.head_dim != s.width:
        c.problem(f"{s.heads} heads of {s.head_dim} should make the width {s.width}: their norm has that size")
    table = rope(c, s.head_dim, theta=500000.0)
    mixer = llama_attention(c, s, rope=table, out_norm=s.norm)
    return decoder(c, s, Block(mixer, replace(dense(s), norm=s.norm), s.norm))


RULES = (
    Rule(L + r"self_attn\.attn_sub_norm", r"layers.\1.mixer.out_norm"),
    Rule(L + r"mlp\.ffn_sub_norm", r"layers.\1.ffn.norm"),
)

FAMILIES = {"bitnet": Family(bitnet, (*RULES, *LLAMA))}
