"""The GLM line: biased queries, keys and values, and rotary on half of each head, in pairs of neighbours."""

from __future__ import annotations

from dataclasses import replace

from jaxllm.config import Block, ModelConfig, Norm
from jaxllm.families.base import Family, Rule, attention, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import fused_qkv, gate_up
from jaxllm.families.names import LLAMA, L
from jaxllm.families.rope import rope


def glm(c: Fields, *, post: bool = False) -> ModelConfig:
    s = sizes(c, head_dim=c.int("head_dim", 128))
    table = rope(c, s.head_dim, partial=0.5)
    mixer = attention(s, rope=table, qkv_bias=c.flag("attention_bias", True))
    return decoder(c, s, Block(mixer, dense(s), s.norm, post=post))


def glm4(c: Fields) -> ModelConfig:
    """GLM 4 (0414): norms before and after each sublayer."""
    return glm(c, post=True)


def chatglm(c: Fields) -> ModelConfig:
    """ChatGLM 2 and 3 and the first GLM 4, with remote code; rope_ratio multiplies the rotary base."""
    c.skip("apply_query_key_layer_scaling|attention_softmax_in_fp32|bias_dropout_fusion|vocab_size")
    c.expect("multi_query_attention", True)
    for name, only in (("rmsnorm", True), ("post_layer_norm", True), ("original_rope", True)):
        c.expect(name, only)
    for name in ("apply_residual_connection_post_layernorm", "fp32_residual_connection", "quantization_bit"):
        c.expect(name, False)
    c.expect("pre_seq_len")
    bias = c.flag("add_bias_linear", False)
    kv_heads, head_dim = c.int("multi_query_group_num"), c.int("kv_channels")
    s = sizes(c, act="silu", kv_heads=kv_heads, head_dim=head_dim)
    s = replace(s, norm=Norm("rms", c.number("layernorm_epsilon", 1e-5)))
    table = rope(c, s.head_dim, theta=10000.0 * c.number("rope_ratio", 1.0), fraction=0.5)
    mixer = attention(s, rope=table, qkv_bias=bias or c.flag("add_qkv_bias", False), out_bias=bias)
    vocab = c.int("padded_vocab_size")
    return decoder(c, s, Block(mixer, dense(s, bias=bias), s.norm), vocab=vocab)


GLM4 = (
    Rule(L + r"post_self_attn_layernorm", r"layers.\1.mixer.post"),
    Rule(L + r"post_mlp_layernorm", r"layers.\1.ffn.post"),
)
CHATGLM = (
    Rule(r"transformer\.embedding\.word_embeddings", "embed"),
    Rule(r"transformer\.encoder\.final_layernorm", "norm"),
    Rule(r"transformer\.output_layer", "head"),
    *(
        Rule(r"transformer\.encoder\.layers\.(\d+)\." + name, path, *split)
        for name, path, *split in (
            (r"self_attention\.query_key_value", r"layers.\1.mixer", fused_qkv),
            (r"self_attention\.dense", r"layers.\1.mixer.o"),
            (r"mlp\.dense_h_to_4h", r"layers.\1.ffn", gate_up),
            (r"mlp\.dense_4h_to_h", r"layers.\1.ffn.down"),
            (r"input_layernorm", r"layers.\1.mixer.pre"),
            (r"post_attention_layernorm", r"layers.\1.ffn.pre"),
        )
    ),
)

FAMILIES = {
    "glm": Family(glm, LLAMA, interleaved=True),
    "glm4": Family(glm4, (*GLM4, *LLAMA), interleaved=True),
    "chatglm": Family(chatglm, CHATGLM, interleaved=True, skip=(r"transformer\.rotary_pos_emb\.inv_freq",)),
}
