"""Products with packed weights by the native kernels: which formats they know, and the call."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import native
from jaxllm.native import float8
from jaxllm.quant import QTensor
from jaxllm.quant.formats import FLOAT8, LEVELS, Format

Array = jax.Array

NUMBERS = ("float32", "bfloat16", "float16", "uint8", "int8", "float8_e8m0fnu", "float8_e4m3fn")
BLOCK = 16  # columns that the kernels take together, or twice as many, as in packed.h
NIBBLES, TABLE, BYTES, SIGNED, FIELDS = range(5)  # as in packed.h
MOST = 2047  # of a level in a table: 32 times it times an activation of 16 bits is a whole number of 32 bits
WHOLE = {"e2m1": 2, "iq4": 1}  # what levels are multiplied by to be whole numbers; others take two tables


def refuses_format(f: Format) -> str | None:
    """Why no weight in a format is taken; None where those that `encode` makes are."""
    if f.levels in FLOAT8:
        return float8.refuses_format(f)
    if f.activations:
        return f"{f.name} rounds activations in its own way"
    if f.levels != "int" and (f.bits != 4 or f.levels not in LEVELS):
        return f"it has whole numbers and tables of 16 levels, not the {f.levels} of {f.name}"
    if f.center > 2**f.bits:
        return f"its sums are of codes near their center, and that of {f.name} is {f.center}"
    if f.group is not None and f.group % BLOCK:
        return f"it takes groups of a multiple of {BLOCK} columns, not {f.group}"
    return native.unavailable()


def refuses(x: Array, q: QTensor) -> str | None:
    """Why `matmul` does not take x [m, in] and q [out, in] (`grouped`: [experts, out, in]); None where it does."""
    if q.format.levels in FLOAT8:
        return float8.refuses(x, q)
    if x.dtype not in native.FLOATS:
        return f"it takes float32, bfloat16 and float16 activations, not {x.dtype}"
    return refuses_format(q.format) or _refuses_numbers(q)


def _refuses_numbers(q: QTensor) -> str | None:
    parts = {name: part for name, part in q.row_parts().items() if name not in ("codes", "high")}
    if other := [f"{name} of {part.dtype}" for name, part in parts.items() if str(part.dtype) not in NUMBERS]:
        return f"it does not read {other[0]}"
    if uneven := [name for name in ("zero", "offset") if name in parts and parts[name].shape != q.scale.shape]:
        return f"{uneven[0]} has other groups than scale"
    if q.scale.shape[-1] > 1 and q.columns_per_scale % BLOCK:
        return f"it takes groups of a multiple of {BLOCK} columns, not {q.columns_per_scale}"
    return None


def matmul(x: Array, q: QTensor, out: jnp.dtype, *, most: str | None = None, threads: int | None = None) -> Array:
    """x [m, in] times q [out, in] transposed -> [m, out] in `out`. q has no order: it is x's columns by then.

    Activations of 16 bits are rounded in blocks of 32 or 16: to 8 bits beside codes that are bytes or less (by at
    most 1/254 of the largest in the block), to 16 beside levels such as nf4's (2^-15). Those of float32 are not.
    Products are summed exactly, scaled and added in f32 from left to right: a row's bits depend neither on other
    rows nor on the threads. A block with an activation that is not finite makes NaN.
    most: the highest of native.LEVELS to use. float8 goes to `float8.matmul`.
    """
    if q.format.levels in FLOAT8:
        return float8.matmul(x, q, out, most=most, threads=threads)
    return _call(x, jnp.zeros(0, jnp.int32), jax.tree.map(lambda part: part[None], q), out, most, threads)


def grouped(x: Array, q: QTensor, expert: Array, *, most: str | None = None, threads: int | None = None) -> Array:
    """Row i of x [m, in] times expert[i] of q [experts, out, in] -> f32 [m, out]; otherwise as `matmul`.

    Neighbours with the same expert, i32 [m], are multiplied together.
    """
    if q.format.levels in FLOAT8:
        return float8.grouped(x, q, expert, most=most, threads=threads)
    return _call(x, expert.astype(jnp.int32), q, jnp.float32, most, threads)


def refuses_gated(x: Array, gate: QTensor, up: QTensor, act: str) -> str | None:
    """Why `gated` does not take these; None where it does."""
    if act not in native.ACTIVATIONS:
        return f"it knows {' and '.join(native.ACTIVATIONS)}, not {act}"
    if gate.order is not None or up.order is not None:
        return "columns are in another order"
    if jax.tree.map(lambda part: (part.shape, part.dtype), gate) != jax.tree.map(
        lambda part: (part.shape, part.dtype), up
    ):
        return f"gate and up differ: {gate} and {up}"
    if gate.format.levels not in ("int", *WHOLE, *FLOAT8):
        return f"{gate.format.name} takes two tables"
    return refuses(x, gate)


def gated(
    x: Array, gate: QTensor, up: QTensor, *, act: str, most: str | None = None, threads: int | None = None
) -> Array:
    """act(x gate) * (x up) of x [m, in] and gate, up [out, in] of one format -> [m, out] as x, rounded once."""
    if gate.format.levels in FLOAT8:
        return float8.gated(x, gate, up, act=act, most=most, threads=threads)
    shape = jax.ShapeDtypeStruct((x.shape[0], gate.codes.shape[0]), x.dtype)
    call = jax.ffi.ffi_call("jaxllm_packed_gated", shape, vmap_method="sequential")
    ((factor, table),) = _tables(gate)
    how = _codes(gate) | native.how(most, threads) | dict(activation=np.int64(native.ACTIVATIONS.index(act)))
    parts = [part[None] if part.size else part for q in (gate, up) for part in _parts(q)]
    return call(x, *parts, **how, factor=factor, table=table)


def refuses_several(x: Array, weights: Sequence[QTensor]) -> str | None:
    """Why `several` does not take these; None where it does."""
    first, *others = weights
    if any(q.order is not None for q in weights):
        return "columns are in another order"
    alike = lambda q: (q.format, [(n, part.shape[1:], part.dtype) for n, part in q.row_parts().items()])
    if any(alike(q) != alike(first) for q in others):
        return f"the weights differ in more than their rows: {', '.join(map(repr, weights))}"
    if first.format.levels not in ("int", *WHOLE):
        return f"{first.format.name} takes two tables, or a kernel of its own"
    return refuses(x, first)


def several(
    x: Array, weights: Sequence[QTensor], out: jnp.dtype, *, most: str | None = None, threads: int | None = None
) -> list[Array]:
    """`matmul` of x [m, in] by each of the weights [out, in] in one call: x is rounded once, threads meet once."""
    first = weights[0]
    made = out if out in native.FLOATS else jnp.float32
    shapes = [jax.ShapeDtypeStruct((x.shape[0], q.codes.shape[0]), made) for q in weights]
    call = jax.ffi.ffi_call("jaxllm_packed_several", shapes, vmap_method="sequential")
    ((factor, table),) = _tables(first)
    parts = [part[None] if part.size else part for q in weights for part in _parts(q)]
    ys = call(x, *parts, **_codes(first), **native.how(most, threads), factor=factor, table=table)
    return [y.astype(out) for y in ys]


def _call(x: Array, expert: Array, q: QTensor, out: jnp.dtype, most: str | None, threads: int | None) -> Array:
    tables = _tables(q)
    made = out if out in native.FLOATS and len(tables) == 1 else jnp.float32
    shape = jax.ShapeDtypeStruct((x.shape[0], q.codes.shape[1]), made)
    call = jax.ffi.ffi_call("jaxllm_packed", shape, vmap_method="sequential")
    how = _codes(q) | native.how(most, threads)
    y = [call(x, expert, *_parts(q), **how, factor=factor, table=table) for factor, table in tables]
    return sum(y[1:], start=y[0]).astype(out)


def _parts(q: QTensor) -> list[Array]:
    none = jnp.zeros(0, jnp.float32)
    names = ("codes", "high", "scale", "super_scale", "zero", "offset", "super_offset")
    return [none if getattr(q, name) is None else getattr(q, name) for name in names]


def _codes(q: QTensor) -> dict[str, np.int64]:
    """How the kernel reads the codes, as its arguments."""
    kind, center = NIBBLES, q.format.center
    if q.format.levels != "int":
        kind, center = TABLE, 0
    elif q.format.bits == 8:
        signed = q.codes.dtype == jnp.int8
        kind, center = (SIGNED, center + 128) if signed else (BYTES, center)
    elif q.format.bits != 4:
        kind = FIELDS
    group = q.columns_per_scale if q.scale.shape[-1] > 1 else -(-q.columns // 32) * 32
    numbers = dict(kind=kind, center=center, bits=q.format.bits, group=group)
    return {name: np.int64(value) for name, value in numbers.items()}


def _tables(q: QTensor) -> list[tuple[np.float32, np.ndarray]]:
    """The levels as whole numbers [16] and the factor that goes with them: their sum is that of all products."""
    name = q.format.levels
    if name == "int":
        return [(np.float32(1), np.zeros(16, np.int64))]
    levels = np.array(LEVELS[name], np.float64)
    whole = WHOLE.get(name) or MOST / np.abs(levels).max()
    upper = np.round(levels * whole)
    found = [(np.float32(1 / whole), upper.astype(np.int64))]
    if name not in WHOLE:
        factor = np.float32(1 / whole / (2 * MOST))
        found.append((factor, np.round((levels - upper * np.float64(found[0][0])) / factor).astype(np.int64)))
    return found
