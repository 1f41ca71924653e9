"""Qwen3-Next: gated delta rule and gated attention in turn, with routed experts."""

from __future__ import annotations

from jaxllm.config import Block, DeltaNet, ModelConfig, QKNorm
from jaxllm.families.base import Family, Predictor, Rule, Sizes, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import delta_ba, delta_qkvz, depthwise, gated_query
from jaxllm.families.llama import llama_attention
from jaxllm.families.moe import experts, sparse_layers
from jaxllm.families.names import LLAMA, MOE, L
from jaxllm.families.rope import rope


def qwen3_next(c: Fields) -> ModelConfig:
    s = sizes(c, head_dim=c.int("head_dim", 256))
    turned = rope(c, s.head_dim, partial=0.25)
    full = llama_attention(c, s, rope=turned, qk_norm=QKNorm(s.norm, "head"), gate=True)
    mixers = {"full_attention": full, "linear_attention": _delta_net(c, s)}
    shared = c.int("shared_expert_intermediate_size", 512)
    renorm = c.flag("norm_topk_prob", True)
    moe = experts(c, s, renorm=renorm, shared=shared, shared_gate=True)
    kinds, sparse = _kinds(c, s), sparse_layers(c, s)
    return decoder(c, s, lambda i: Block(mixers[kinds[i]], moe if sparse[i] else dense(s), s.norm))


def _delta_net(c: Fields, s: Sizes) -> DeltaNet:
    k_heads, v_heads = c.int("linear_num_key_heads", 16), c.int("linear_num_value_heads", 32)
    if v_heads % k_heads:
        c.problem(f"{v_heads} value heads cannot share {k_heads} key heads evenly")
    return DeltaNet(
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=c.int("linear_key_head_dim", 128),
        v_dim=c.int("linear_value_head_dim", 128),
        kernel=c.int("linear_conv_kernel_dim", 4),
        norm=s.norm,
    )


def _kinds(c: Fields, s: Sizes) -> list[str]:
    every = c.int("full_attention_interval", 4)
    usual = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(s.layers)]
    kinds = c.items("layer_types", s.layers, usual)
    for unknown in sorted({str(kind) for kind in kinds} - set(usual) - {"full_attention", "linear_attention"}):
        c.problem(f"layer_types has {unknown!r}; jaxllm knows 'full_attention' and 'linear_attention' here")
    return kinds


RULES = (
    Rule(L + r"linear_attn\.in_proj_qkvz", r"layers.\1.mixer", delta_qkvz),
    Rule(L + r"linear_attn\.in_proj_ba", r"layers.\1.mixer", delta_ba),
    Rule(L + r"linear_attn\.conv1d", r"layers.\1.mixer", depthwise),
    Rule(L + r"linear_attn\.out_proj", r"layers.\1.mixer.out"),
    Rule(L + r"linear_attn\.norm", r"layers.\1.mixer.norm"),
    Rule(L + r"linear_attn\.A_log", r"layers.\1.mixer.a_log"),
    Rule(L + r"linear_attn\.dt_bias", r"layers.\1.mixer.dt_bias"),
    Rule(L + r"self_attn\.q_proj", r"layers.\1.mixer", gated_query),
    *MOE,
    *LLAMA,
)
# Every norm but the delta rule's own.
ONE_PLUS = r"((embed_|feature_)?norm|.*\.(pre|q_norm|k_norm))\.w"

PREDICTOR = Predictor(
    pattern=r"mtp\..*",
    prefix=r"mtp\.layers\.0\.",
    rules=(
        Rule(r"mtp\.pre_fc_norm_embedding", "embed_norm"),
        Rule(r"mtp\.pre_fc_norm_hidden", "feature_norm"),
        Rule(r"mtp\.fc", "join"),
        Rule(r"mtp\.norm", "norm"),
    ),
    carried=True,
)

FAMILIES = {
    "qwen3_next": Family(qwen3_next, RULES, one_plus=ONE_PLUS, skip=(r"mtp\..*",), predictor=PREDICTOR),
}
