"""Rotary scaling schemes as frequency tables.

Sources: linear (kaiokendev), dynamic NTK (bloc97), yarn (arXiv 2309.00071), longrope (2402.13753), llama3
(Llama 3.1 model card), as transformers' modeling_rope_utils defines their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.config import Rope
from jaxllm.families.fields import Fields, shown

WIDEST = 2**16  # rotated dims of a head: no model has more, and the table is a Python tuple
Table = tuple[np.ndarray, float]  # inverse frequencies, amplitude


def rope(
    c: Fields,
    head_dim: int,
    *,
    kind: str | None = None,
    theta: float = 10000.0,
    partial: float = 1.0,
    fraction: float | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Rope:
    """The rotary table of a config, from `rope_parameters` or from `rope_scaling` and `rope_theta`.

    kind picks one layer type's parameters where a config has several; theta and partial are what a config
    without them means; fraction overrides the rotated part; usual are the
    parameters of a config that has none.
    """
    r = parameters(c, kind) or dict(usual or {})
    base = _number(c, r, "rope_theta", c.number("rope_theta|rotary_emb_base|rotary_base", theta))
    partial = c.number("partial_rotary_factor|rotary_pct|rope_pct", partial)
    partial = _number(c, r, "partial_rotary_factor", partial)
    dim = int(head_dim * (partial if fraction is None else fraction))
    dim -= dim % 2
    if not 2 <= dim <= WIDEST or base <= 0:
        c.problem(f"rotary embeddings of {dim} dimensions with base {base} make no sense")
        return Rope((1.0,))
    name = str(r.get("rope_type", r.get("type", "default")))
    if name not in SCHEMES:
        c.problem(f"rope type {shown(name)} is not known; jaxllm has {', '.join(SCHEMES)}")
        return Rope((1.0,))
    return _checked(c, lambda: SCHEMES[name](c, r, base, dim), r)


def _checked(c: Fields, table: Callable[[], Table], given: Any) -> Rope:
    with np.errstate(all="ignore"):  # what comes out is told as a problem, not warned of
        freq, amplitude = table()
    if not np.isfinite([*freq, amplitude]).all():
        c.problem(f"the rotary parameters {shown(given)} give frequencies that are not finite")
    return Rope(tuple(float(f) for f in freq), float(amplitude))


def ropes(c: Fields, head_dim: int, *, theta: float, local: str, local_theta: float) -> dict[str, Rope]:
    """The tables of full and of sliding layers, where these differ.

    Older configs say `rope_theta` and `rope_scaling` for the full ones, and a plain base in the field `local`.
    """
    if c.table("rope_parameters", None) is None:
        base = c.number(local, local_theta)
        near = _checked(c, lambda: _default(c, {}, base, head_dim), {local: base})
        far = rope(c, head_dim, theta=theta)
    else:
        near = rope(c, head_dim, kind="sliding_attention", theta=local_theta)
        far = rope(c, head_dim, kind="full_attention", theta=theta)
    return {"sliding_attention": near, "full_attention": far}


def parameters(c: Fields, kind: str | None = None) -> dict:
    """The scaling parameters of the config in either spelling; those of layer type `kind` where they differ."""
    old = c.table("rope_scaling", {})
    r = c.table("rope_parameters", None)
    r = old if r is None else r
    if kind is not None and isinstance(r.get(kind), dict):
        return r[kind]
    return r


def _number(c: Fields, r: dict, name: str, default: float | None = None) -> float:
    value = r.get(name)
    value = default if value is None else value
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
        return value
    c.problem(f"rope parameter {name} should be a number, got {shown(value)}")
    return 1.0


def _frequencies(base: float, dim: int) -> np.ndarray:
    if dim > WIDEST:
        raise ValueError(f"{dim} rotary dimensions are more than any head has")
    return 1.0 / base ** (np.arange(0, dim, 2) / dim)


def _default(c: Fields, r: dict, base: float, dim: int) -> Table:
    return _frequencies(base, dim), 1.0


def _linear(c: Fields, r: dict, base: float, dim: int) -> Table:
    return _frequencies(base, dim) / _number(c, r, "factor"), 1.0


def _dynamic(c: Fields, r: dict, base: float, dim: int) -> Table:
    """NTK-aware base, for the context asked for: within the original length it is the default table.

    The original recomputes the table as a sequence grows, which leaves cached keys rotated by an older one;
    here the context is chosen once, when the model is loaded.
    """
    if r.get("alpha"):  # a fixed base, no growth
        return _frequencies(base * _number(c, r, "alpha") ** (dim / max(dim - 2, 1)), dim), 1.0
    original = _original(c, r)
    length = max(c.context or original, original)
    factor = _number(c, r, "factor", 1.0)
    grown = base * (factor * length / original - (factor - 1)) ** (dim / max(dim - 2, 1))
    return _frequencies(grown, dim), 1.0


def _llama3(c: Fields, r: dict, base: float, dim: int) -> Table:
    factor, low, high = (_number(c, r, n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    old = _original(c, r)
    freq = _frequencies(base, dim)
    wave = 2 * np.pi / freq
    smooth = (old / wave - low) / max(high - low, 1e-9)
    between = (1 - smooth) * freq / factor + smooth * freq
    return np.where(wave > old / low, freq / factor, np.where(wave < old / high, freq, between)), 1.0


def _yarn(c: Fields, r: dict, base: float, dim: int) -> Table:
    old = _original(c, r)
    factor = _number(c, r, "factor", c.int("max_position_embeddings", old) / old)

    def turns(rotations: float) -> float:  # the dimension that turns so often over the original length
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns(_number(c, r, "beta_fast", 32)), turns(_number(c, r, "beta_slow", 1))
    if r.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    freq = _frequencies(base, dim)
    return freq / factor * ramp + freq * (1 - ramp), _yarn_amplitude(c, r, factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Yarn's growth of the attention logits with the scaling factor."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_amplitude(c: Fields, r: dict, factor: float) -> float:
    if r.get("attention_factor") is not None:
        return _number(c, r, "attention_factor")
    if r.get("mscale") and r.get("mscale_all_dim"):
        return mscale(factor, _number(c, r, "mscale")) / mscale(factor, _number(c, r, "mscale_all_dim"))
    return mscale(factor)


def _longrope(c: Fields, r: dict, base: float, dim: int) -> Table:
    """Short factors within the original context, long ones where more was asked for when loading."""
    original = _original(c, r)
    longest = c.int("max_position_embeddings", original)
    name = "long_factor" if (c.context or original) > original else "short_factor"
    factors = r.get(name)
    if not isinstance(factors, list) or len(factors) != dim // 2:
        c.problem(f"rope parameter {name} should be a list of {dim // 2} numbers, got {str(factors)[:60]}")
        factors = [1.0] * (dim // 2)
    factor = _number(c, r, "factor", longest / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    grown = _number(c, r, name.replace("factor", "mscale"), grown)
    amplitude = _number(c, r, "attention_factor", grown)
    return _frequencies(base, dim) / np.asarray(factors, np.float64), amplitude


def _factors(c: Fields, r: dict, base: float, dim: int) -> Table:
    """Every frequency divided by its own number: what a file says that has the table and not the scheme."""
    factors = r.get("factors")
    if not isinstance(factors, list) or len(factors) != dim // 2:
        c.problem(f"rope parameter factors should be a list of {dim // 2} numbers, got {str(factors)[:60]}")
        factors = [1.0] * (dim // 2)
    return _frequencies(base, dim) / np.asarray(factors, np.float64), 1.0


def _original(c: Fields, r: dict) -> int:
    """The context the unscaled table was trained for."""
    name = "original_max_position_embeddings"
    beside = c.raw(name)  # it counts where a config says it twice
    given = {name: beside} if beside is not None else r
    return int(_number(c, given, name, c.raw("max_position_embeddings|seq_length", 2048)))


SCHEMES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "ntk": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "factors": _factors,
}


def slopes(heads: int, *, exponent: float = 8.0, scale: float = 1.0) -> tuple[float, ...]:
    """ALiBi slopes (arXiv 2108.12409), one per head; other counts than powers of two interleave the next power."""
    n = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-exponent * (i + 1) / n) for i in range(n)]
    rest = [2 ** (-exponent * (2 * i + 1) / (2 * n)) for i in range(heads - n)]
    return tuple(x * scale for x in first + rest)
