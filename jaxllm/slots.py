"""Writing into the slots of a cache, by XLA's own operations: the definitions behind `ops.put`.

A cache is [B, K, S, h], and slots are i32 [B, T]; what has a slot of S or more is dropped. `inside` is for other
compilers than XLA, which write somewhere else what lies outside.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def scattered(cache: Array, x: Array, slot: Array, *, inside: bool) -> Array:
    """The cache with x [B, T, K, h] at its slots."""
    if inside:
        x, slot = _inside(x, slot, cache.shape[2], cache[:, :, 0][:, None])
    row = jnp.arange(cache.shape[0])[:, None, None]
    return cache.at[row, jnp.arange(cache.shape[1]), slot[..., None]].set(x, mode="drop")


def each(a: Array, x: Array, slot: Array, *, inside: bool) -> Array:
    """`a` [B, S] with x [B, T] at its slots."""
    if inside:
        x, slot = _inside(x, slot, a.shape[1], a[:, :1])
    return a.at[jnp.arange(a.shape[0])[:, None], slot].set(x, mode="drop")


def _inside(x: Array, slot: Array, size: int, first: Array) -> tuple[Array, Array]:
    """x [B, T, ...] and slots that write the same into `size` slots, of which slot 0 holds `first` [B, 1, ...],
    with none outside.

    What would be dropped repeats the row's first write, or what slot 0 holds already.
    """
    t, kept = jnp.arange(slot.shape[1]), slot < size
    source = jnp.where(kept, t, jnp.where(kept, t, slot.shape[1] - 1).min(1, keepdims=True))
    some = kept.any(1, keepdims=True)
    wide = lambda y: y.reshape(*y.shape, *[1] * (x.ndim - 2))
    taken = jnp.take_along_axis(x, wide(source), 1, mode="clip")
    slot = jnp.where(some, jnp.take_along_axis(slot, source, 1, mode="clip"), 0)
    return jnp.where(wide(some), taken, first), slot


def selected(cache: Array, x: Array, slot: Array, *, inside: bool) -> Array:
    """`scattered`, slot by slot: a CPU's scatter of bf16 converts the whole cache to f32 and back."""
    B, T = slot.shape
    number = jnp.broadcast_to(jnp.arange(T), (B, T))
    source = each(jnp.full((B, cache.shape[2]), -1, jnp.int32), number, slot, inside=inside)
    x = x.swapaxes(1, 2)  # [B, K, T, h]
    new = x if T == 1 else jnp.take_along_axis(x, jnp.maximum(source, 0)[:, None, :, None], 2)
    return jnp.where((source >= 0)[:, None, :, None], new, cache)


def chosen(cache: Array, x: Array, slot: Array) -> Array:
    """The cache with x [B, K, T, h] at its slots, by slices and gathers alone."""
    (B, T), S = slot.shape, cache.shape[2]
    if T == 1:
        return jnp.concatenate([_one_slot(cache[b : b + 1], x[b : b + 1], slot[b, 0]) for b in range(B)])
    written = slot[:, None, :] == jnp.arange(S)[:, None]  # [B, S, T]
    source = jnp.where(written, jnp.arange(T), -1).max(-1)
    new = [jnp.take(row, jnp.maximum(t, 0), axis=1, mode="clip") for row, t in zip(x, source, strict=True)]
    return jnp.where((source >= 0)[:, None, :, None], jnp.stack(new), cache)


def _one_slot(cache: Array, x: Array, slot: Array) -> Array:
    at = (0, 0, jnp.minimum(slot, cache.shape[2] - 1), 0)
    x = jnp.where(slot < cache.shape[2], x, lax.dynamic_slice(cache, at, x.shape))
    return lax.dynamic_update_slice(cache, x, at)
