"""State space families: no attention, no feed-forward."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.config import Block, Mamba, Mamba2, ModelConfig
from jaxllm.families.base import Family, Rule, Sizes, decoder, sizes
from jaxllm.families.fields import Fields
from jaxllm.families.layouts import depthwise

UNBOUNDED = 2**24  # positions: a recurrent state does not grow, so nothing else limits a context


def _sizes(c: Fields, *, tied: bool) -> Sizes:
    """The sizes, with what the mixers have instead of heads and a feed-forward left to them."""
    c.expect("hidden_act", "silu")
    c.expect("rms_norm", True)
    # How the time step was initialised, and numerics and kernels that do not change the function.
    c.skip("time_step_min|time_step_max|time_step_floor|time_step_scale|time_step_init_scheme")
    c.skip("rescale_prenorm_residual|residual_in_fp32|use_mambapy|use_falcon_mambapy|use_associative_scan")
    c.skip("pad_vocab_size_multiple|ssm_cfg|n_layer|d_model|intermediate_size|chunk_size|norm_before_gate")
    return sizes(c, act="silu", tied=tied, heads=1, kv_heads=1, hidden=1, max_len=UNBOUNDED)


def _usual(c: Fields) -> dict[str, Any]:
    return dict(
        states=c.int("state_size"),
        kernel=c.int("conv_kernel", 4),
        conv_bias=c.flag("use_conv_bias", True),
        bias=c.flag("use_bias", False),
    )


def mamba(c: Fields, *, inner_eps: float | None = None) -> ModelConfig:
    s = _sizes(c, tied=True)
    rank = math.ceil(s.width / 16) if c.raw("time_step_rank", "auto") == "auto" else c.int("time_step_rank")
    inner = c.int("intermediate_size|d_inner", int(c.number("expand", 2) * s.width))
    mixer = Mamba(inner=inner, dt_rank=rank, inner_eps=inner_eps, **_usual(c))
    return decoder(c, s, Block(mixer, None, s.norm))


def falcon_mamba(c: Fields) -> ModelConfig:
    return mamba(c, inner_eps=c.number("mixer_rms_eps", 1e-6))


def mamba2(c: Fields) -> ModelConfig:
    s = _sizes(c, tied=False)
    c.skip("time_step_rank")
    heads, head_dim, groups = c.int("num_heads"), c.int("head_dim", 64), c.int("n_groups", 8)
    if heads * head_dim != int(c.number("expand", 2) * s.width) or heads % groups:
        c.problem(f"{heads} heads of {head_dim} in {groups} groups do not make up the expanded width")
    low, high = _limits(c)
    mixer = Mamba2(heads, head_dim, groups, norm=s.norm, dt_limit=(low, high), **_usual(c))
    return decoder(c, s, Block(mixer, None, s.norm))


def _limits(c: Fields) -> tuple[float, float]:
    """Bounds of the time step. JSON has no infinity, so files spell it in several ways."""
    pair = c.items("time_step_limit", 2, [0.0, math.inf])
    named = {"inf": math.inf, "Infinity": math.inf, None: math.inf}
    bounds = [named.get(b, b) if not isinstance(b, dict) else named.get(b.get("__float__"), b) for b in pair]
    if len(bounds) != 2 or not all(isinstance(b, int | float) for b in bounds):
        c.problem(f"time_step_limit should be two numbers, got {str(pair)[:60]}")
        return 0.0, math.inf
    return float(bounds[0]), float(bounds[1])


M = r"backbone\.layers\.(\d+)\."
RULES = (
    Rule(r"backbone\.embeddings?", "embed"),
    Rule(r"backbone\.norm_f", "norm"),
    Rule(r"lm_head", "head"),
    Rule(M + r"norm", r"layers.\1.mixer.pre"),
    Rule(M + r"mixer\.(in|x|dt|out)_proj", r"layers.\1.mixer.\2"),
    Rule(M + r"mixer\.norm", r"layers.\1.mixer.norm"),
    Rule(M + r"mixer\.conv1d", r"layers.\1.mixer", depthwise),
    Rule(M + r"mixer\.A_log", r"layers.\1.mixer.a_log"),
    Rule(M + r"mixer\.D", r"layers.\1.mixer.d"),
    Rule(M + r"mixer\.dt_bias", r"layers.\1.mixer.dt_bias"),
)

FAMILIES = {
    "mamba": Family(mamba, RULES),
    "mamba2": Family(mamba2, RULES),
    "falcon_mamba": Family(falcon_mamba, RULES),
}
