"""Products with packed weights, without ever expanding more than a block of one. The definition for kernels."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.quant.qtensor import QTensor, dequantize, rows, select

Array = jax.Array

BLOCK_WEIGHTS = 2**20  # expanded at a time: 4 MB in f32
# Larger matrices are read in two blocks or more. A loop waits for x; what stands outside one does not, and XLA
# for CPU then expands the matrices of all layers before it needs the first (4 layers of 2048: 170 against 7 MB).
SMALL_WEIGHTS = 2**16
_LAST = (((1,), (1,)), ((), ()))


def matmul(x: Array, q: QTensor) -> Array:
    """x [M, in] times q [out, in] transposed -> f32 [M, out].

    Activations are rounded first where the format says so.
    Differentiable in x and in q's scales, zeros and offsets; through the rounding the gradient passes unchanged.
    """
    if q.order is not None:
        x, q = x[:, q.order], replace(q, order=None)
    if q.format.activations:
        x = rounded_activations(x, q)
    N = q.codes.shape[0]
    if N * q.columns <= SMALL_WEIGHTS:
        return _block(x, q)
    return _blocks(x, q, max(1, min(-(-N // 2), BLOCK_WEIGHTS // q.columns)))


def _block(x: Array, q: QTensor) -> Array:
    # f32 on a CPU: bf16 products inside loops fall to a slow path there, and codes expand to f32 anyway.
    return lax.platform_dependent(x, q, cpu=lambda x, q: _dot(x, q, jnp.float32), default=_dot_narrow)


def _dot_narrow(x: Array, q: QTensor) -> Array:
    return _dot(x, q, x.dtype)


def _dot(x: Array, q: QTensor, dtype: jnp.dtype) -> Array:
    w = dequantize(q, dtype)
    return lax.dot_general(x.astype(dtype), w, _LAST, preferred_element_type=jnp.float32)


def _blocks(x: Array, q: QTensor, size: int) -> Array:
    """`size` rows of q at a time. The last block starts early rather than end late, and repeats some rows."""
    N = q.codes.shape[0]

    @jax.checkpoint  # a gradient expands a block again and does not keep them all
    def one(start):
        part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), q.row_parts())
        return _block(x, replace(q, **part))

    def put(i, y):
        start = jnp.minimum(i * size, N - size).astype(jnp.uint32)  # unsigned: nothing counts from the end
        return lax.dynamic_update_slice_in_dim(y, one(start), start, 1)

    # Zeros that come from x: XLA for CPU makes room for constants first of all, for every layer's at once.
    zeros = jnp.zeros((x.shape[0], N), jnp.float32) * lax.stop_gradient(x[:1, :1]).astype(jnp.float32)
    return lax.fori_loop(0, -(-N // size), put, zeros)


def rounded_activations(x: Array, q: QTensor) -> Array:
    """x [M, in] as q's format sees it: divided by a scale, rounded, and multiplied again; x's dtype f32.

    The scale is q.input_scale, or the largest magnitude of the row (of each of its groups, where the weight has
    groups) over the largest value of the type.
    """
    f = q.format
    x = x.astype(jnp.float32)
    most = 127.0 if f.activations == "int8" else float(jnp.finfo(f.activations).max)
    groups = x.reshape(x.shape[0], -1, f.group) if f.group and x.shape[1] % f.group == 0 else x[:, None]
    if q.input_scale is not None:
        scale = q.input_scale.astype(jnp.float32)
    else:
        scale = jnp.maximum(jnp.abs(groups).max(-1, keepdims=True), 1e-10) / most
    scaled = jnp.clip(groups / lax.stop_gradient(scale), -most, most)
    near = jnp.round(scaled) if f.activations == "int8" else scaled.astype(f.activations).astype(jnp.float32)
    near = scaled + lax.stop_gradient(near - scaled)
    return (near * lax.stop_gradient(scale)).reshape(x.shape)


def embed(q: QTensor, tokens: Array) -> Array:
    """Rows of q [V, D] for tokens i32 [...] -> [..., D] in q's dtype; NaN for an id beyond the vocabulary."""
    V = q.codes.shape[0]
    x = dequantize(rows(q, jnp.clip(tokens, 0, V - 1)))
    return jnp.where(((tokens >= 0) & (tokens < V))[..., None], x, jnp.nan)


def grouped_matmul(x: Array, q: QTensor, expert: Array, *, few: int, size: int) -> Array:
    """Row i of x [R, in] times expert[i] of q [E, out, in] -> f32 [R, out]; `expert` i32 [R] never decreases.

    Up to `few` rows go one by one, more of them in blocks of `size` rows with one expert each.
    """
    if isinstance(x.shape[0], int) and x.shape[0] <= few:  # a symbolic number may be large
        one = jax.checkpoint(lambda row: matmul(row[0][None], select(q, row[1]))[0])
        return lax.map(one, (x, expert))
    return _in_blocks(x, q, expert, size)


def _in_blocks(x: Array, q: QTensor, expert: Array, size: int) -> Array:
    E, N = q.codes.shape[:2]
    blocks, owner, used, place = expert_blocks(x, expert, experts=E, size=size)

    @jax.checkpoint
    def one(block):
        rows_, owner, used = block
        empty = jnp.zeros((size, N), jnp.float32)
        return lax.cond(used, lambda: matmul(rows_, select(q, owner)), lambda: empty)

    y = lax.map(one, (blocks, owner, jnp.arange(blocks.shape[0]) < used))
    return y.reshape(-1, N)[place]


def expert_blocks(x: Array, expert: Array, *, experts: int, size: int) -> tuple[Array, Array, Array, Array]:
    """Rows x [R, in] of experts i32 [R] that never decrease, in blocks of `size` rows with one expert each.

    -> (blocks [n, size, in] padded with zeros, their experts i32 [n], how many of them are used i32 [], the place
    i32 [R] of each row among the n * size), with n = ceil(R / size) + experts, the most there can be.
    """
    counts = jnp.bincount(expert, length=experts)
    padded = -(-counts // size) * size
    ends = jnp.cumsum(padded)
    place = (ends - padded)[expert] + jnp.arange(x.shape[0]) - (jnp.cumsum(counts) - counts)[expert]
    n = -(-x.shape[0] // size) + experts
    owner = jnp.searchsorted(ends, jnp.arange(n) * size, side="right")
    rows_ = jnp.zeros((n * size, x.shape[1]), x.dtype).at[place].set(x, unique_indices=True)
    return rows_.reshape(n, size, -1), jnp.minimum(owner, experts - 1), ends[-1] // size, place
