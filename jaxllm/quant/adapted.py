"""LoRA: a frozen weight and low-rank adapters beside it, as one leaf of the parameter tree (arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.errors import JaxllmError
from jaxllm.quant.qtensor import QTensor

Array = jax.Array


class Adapter(NamedTuple):
    """What one adapter does to one weight [out, in]: adds scale * b @ a."""

    a: Array  # [r, in]
    b: Array  # [out, r]
    scale: float


@partial(jax.tree_util.register_dataclass, data_fields=("w", "a", "b", "scale", "rows"), meta_fields=())
@dataclass(frozen=True)
class LoRA:
    """A weight w + scale[i] * b[i] @ a[i], with i the adapter of a row of the batch. Shape and dtype are w's.

    Adapters of a lower rank than the largest are padded with zeros, and one that leaves this weight alone is zero.
    """

    w: Array | QTensor  # [out, in], frozen
    a: Array  # [n, r, in]
    b: Array  # [n, out, r]
    scale: Array  # f32 [n]
    rows: Array | None = None  # i32 [] or [B]: which adapter, for all rows or each; outside 0 .. n - 1: none

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    @property
    def size(self) -> int:
        return self.w.size + self.a.size + self.b.size + self.scale.size

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.w, self.a, self.b, self.scale))

    def __repr__(self) -> str:
        n, r, _ = self.a.shape
        return f"LoRA({n} of rank {r} on {list(self.shape)})"


def added(x: Array, w: LoRA) -> Array:
    """What the adapters add to x [..., in] times the weight: f32 [..., out].

    x has whole rows of the batch, one after the other: its leading axis is B, or B times something. Only the
    small products are made, never b @ a. Raises JaxllmError where x does not have w.rows' B rows, and where
    there are several adapters and none was chosen.
    """
    rows = _chosen(w)
    index, scale = _index(w, rows)
    dtype = jnp.promote_types(x.dtype, w.a.dtype)
    low = _products("bti,bri->btr", _by_row(x, rows).astype(dtype), w.a[index].astype(dtype))
    high = _products("btr,bor->bto", low.astype(dtype), w.b[index].astype(dtype)) * scale
    return high.reshape(*x.shape[:-1], high.shape[-1])


def added_rows(tokens: Array, w: LoRA) -> Array:
    """What the adapters add to the embeddings of tokens i32 [B, ...]: f32 [B, ..., in]. w is [V, D]."""
    rows = _chosen(w)
    index, scale = _index(w, rows)
    token = _by_row(tokens[..., None], rows)[..., 0]  # [B, T]
    low = w.b[index[:, None], jnp.clip(token, 0, w.b.shape[1] - 1)]  # [B, T, r]
    high = _products("btr,brd->btd", low.astype(jnp.float32), w.a[index].astype(jnp.float32)) * scale
    return high.reshape(*tokens.shape, high.shape[-1])


def _index(w: LoRA, rows: Array) -> tuple[Array, Array]:
    """For each row: an adapter that exists, and its scale f32 [B, 1, 1], 0 where none was chosen."""
    n, rows = w.scale.shape[0], jnp.atleast_1d(rows)
    index = jnp.clip(rows, 0, n - 1)
    return index, jnp.where(rows == index, w.scale[index], 0.0)[:, None, None]


def _chosen(w: LoRA) -> Array:
    """i32 [] or [B]."""
    if w.rows is not None:
        return jnp.asarray(w.rows, jnp.int32)
    if w.scale.shape[0] > 1:
        raise JaxllmError(f"there are {w.scale.shape[0]} adapters; say which with lora.choose(params, rows)")
    return jnp.zeros((), jnp.int32)


def _by_row(x: Array, rows: Array) -> Array:
    """x [..., in] as [B, T, in], or [1, T, in] where one adapter is for all rows."""
    B = rows.shape[0] if rows.ndim else 1
    if rows.ndim and (x.shape[0] % B if x.ndim == 2 else x.shape[0] != B):
        raise JaxllmError(
            f"adapters were chosen for {B} rows, but the batch has {x.shape[0]}; choose one for each"
        )
    return x.reshape(B, -1, x.shape[-1])


def with_adapter(w: Array | QTensor | LoRA, adapter: Adapter | None, n: int) -> LoRA:
    """A weight with one more adapter (None: one that leaves it alone) after the n there are; none is chosen.

    Raises JaxllmError where the adapter's shapes are not the weight's."""
    out, into = w.shape
    new = adapter or Adapter(jnp.zeros((1, into), jnp.bfloat16), jnp.zeros((out, 1), jnp.bfloat16), 0.0)
    if new.a.ndim != 2 or new.a.shape[1] != into or new.b.shape != (out, new.a.shape[0]):
        raise JaxllmError(f"an adapter of {[out, into]} has a [r, {into}] and b [{out}, r], got {_shapes(new)}")
    old = w if isinstance(w, LoRA) else _none(w, n)
    r = max(old.a.shape[1], new.a.shape[0])
    a = jnp.concatenate([_to_rank(old.a, r, 1), _to_rank(jnp.asarray(new.a)[None], r, 1)])
    b = jnp.concatenate([_to_rank(old.b, r, 2), _to_rank(jnp.asarray(new.b)[None], r, 2)])
    return LoRA(old.w, a, b, jnp.append(old.scale, jnp.float32(new.scale)))


def _none(w: Array | QTensor, n: int) -> LoRA:
    out, into = w.shape
    dtype = jnp.bfloat16  # gives way to that of whatever comes beside it
    return LoRA(w, jnp.zeros((n, 1, into), dtype), jnp.zeros((n, out, 1), dtype), jnp.zeros(n, jnp.float32))


def _to_rank(x: Array, r: int, axis: int) -> Array:
    return jnp.pad(x, [(0, r - x.shape[i] if i == axis else 0) for i in range(3)])


def _shapes(adapter: Adapter) -> str:
    return f"{list(adapter.a.shape)} and {list(adapter.b.shape)}"


def _products(how: str, x: Array, y: Array) -> Array:
    return jnp.einsum(how, x, y, preferred_element_type=jnp.float32)
