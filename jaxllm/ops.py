"""The front door to everything a kernel may replace. The code here is the definition.

A weight is an array [out, in] (later also a packed leaf). What differs between platforms is chosen when
the program is lowered (`lax.platform_dependent`), so that exporting for another platform keeps its form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_LAST = (((1,), (1,)), ((), ()))  # contract the last axis of both operands
FEW_ROWS = 32  # below this a gather of each row's expert beats sorting rows into blocks (CPU)
BLOCK_ROWS = 32  # rows of one expert multiplied at a time (CPU)


def matmul(x: Array, w: Array, *, out: jnp.dtype | None = None) -> Array:
    """x [..., in] times w [out, in] transposed -> [..., out], accumulated in f32, in `out` or x's dtype."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    w = w.astype(dtype)
    if dtype == jnp.float32:
        y = _dot(rows, w)
    else:
        y = lax.platform_dependent(rows, w, cpu=_dot_padded, default=_dot)
    return y.astype(out or x.dtype).reshape(*x.shape[:-1], w.shape[0])


def _dot(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, _LAST, preferred_element_type=jnp.float32)


def _dot_padded(x: Array, w: Array) -> Array:
    # One row of bf16 falls to a path that first expands w to f32 (4 times slower); four rows do not.
    short = max(0, 4 - x.shape[0])
    return _dot(jnp.pad(x, ((0, short), (0, 0))), w)[: x.shape[0]]


def per_head(x: Array, w: Array) -> Array:
    """x [B, T, H, in] times each head's w [H, out, in] -> [B, T, H, out] in x's dtype."""
    y = jnp.einsum("bthi,hoi->btho", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def embed(w: Array, tokens: Array) -> Array:
    """Rows of w [V, D] for tokens i32 [...] -> [..., D]. An id beyond the vocabulary gives NaN, not a wrong row."""
    return w.at[tokens].get(mode="fill", fill_value=jnp.nan)


def grouped_matmul(x: Array, w: Array, expert: Array) -> Array:
    """Row i of x [R, in] times w[expert[i]] (w [E, out, in]) -> f32 [R, out]. `expert` i32 [R] never decreases.

    The work grows with R, not with E. Differentiable in x and w to any order.
    """
    return _grouped(x, w.astype(x.dtype), expert)


@jax.custom_jvp
def _grouped(x: Array, w: Array, expert: Array) -> Array:
    return lax.platform_dependent(x, w, expert, cpu=_grouped_cpu, default=_ragged)


@_grouped.defjvp
def _grouped_jvp(primals, tangents):
    # The CPU form loops to a bound known only at run time, which reverse mode cannot follow; `ragged_dot` can.
    (x, w, expert), (dx, dw, _) = primals, tangents
    return _grouped(x, w, expert), _ragged(dx, w, expert) + _ragged(x, dw, expert)


def _ragged(x: Array, w: Array, expert: Array) -> Array:
    sizes = jnp.bincount(expert, length=w.shape[0]).astype(jnp.int32)
    return lax.ragged_dot(x, w.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)


def _grouped_cpu(x: Array, w: Array, expert: Array) -> Array:
    if x.shape[0] <= FEW_ROWS:
        return jnp.einsum("ri,roi->ro", x, w[expert], preferred_element_type=jnp.float32)
    return _grouped_blocks(x, w, expert)


def _grouped_blocks(x: Array, w: Array, expert: Array) -> Array:
    """Rows padded so that every block of BLOCK_ROWS has one expert, then one product a used block.

    Measured (32 experts of 512x1024, f32, 2048 rows): 29 ms, `lax.ragged_dot` 340 ms, all experts 107 ms.
    """
    R, M, E = x.shape[0], BLOCK_ROWS, w.shape[0]
    sizes = jnp.bincount(expert, length=E)
    padded = -(-sizes // M) * M
    ends = jnp.cumsum(padded)
    place = (ends - padded)[expert] + jnp.arange(R) - (jnp.cumsum(sizes) - sizes)[expert]
    blocks = -(-R // M) + E
    rows = jnp.zeros((blocks * M, x.shape[1]), x.dtype).at[place].set(x)
    owner = jnp.searchsorted(ends, jnp.arange(blocks) * M, side="right")

    def one(i, y):
        block = lax.dynamic_slice_in_dim(rows, i * M, M)
        weight = lax.dynamic_index_in_dim(w, owner[i], keepdims=False)
        return lax.dynamic_update_slice_in_dim(y, _dot(block, weight), i * M, 0)

    y = jnp.zeros((blocks * M, w.shape[1]), jnp.float32)
    return lax.fori_loop(0, ends[-1] // M, one, y)[place]


def attention_weights(
    q: Array,
    k: Array,
    mask: Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Probabilities f32 [B, K, T, G, S] of q [B, T, K, G, h] over k [B, S, K, h].

    mask bool [B, T, S]; bias f32 broadcastable to the result; sinks f32 [K, G]: logits that take
    probability and belong to no slot. A row that sees nothing gets equal weights, never NaN.
    """
    B, T, K, G, h = q.shape
    # Queries of one kv head become the rows of one product: 4 to 7 times faster than a batched einsum on CPU.
    rows = q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, h)
    dims = (((3,), (3,)), ((0, 1), (0, 2)))
    scores = lax.dot_general(rows, k, dims, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, T, G, -1) * scale
    if bias is not None:
        scores = scores + bias
    if softcap:
        scores = jnp.tanh(scores / softcap) * softcap
    scores = jnp.where(mask[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        return jax.nn.softmax(scores, -1)
    sink = jnp.broadcast_to(sinks[:, None, :, None], (B, K, T, G, 1)).astype(jnp.float32)
    return jax.nn.softmax(jnp.concatenate([scores, sink], -1), -1)[..., :-1]


def weighted_sum(weights: Array, v: Array) -> Array:
    """weights f32 [B, K, T, G, S] over v [B, S, K, h] -> [B, T, K, G, h] in v's dtype."""
    B, K, T, G, S = weights.shape
    rows = weights.reshape(B, K, T * G, S).astype(v.dtype)
    dims = (((3,), (1,)), ((0, 1), (0, 2)))
    y = lax.dot_general(rows, v, dims, preferred_element_type=jnp.float32).astype(v.dtype)
    return y.reshape(B, K, T, G, -1).transpose(0, 2, 1, 3, 4)


def attend(q: Array, k: Array, v: Array, mask: Array, **scoring) -> Array:
    """Softmax attention -> [B, T, K, G, h]; arguments as in `attention_weights` and `weighted_sum`."""
    return weighted_sum(attention_weights(q, k, mask, **scoring), v)
