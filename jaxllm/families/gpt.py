"""Families with LayerNorm and biases, after GPT-2."""

from __future__ import annotations

from jaxllm.config import Block, ModelConfig
from jaxllm.families.base import Family, attention, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.names import GPT2


def gpt2(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer", tied=True)
    c.expect("scale_attn_weights", True)
    c.expect("scale_attn_by_inverse_layer_idx", False)
    c.skip("n_ctx|reorder_and_upcast_attn|attention_softmax_in_fp32|scale_attention_softmax_in_fp32")
    if c.flag("multi_query", False):
        s = sizes(c, norm="layer", tied=True, kv_heads=1)
    mixer = attention(s, qkv_bias=True, out_bias=True)
    return decoder(c, s, Block(mixer, dense(s, gated=False, bias=True), s.norm), positions=0)


FAMILIES = {
    "gpt2": Family(gpt2, GPT2, conv1d=True),
    "gpt_bigcode": Family(gpt2, GPT2),
}
