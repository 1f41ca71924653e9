"""DeepSeek and those that share its router, with latent attention or with the usual one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxllm.config import MLA, Attention, Block, ModelConfig, MoE, Norm, QKNorm
from jaxllm.families.base import Family, Predictor, Rule, Sizes, decoder, dense, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import latent_kv
from jaxllm.families.llama import llama_attention
from jaxllm.families.moe import experts
from jaxllm.families.names import LLAMA, MOE, L
from jaxllm.families.rope import mscale, parameters, rope


def deepseek_v2(c: Fields) -> ModelConfig:
    c.expect("scoring_func", "softmax")
    c.expect("norm_topk_prob", False)
    c.expect("mlp_bias", False)
    limited = c.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    s = _sizes(c)
    c.skip("n_group|topk_group")
    moe = experts(c, s, **_shared(c), groups=_groups(c) if limited else None)
    return _stack(c, s, _latent(c, s), moe)


def deepseek_v3(c: Fields) -> ModelConfig:
    c.expect("scoring_func", "sigmoid")
    c.expect("topk_method", "noaux_tc")
    c.expect("rope_interleave", True)
    s = _sizes(c)
    return _stack(c, s, _latent(c, s), _corrected(c, s))


def glm4_moe(c: Fields) -> ModelConfig:
    s = sizes(c)
    qk_norm = QKNorm(s.norm, "head") if c.flag("use_qk_norm", False) else None
    turned = rope(c, s.head_dim, partial=0.5)
    mixer = llama_attention(c, s, rope=turned, out_bias=False, qk_norm=qk_norm)
    return _stack(c, s, mixer, _corrected(c, s))


def _sizes(c: Fields) -> Sizes:
    c.skip("qk_head_dim")
    return sizes(c, head_dim=c.int("qk_nope_head_dim") + c.int("qk_rope_head_dim"))


def _latent(c: Fields, s: Sizes) -> MLA:
    """Multi-head latent attention; yarn raises the scale of the scores by mscale_all_dim, squared."""
    scale, r = s.head_dim**-0.5, parameters(c)
    if r.get("mscale_all_dim") and r.get("factor"):
        scale *= mscale(r["factor"], r["mscale_all_dim"]) ** 2
    return MLA(
        heads=s.heads,
        nope_dim=c.int("qk_nope_head_dim"),
        v_dim=c.int("v_head_dim"),
        kv_rank=c.int("kv_lora_rank"),
        q_rank=c.int("q_lora_rank", None),
        rope=rope(c, c.int("qk_rope_head_dim")),
        scale=scale,
        norm=Norm("rms", 1e-6),  # whatever rms_norm_eps says of the others
        bias=c.flag("attention_bias", False),
    )


def _shared(c: Fields) -> dict[str, Any]:
    """The experts every token visits, as one, and the factor of the routed ones."""
    shared = int(c.number("n_shared_experts", 0)) * c.int("moe_intermediate_size")
    return dict(shared=shared, scale=c.number("routed_scaling_factor", 1.0))


def _groups(c: Fields) -> tuple[int, int] | None:
    count, kept = c.int("n_group", 1), c.int("topk_group", 1)
    if kept > count or c.int("n_routed_experts") % count:
        c.problem(f"n_group={count} with topk_group={kept} does not divide the experts into groups to choose from")
    return (count, kept) if 1 <= kept < count else None


def _corrected(c: Fields, s: Sizes) -> MoE:
    """Sigmoid scores, chosen with a correction within the best groups (arXiv 2412.19437)."""
    renorm = c.flag("norm_topk_prob", True)
    return experts(c, s, **_shared(c), score="sigmoid", correction=True, renorm=renorm, groups=_groups(c))


def _stack(c: Fields, s: Sizes, mixer: MLA | Attention, moe: MoE) -> ModelConfig:
    """The first layers dense, then every moe_layer_freq-th sparse."""
    c.skip("num_nextn_predict_layers|num_mtp_layers")
    first, every = c.number("first_k_dense_replace", 0), c.int("moe_layer_freq", 1)
    sparse: Callable[[int], bool] = lambda i: i >= first and i % every == 0
    return decoder(c, s, lambda i: Block(mixer, moe if sparse(i) else dense(s), s.norm))


SPARSE = (*MOE, *LLAMA)
LATENT = (
    Rule(L + r"self_attn\.q_a_proj", r"layers.\1.mixer.q_a"),
    Rule(L + r"self_attn\.q_b_proj", r"layers.\1.mixer.q"),
    Rule(L + r"self_attn\.q_a_layernorm", r"layers.\1.mixer.q_norm"),
    Rule(L + r"self_attn\.kv_a_proj_with_mqa", r"layers.\1.mixer.kv_a"),
    Rule(L + r"self_attn\.kv_a_layernorm", r"layers.\1.mixer.kv_norm"),
    Rule(L + r"self_attn\.kv_b_proj", r"layers.\1.mixer", latent_kv),
    *SPARSE,
)
PREDICTED = r"model\.layers\.(\d+)\..*"  # layers past the last predict further tokens

_NEXT = r"model\.layers\.{n}\."
PREDICTOR = Predictor(
    pattern=_NEXT + ".*",
    prefix=_NEXT,
    rules=(
        Rule(L + "enorm", "embed_norm"),
        Rule(L + "hnorm", "feature_norm"),
        Rule(L + "eh_proj", "join"),
        Rule(L + r"shared_head\.norm", "norm"),
    ),
    shares=(r".*\.embed_tokens\.weight", r".*\.shared_head\.head\.weight"),
)

FAMILIES = {
    "deepseek_v2": Family(deepseek_v2, LATENT, interleaved=True),
    "deepseek_v3": Family(deepseek_v3, LATENT, interleaved=True, past_last=PREDICTED, predictor=PREDICTOR),
    "kimi_k2": Family(deepseek_v3, LATENT, interleaved=True, past_last=PREDICTED, predictor=PREDICTOR),
    "glm4_moe": Family(glm4_moe, SPARSE, past_last=PREDICTED, predictor=PREDICTOR._replace(carried=True)),
}
