"""Plain rounding: one matrix into any format of the table. numpy only, on all cores, a block of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.quant.formats import FLOAT8, LEVELS, UNQUANTIZED, Format
from jaxllm.quant.qtensor import QTensor, pack

CHUNK = 2**19  # values that one thread works on at a time: 2 MB in f32, and a few temporaries of that size
FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SCALES = FLOATS | {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
EVEN_TIES = ("e2m1", "e2m3", "e3m2")  # floats: between two neighbours the one with the even mantissa
TINY = np.float32(2.0**-126)  # the least normal f32

Parts = dict[str, np.ndarray]


def encode(w: np.ndarray, format: Format) -> QTensor:
    """The weight w [.., N, K] (a float dtype) rounded to `format`; the parts of the result are numpy arrays.

    Values are first converted to the format's own dtype, where it has one. Codes are made with the scales as
    they are stored, so that rounding of the scales costs no accuracy twice. Formats with `high` = 2 `center`
    follow MLC-LLM bit by bit, infinities included; the others refuse what is not finite.

    Raises ConfigError for a format that plain rounding does not make, CheckpointError for a weight that is no
    matrix of finite floats.
    """
    w = _checked(w, format)
    N, K = w.shape[-2:]
    matrices = w.reshape(-1, N, K)
    jobs = [(m, rows) for m in range(len(matrices)) for rows in _row_blocks(N, K, format)]
    with ThreadPoolExecutor(_cores()) as pool:
        whole = _statistics(pool, matrices, jobs, format)
        made = pool.map(lambda job: (job, _rows(matrices[job[0], job[1]], format, whole[job[0]])), jobs)
        parts = _collected(made, len(matrices), N)
    parts = {name: part.reshape(*w.shape[:-2], *part.shape[1:]) for name, part in parts.items()}
    dtype = format.dtype or (w.dtype.name if w.dtype.name in FLOATS else "float32")
    return QTensor(**parts, format=format, columns=K, dtype_name=dtype)


def _checked(w: np.ndarray, f: Format) -> np.ndarray:
    if f.name in UNQUANTIZED or f.levels in FLOATS:
        raise ConfigError(f"{f.name} stores plain values; convert the array's dtype instead of encoding it")
    if f.scale not in SCALES:
        raise ConfigError(f"{f.name}: scales of dtype {f.scale!r} are only read, never made")
    w = np.asarray(w)
    if w.ndim < 2 or not w.size or not (np.issubdtype(w.dtype, np.floating) or w.dtype == FLOATS["bfloat16"]):
        raise CheckpointError(f"a weight [.., out, in] of floats was expected, got {w.dtype} {list(w.shape)}")
    return w


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _row_blocks(N: int, K: int, f: Format) -> Iterator[slice]:
    """Whole rows of about CHUNK values; rows that share a scale stay together."""
    unit = f.rows or 1
    size = max(1, CHUNK // K // unit) * unit
    return (slice(i, min(i + size, N)) for i in range(0, N, size))


def _statistics(pool, matrices: np.ndarray, jobs: list, f: Format) -> list[np.float32 | None]:
    """What the scale of a whole matrix comes from: its largest magnitude, for ternary codes its mean magnitude."""
    if f.rows is not None and not f.global_scale:
        return [None] * len(matrices)
    mean = f.levels == "int"

    def one(job):
        x = np.abs(_values(matrices[job[0], job[1]], f))
        return x.sum(dtype=np.float64) if mean else x.max()

    found: list[list] = [[] for _ in matrices]
    for job, value in zip(jobs, pool.map(one, jobs), strict=True):
        found[job[0]].append(value)
    if mean:
        return [np.float32(sum(values) / matrices[0].size) for values in found]
    return [np.float32(max(values)) for values in found]


def _collected(made: Iterator, matrices: int, N: int) -> Parts:
    """The parts [matrices, N, ..] from those of blocks of rows."""
    parts: Parts = {}
    for (m, rows), block in made:
        if not parts:
            parts = {name: np.empty((matrices, N, *x.shape[1:]), x.dtype) for name, x in block.items()}
        for name, x in block.items():
            parts[name][m, rows] = x
    return parts


def _values(x: np.ndarray, f: Format) -> np.ndarray:
    """x in f32, rounded to the format's dtype on the way."""
    x = x.astype(FLOATS[f.dtype]) if f.dtype and f.dtype != x.dtype.name else x
    return x.astype(np.float32)


