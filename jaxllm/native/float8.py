"""Products with weights of float8 by the native kernels: which they take, and the call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import native
from jaxllm.quant import QTensor
from jaxllm.quant.formats import Format

Array = jax.Array

SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
STEP = 32  # columns that the kernels take together
PARTS = {"codes", "scale", "order", "input_scale"}


def refuses_format(f: Format) -> str | None:
    """Why no weight in a format of float8 is taken; None where those that `encode` makes are."""
    if f.activations:
        return f"{f.name} rounds activations in its own way"
    if f.group is not None and f.group % STEP:
        return f"it takes groups of a multiple of {STEP} columns of float8, not {f.group}"
    return native.unavailable()


def refuses(x: Array, q: QTensor) -> str | None:
    """Why `matmul` does not take x [m, in] and q [out, in] (`grouped`: [experts, out, in]); None where it does."""
    if x.dtype not in native.FLOATS:
        return f"it takes float32, bfloat16 and float16 activations, not {x.dtype}"
    if more := sorted(q.parts().keys() - PARTS):
        return f"of float8 it takes codes and scales, not {more[0]}"
    if str(q.scale.dtype) not in SCALES:
        return f"it does not read scales of {q.scale.dtype}"
    if q.scale.shape[-1] > 1 and q.columns_per_scale % STEP:
        return f"it takes groups of a multiple of {STEP} columns of float8, not {q.columns_per_scale}"
    return refuses_format(q.format)


def matmul(x: Array, q: QTensor, out: jnp.dtype, *, most: str | None = None, threads: int | None = None) -> Array:
    """x [m, in] times q [out, in] transposed -> [m, out] in `out`. q has no order: it is x's columns by then.

    Codes become bf16, which is exact. bf16 is multiplied by bf16 where the processor has it (avx512, amx), else in
    f32. What the columns of a scale give is summed, multiplied by the scale and added in f32, all in an order that
    `in` and the format decide: a row's bits do not depend on the other rows, nor on the threads.
    most: the highest of native.LEVELS to use.
    """
    return _call(x, jnp.zeros(0, jnp.int32), jax.tree.map(lambda part: part[None], q), out, most, threads)


def grouped(x: Array, q: QTensor, expert: Array, *, most: str | None = None, threads: int | None = None) -> Array:
    """Row i of x [m, in] times expert[i] of q [experts, out, in] -> f32 [m, out]; otherwise as `matmul`.

    Neighbours with the same expert, i32 [m], are multiplied together.
    """
    return _call(x, expert.astype(jnp.int32), q, jnp.float32, most, threads)


def gated(
    x: Array, gate: QTensor, up: QTensor, *, act: str, most: str | None = None, threads: int | None = None
) -> Array:
    """act(x gate) * (x up) of x [m, in] and gate, up [out, in] of one format -> [m, out] as x, rounded once."""
    shape = jax.ShapeDtypeStruct((x.shape[0], gate.codes.shape[0]), x.dtype)
    call = jax.ffi.ffi_call("jaxllm_float8_gated", shape, vmap_method="sequential")
    how = native.how(most, threads) | dict(activation=np.int64(native.ACTIVATIONS.index(act)))
    parts = [part[None] for q in (gate, up) for part in (q.codes, q.scale)]
    return call(x, *parts, **how, group=np.int64(gate.columns_per_scale))


def _call(x: Array, expert: Array, q: QTensor, out: jnp.dtype, most: str | None, threads: int | None) -> Array:
    made = out if out in native.FLOATS else jnp.float32
    shape = jax.ShapeDtypeStruct((x.shape[0], q.codes.shape[1]), made)
    call = jax.ffi.ffi_call("jaxllm_float8", shape, vmap_method="sequential")
    return call(
        x, expert, q.codes, q.scale, **native.how(most, threads), group=np.int64(q.columns_per_scale)
    ).astype(out)
