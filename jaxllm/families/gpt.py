"""Families with LayerNorm and biases, after GPT-2 and GPT-J."""

from __future__ import annotations

import dataclasses

from jaxllm.config import Block, ModelConfig, Norm, QKNorm
from jaxllm.families.base import NORMS, Family, Rule, attention, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import codegen_qkv, fused_qkv, grouped_qkv
from jaxllm.families.names import GPT2, LLAMA, L
from jaxllm.families.rope import rope, slopes


def gpt2(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer", tied=True)
    c.skip("n_ctx|reorder_and_upcast_attn|attention_softmax_in_fp32|scale_attention_softmax_in_fp32")
    usual = s.head_dim**-0.5 if c.flag("scale_attn_weights", True) else 1.0
    falling = c.flag("scale_attn_by_inverse_layer_idx", False)

    def layer(i: int) -> Block:
        scale = usual / (i + 1) if falling else usual
        mixer = attention(s, scale=scale, qkv_bias=True, out_bias=True)
        return Block(mixer, dense(s, gated=False, bias=True), s.norm)

    return decoder(c, s, layer, positions=0)


def gpt_bigcode(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer", tied=True)
    c.skip("attention_softmax_in_fp32|scale_attention_softmax_in_fp32|inference_runner|pad_key_length")
    c.skip("max_batch_size|max_sequence_length|pre_allocate_kv_cache|validate_runner_input")
    mixer = attention(
        s,
        kv_heads=1 if c.flag("multi_query", True) else s.heads,
        scale=s.head_dim**-0.5 if c.flag("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
    )
    return decoder(c, s, Block(mixer, dense(s, gated=False, bias=True), s.norm), positions=0)


def gptj(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    c.expect("rotary", True)
    c.expect("scale_attn_weights", True)
    c.skip("n_ctx")
    turned = rope(c, c.int("rotary_dim", 64), fraction=1.0)
    block = Block(attention(s, rope=turned), dense(s, gated=False, bias=True), s.norm, parallel="shared")
    return decoder(c, s, block, head_bias=True)


def opt(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer", tied=True)
    c.expect("do_layer_norm_before", True)
    c.expect("_remove_final_layer_norm", False)
    c.expect("layer_norm_elementwise_affine", True)
    c.expect("scale_embeddings", False)
    c.expect("learned_embeddings", True)
    if c.int("word_embed_proj_dim", s.width) != s.width:
        c.problem("word_embed_proj_dim differs from hidden_size; projected embeddings are not implemented")
    bias = c.flag("enable_bias", True)
    block = Block(attention(s, qkv_bias=bias, out_bias=bias), dense(s, gated=False, bias=bias), s.norm)
    return decoder(c, s, block, positions=2)


def mpt(c: Fields) -> ModelConfig:
    """MPT with ALiBi, as the hub's files have it; llm-foundry's other options are refused."""
    a = c.section("attn_config")
    ratio = c.number("expansion_ratio", 4)
    s = sizes(c, act="gelu", norm="layer", tied=True, hidden=int(ratio * c.int("d_model")))
    s = dataclasses.replace(s, norm=Norm("layer", s.norm.eps))
    c.expect("no_bias", True)
    c.expect("norm_type", "low_precision_layernorm", "layernorm")
    c.expect("logit_scale", 1.0)
    # ALiBi takes the place of learned positions.
    c.skip("learned_pos_emb|embedding_fraction|verbose|fc_type|tokenizer_name")
    a.expect("alibi", True)
    a.expect("attn_type", "multihead_attention")
    a.expect("qk_ln", False)
    a.expect("prefix_lm", False)
    a.skip("attn_impl|attn_uses_sequence_id")
    mixer = attention(
        s,
        scale=a.number("softmax_scale", s.head_dim**-0.5),
        clip=a.number("clip_qkv", None),
        alibi=slopes(s.heads, exponent=a.number("alibi_bias_max", 8)),
    )
    return decoder(c, s, Block(mixer, dense(s, gated=False), s.norm))


def starcoder2(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer", tied=True)
    c.expect("norm_type", "layer_norm")
    c.expect("mlp_type", "default")
    c.expect("scale_attn_weights", True)
    c.skip("attention_softmax_in_fp32|scale_attention_softmax_in_fp32")
    bias = c.flag("use_bias", True)
    mixer = attention(
        s, rope=rope(c, s.head_dim), qkv_bias=bias, out_bias=bias, window=c.int("sliding_window", None)
    )
    return decoder(c, s, Block(mixer, dense(s, gated=False, bias=bias), s.norm))


def phi(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    qk_norm = QKNorm(s.norm, "head") if c.flag("qk_layernorm", False) else None
    turned = rope(c, s.head_dim, partial=0.5)
    mixer = attention(s, rope=turned, qkv_bias=True, out_bias=True, qk_norm=qk_norm)
    block = Block(mixer, dense(s, gated=False, bias=True), s.norm, parallel="shared")
    return decoder(c, s, block, head_bias=True)


def nemotron(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    bias = c.flag("attention_bias", False)
    mixer = attention(s, rope=rope(c, s.head_dim, partial=0.5), qkv_bias=bias, out_bias=bias)
    return decoder(c, s, Block(mixer, dense(s, gated=False, bias=c.flag("mlp_bias", False)), s.norm))


def stablelm(c: Fields) -> ModelConfig:
    s = sizes(c, norm="layer")
    qk_norm = QKNorm(Norm("layer", s.norm.eps), "heads") if c.flag("qk_layernorm", False) else None
    turned = rope(c, s.head_dim, partial=0.25)
    mixer = attention(s, rope=turned, qkv_bias=c.flag("use_qkv_bias", False), qk_norm=qk_norm)
    wiring = "shared" if c.flag("use_parallel_residual", False) else None
    return decoder(c, s, Block(mixer, dense(s), s.norm, parallel=wiring))


def _layers(*rows: tuple) -> tuple[Rule, ...]:
    return tuple(Rule(L + name, r"layers.\1." + path, *split) for name, path, *split in rows)


H = r"(?:transformer\.)?h\.(\d+)\."
BIGCODE = (Rule(H + r"attn\.c_attn", r"layers.\1.mixer", grouped_qkv), *GPT2)
GPTJ = (
    Rule(H + r"attn\.([qkv])_proj", r"layers.\1.mixer.\2"),
    Rule(H + r"attn\.qkv_proj", r"layers.\1.mixer", codegen_qkv),
    Rule(H + r"attn\.out_proj", r"layers.\1.mixer.o"),
    Rule(H + r"mlp\.fc_in", r"layers.\1.ffn.up"),
    Rule(H + r"mlp\.fc_out", r"layers.\1.ffn.down"),
    *GPT2,
)
D = r"(?:model\.)?decoder\."
OPT = (
    Rule(D + r"embed_tokens", "embed"),
    Rule(D + r"embed_positions", "positions"),
    Rule(D + r"final_layer_norm", "norm"),
    Rule(r"lm_head", "head"),
    *(
        Rule(D + r"layers\.(\d+)\." + name, r"layers.\1." + path)
        for name, path in (
            (r"self_attn\.([qkv])_proj", r"mixer.\2"),
            (r"self_attn\.out_proj", "mixer.o"),
            (r"self_attn_layer_norm", "mixer.pre"),
            (r"final_layer_norm", "ffn.pre"),
            (r"fc1", "ffn.up"),
            (r"fc2", "ffn.down"),
        )
    ),
)
MPT = (
    Rule(r"transformer\.wte", "embed"),
    Rule(r"transformer\.norm_f", "norm"),
    Rule(r"lm_head", "head"),
    *_layers(
        (r"attn\.Wqkv", "mixer", fused_qkv),
        (r"attn\.out_proj", "mixer.o"),
        (r"norm_1", "mixer.pre"),
        (r"norm_2", "ffn.pre"),
        (r"ffn\.(up|down)_proj", r"ffn.\2"),
    ),
)
STARCODER2 = (*_layers((r"mlp\.c_fc", "ffn.up"), (r"mlp\.c_proj", "ffn.down")), *LLAMA)
PHI = (
    Rule(r"model\.final_layernorm", "norm"),
    *_layers(
        (r"self_attn\.dense", "mixer.o"),
        (r"self_attn\.([qk])_layernorm", r"mixer.\2_norm"),
        (r"mlp\.fc1", "ffn.up"),
        (r"mlp\.fc2", "ffn.down"),
    ),
    *LLAMA,
)
STABLELM = (*_layers((r"self_attn\.([qk])_layernorm\.norms\.(\d+)", r"mixer.\2_norm@\3")), *LLAMA)

FAMILIES = {
    "gpt2": Family(gpt2, GPT2, conv1d=True),
    "gpt_bigcode": Family(gpt_bigcode, BIGCODE),
    "gptj": Family(gptj, GPTJ, interleaved=True),
    "codegen": Family(gptj, GPTJ, interleaved=True),
    "opt": Family(opt, OPT),
    "mpt": Family(mpt, MPT),
    "starcoder2": Family(starcoder2, STARCODER2),
    "phi": Family(phi, PHI),
    "nemotron": Family(nemotron, LLAMA, one_plus=NORMS),
    "stablelm": Family(stablelm, STABLELM),
}
