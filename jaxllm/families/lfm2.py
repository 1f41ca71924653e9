"""LFM2: short convolutions with attention on some layers."""

from __future__ import annotations

from jaxllm.config import Block, ModelConfig, QKNorm, ShortConv
from jaxllm.families.base import Family, Rule, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import depthwise
from jaxllm.families.llama import llama_attention
from jaxllm.families.names import ENDS, L
from jaxllm.families.rope import rope


def lfm2(c: Fields) -> ModelConfig:
    c.expect("block_use_swiglu", True)
    c.expect("use_pos_enc", True)
    c.skip("block_dim|block_norm_eps|block_mlp_init_scale|block_out_init_scale|block_use_xavier_init")
    c.skip("conv_dim|conv_dim_out|conv_use_xavier_init|num_heads|theta")
    s = sizes(c, act="silu", tied=c.flag("tie_embedding", True), hidden=_hidden(c))
    full = llama_attention(c, s, rope=rope(c, s.head_dim, theta=1e6), qk_norm=QKNorm(s.norm, "head"))
    conv = ShortConv(s.width, c.int("conv_L_cache", 3), c.flag("conv_bias", False))
    attends = c.items("full_attn_idxs", default=list(range(s.layers)))
    usual = ["full_attention" if i in attends else "conv" for i in range(s.layers)]
    mixers = {"full_attention": full, "conv": conv}
    kinds = c.items("layer_types", s.layers, usual)
    for unknown in sorted({str(kind) for kind in kinds} - mixers.keys()):
        c.problem(f"layer_types has {unknown!r}; jaxllm knows 'full_attention' and 'conv' here")
    return decoder(c, s, lambda i: Block(mixers[kinds[i]], dense(s), s.norm))


def _hidden(c: Fields) -> int:
    """Two thirds of the size given, scaled, and rounded up to a multiple."""
    size = c.int("block_ff_dim|intermediate_size")
    scale, multiple = c.number("block_ffn_dim_multiplier", 1.0), c.int("block_multiple_of", 256)
    if not c.flag("block_auto_adjust_ff_dim", True):
        return size
    return -(-int(scale * int(2 * size / 3)) // multiple) * multiple


RULES = (
    Rule(r"model\.embedding_norm", "norm"),
    *ENDS,
    *(
        Rule(L + name, r"layers.\1." + path, *split)
        for name, path, *split in (
            (r"self_attn\.([qkv])_proj", r"mixer.\2"),
            (r"self_attn\.out_proj", "mixer.o"),
            (r"self_attn\.([qk])_layernorm", r"mixer.\2_norm"),
            (r"conv\.(in|out)_proj", r"mixer.\2"),
            (r"conv\.conv", "mixer", depthwise),
            (r"feed_forward\.w1", "ffn.gate"),
            (r"feed_forward\.w2", "ffn.down"),
            (r"feed_forward\.w3", "ffn.up"),
            (r"operator_norm", "mixer.pre"),
            (r"ffn_norm", "ffn.pre"),
        )
    ),
)

FAMILIES = {
    "lfm2": Family(lfm2, RULES),
}