def _rows(x: np.ndarray, f: Format, whole: np.float32 | None) -> Parts:
    """The parts of rows x [n, K]."""
    n, K = x.shape
    x = _values(x, f)
    if not _is_offset(f) and not np.isfinite(x).all():
        raise CheckpointError("the weight holds infinite values or NaN; get the checkpoint again")
    group = f.group or (K if f.bits == 8 else -(-K // 8) * 8)  # codes of few bits fill whole bytes
    G = -(-K // group)
    x = np.pad(x, ((0, 0), (0, G * group - K))) if G * group > K else x
    with np.errstate(all="ignore"):
        parts = _maker(f)(x.reshape(n, G, group), f, whole)
    codes = parts["codes"].reshape(n, G * group)
    codes[:, K:] = 0
    low, high = pack(codes, f.bits) if f.bits < 8 else (codes, None)
    return parts | {"codes": low} | ({} if high is None else {"high": high})


Maker = Callable[[np.ndarray, Format, "np.float32 | None"], Parts]


def _is_offset(f: Format) -> bool:
    return f.levels == "int" and f.zero is None and f.rows == 1 and f.center > 0 and f.high == 2 * f.center


def _maker(f: Format) -> Maker:
    """How groups x f32 [n, G, group] become codes of that shape and scales [n, G]."""
    if f.levels != "int":
        return _two_level if f.global_scale else _power_of_two if f.power else _floats
    if f.zero is not None:
        return _asymmetric
    if f.rows is None:
        return _ternary
    if _is_offset(f):
        return _offset
    return _extreme if f.center else _signed


def rounded(
    x: np.ndarray,
    f: Format,
    scale: np.ndarray,
    *,
    zero: np.ndarray | None = None,
    offset: np.ndarray | None = None,
) -> np.ndarray:
    """The codes of x f32 [n, G, group] on a given grid: scales, and zeros (in codes) or offsets, all [n, G]."""
    if _is_offset(f):
        near = (lambda y: y.astype(np.float16).astype(np.float32)) if f.dtype == "float16" else lambda y: y
        return _integers(near(near(x / scale.astype(np.float32)[..., None]) + np.float32(f.center)), f)
    y = _over(x if offset is None else x - offset.astype(np.float32)[..., None], scale)
    if f.levels != "int":
        return _nearest(y, f)
    return _integers(y + (np.float32(f.center) if zero is None else zero[..., None]), f)


# ---- integers -------------------------------------------------------------------------------------------


def _round(x: np.ndarray, f: Format) -> np.ndarray:
    """To whole numbers; halves to even ones, or away from zero."""
    if f.rounding == "even":
        return np.rint(x)
    whole = np.trunc(x)
    return whole + np.sign(x) * (np.abs(x - whole) >= 0.5)


def _integers(x: np.ndarray, f: Format) -> np.ndarray:
    """Rounded and clipped; what is no number becomes 0."""
    codes = np.clip(_round(x, f), f.low, f.high)
    return np.nan_to_num(codes, copy=False, nan=0).astype(np.int8 if f.low < 0 else np.uint8)


def _stored(scale: np.ndarray, f: Format) -> np.ndarray:
    """A scale in its own dtype, finite."""
    kind = SCALES[f.scale]
    most = float(ml_dtypes.finfo(kind).max)
    return np.clip(scale, -most, most).astype(kind)


def _over(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x [n, G, group] over scales [n, G]; 0 where the scale is 0."""
    scale = scale.astype(np.float32)[..., None]
    return np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)


def _offset(x: np.ndarray, f: Format, whole) -> Parts:
    """MLC-LLM's group quantization: code = round(w / scale + m), scale = max|w| / m, m the zero's code.

    In f16 every operation rounds to f16; in bf16 only the scale does. A group of zeros has codes 0.
    """
    scale = (np.abs(x).max(-1) / np.float32(f.center)).astype(SCALES[f.scale])
    return {"codes": rounded(x, f, scale), "scale": scale}


def _signed(x: np.ndarray, f: Format, whole) -> Parts:
    """The largest magnitude at the largest code."""
    scale = _stored(_most(x, f) / np.float32(f.high), f)
    return {"codes": rounded(x, f, scale), "scale": scale}


def _extreme(x: np.ndarray, f: Format, whole) -> Parts:
    """The largest magnitude at code 0, whatever its sign, so that all codes serve (as llama.cpp has it).

    There is one code less on the other side: a group whose other end is nearly as far out is clipped there. Where
    the squared error is less with the largest magnitude at code 1, which gives both sides the same, it is there.
    """
    at = np.abs(x).argmax(-1, keepdims=True)
    extreme = np.take_along_axis(x, at, -1)[..., 0]
    wide, even = (_about(x, _stored(extreme / np.float32(f.low - f.center + i), f), f) for i in (0, 1))
    better = even[2] < wide[2]
    codes = np.where(better[..., None], even[0], wide[0])
    return {"codes": codes, "scale": np.where(better, even[1], wide[1])}


def _about(x: np.ndarray, scale: np.ndarray, f: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale, squared error of each group) with the zero at the format's center."""
    codes = _integers(_over(x, scale) + np.float32(f.center), f)
    near = (codes.astype(np.float32) - np.float32(f.center)) * scale.astype(np.float32)[..., None]
    return codes, scale, np.square(near - x, out=near).sum(-1)


def _asymmetric(x: np.ndarray, f: Format, whole) -> Parts:
    """The range of the group, zero included, over all codes; zeros are whole codes, or offsets values."""
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    scale = _stored((high - low) / np.float32(f.high), f)
    if f.zero == "value":
        offset = _stored(low, f)
        return {"codes": rounded(x, f, scale, offset=offset), "scale": scale, "offset": offset}
    zero = _integers(_over(-low[..., None], scale)[..., 0], f)
    return {"codes": rounded(x, f, scale, zero=zero), "scale": scale, "zero": zero}


def _ternary(x: np.ndarray, f: Format, whole: np.float32) -> Parts:
    """-1, 0 or 1 times the mean magnitude of the matrix (BitNet b1.58, arXiv 2402.17764, equations 1 to 3)."""
    scale = _stored(np.full(x.shape[:2], whole), f)
    return {"codes": rounded(x, f, scale), "scale": scale}


# ---- floats ---------------------------------------------------------------------------------------------


def _most(x: np.ndarray, f: Format) -> np.ndarray:
    """The largest magnitude [n, G] of each group, or of the block of rows it is in."""
    most = np.abs(x).max(-1)
    if f.rows in (1, None):
        return most
    blocks = np.maximum.reduceat(most, np.arange(0, len(most), f.rows), 0)
    return np.repeat(blocks, f.rows, 0)[: len(most)]


def top(f: Format) -> float:
    """The largest level of a float format."""
    return float(ml_dtypes.finfo(SCALES[f.levels]).max) if f.levels in FLOAT8 else max(LEVELS[f.levels])


def _floats(x: np.ndarray, f: Format, whole: np.float32 | None) -> Parts:
    """The largest magnitude at the largest level; each value at the nearest one."""
    most = _most(x, f) if whole is None else np.full(x.shape[:2], whole)
    scale = _stored(most / np.float32(top(f)), f)
    return {"codes": rounded(x, f, scale), "scale": scale}


def _power_of_two(x: np.ndarray, f: Format, whole) -> Parts:
    """OCP Microscaling Formats 1.0, section 6.3: 2**(exponent of the largest magnitude - that of the type)."""
    most = np.abs(x).max(-1)
    exponent = np.frexp(most)[1] - np.frexp(np.float32(top(f)))[1]
    exponent = np.clip(np.where(most > 0, exponent, -127), -127, 127)
    scale = (exponent + 127).astype(np.uint8).view(SCALES[f.scale])
    return {"codes": _nearest(np.ldexp(x, -exponent[..., None]), f), "scale": scale}


def _two_level(x: np.ndarray, f: Format, whole: np.float32) -> Parts:
    """NVFP4: scales of groups in e4m3, over one f32 scale that puts the largest of them at e4m3's largest."""
    above = np.float32(whole / (top(f) * float(ml_dtypes.finfo(SCALES[f.scale]).max)))
    above = np.maximum(above, TINY)
    scale = _stored(np.abs(x).max(-1) / np.float32(top(f)) / above, f)
    codes = rounded(x, f, scale.astype(np.float32) * above)
    return {"codes": codes, "scale": scale, "super_scale": np.full((len(x), 1), above)}


def _nearest(x: np.ndarray, f: Format) -> np.ndarray:
    """The codes of the levels nearest to x; beyond the last one, the last."""
    if f.levels in FLOAT8:
        return np.clip(x, -top(f), top(f)).astype(SCALES[f.levels])
    codes, bounds = _bounds(f.levels)
    return codes[np.searchsorted(bounds, x)]


@lru_cache
def _bounds(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes u8 in the order of their levels, the f32 bounds between neighbours, themselves the lower one's)."""
    levels, codes = np.unique(np.array(LEVELS[name], np.float32), return_index=True)  # of two zeros the positive
    bounds = (levels[1:] + levels[:-1]) / 2
    if name in EVEN_TIES:
        upper = codes[1:] % 2 == 0
        bounds[upper] = np.nextafter(bounds[upper], np.float32(-np.inf))
    return codes.astype(np.uint8), bounds
