"""Softmax attention by its definition, in jax.numpy: what `ops.attend` does where no kernel takes its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.quant.cache import CacheCodes, expanded

Array = jax.Array

_PER_HEAD = ((0, 1), (0, 1))  # batch and kv heads lead
# Scores in flight: 4.7 million f32 at once took 18.7 ms, in four blocks 5.6 ms (512 queries, 1024 slots, CPU).
BLOCK_SCORES = 2**20
MOST_BLOCKS = 8  # they are unrolled


def attention_scores(
    q: Array,
    k: Array,
    mask: Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
    slopes: Array | None = None,
) -> Array:
    """Logits f32 [B, K, T, G, S] of q [B, T, K, G, h] over k [B, K, S, h], very negative where mask is False.

    mask bool [B, T, S]; bias f32 [B, K, T, G, S], the axes other than T may be 1; slopes f32 [K, G] multiply it.
    """
    B, T, K, G, h = q.shape
    # Queries of one kv head become the rows of one product: 4 to 7 times faster than a batched einsum on CPU.
    rows = q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, h)
    scores = lax.dot_general(rows, k, (((3,), (3,)), _PER_HEAD), preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, T, G, -1) * scale
    if bias is not None:
        scores = scores + (bias if slopes is None else bias * slopes[:, None, :, None])
    if softcap:
        scores = jnp.tanh(scores / softcap) * softcap
    return jnp.where(mask[:, None, :, None], scores, jnp.finfo(jnp.float32).min)


def attention_weights(
    q: Array, k: Array | CacheCodes, mask: Array, *, sinks: Array | None = None, **scoring
) -> Array:
    """Probabilities f32 [B, K, T, G, S]; arguments as in `attention_scores`.

    sinks f32 [K, G]: logits that take probability and belong to no slot. A row that sees nothing gets equal
    weights, never NaN.
    """
    powers, total = _exponentials(attention_scores(q, expanded(k), mask, **scoring), sinks)
    return powers / total


def _exponentials(scores: Array, sinks: Array | None) -> tuple[Array, Array]:
    """exp(scores - their maximum), and its sum over slots and sink [B, K, T, G, 1]."""
    highest = lax.stop_gradient(scores.max(-1, keepdims=True))
    if sinks is None:
        powers = jnp.exp(scores - highest)
        return powers, powers.sum(-1, keepdims=True)
    sink = sinks[:, None, :, None].astype(jnp.float32)
    highest = jnp.maximum(highest, lax.stop_gradient(sink))
    powers = jnp.exp(scores - highest)
    return powers, powers.sum(-1, keepdims=True) + jnp.exp(sink - highest)


def weighted_sum(weights: Array, v: Array | CacheCodes) -> Array:
    """weights f32 [B, K, T, G, S] over v [B, K, S, h] -> f32 [B, K, T, G, h]."""
    v, (B, K, T, G, S) = expanded(v), weights.shape
    rows = weights.reshape(B, K, T * G, S).astype(v.dtype)
    y = lax.dot_general(rows, v, (((3,), (2,)), _PER_HEAD), preferred_element_type=jnp.float32)
    return y.reshape(B, K, T, G, -1)


def attend(
    q: Array, k: Array | CacheCodes, v: Array | CacheCodes, mask: Array, *, sinks: Array | None, **scoring
) -> Array:
    """Softmax attention of q [B, T, K, G, h] over k [B, K, S, h], v [B, K, S, j] -> [B, T, K, G, j] in q's dtype.

    The other arguments as in `attention_weights`. Queries go in blocks, so that scores stay small."""
    k, v, (B, T, K, G, _) = expanded(k), expanded(v), q.shape
    if not isinstance(B * T, int):  # symbolic, for export: how many blocks is not known
        return _attend_block(q, k, v, mask, sinks, scoring)
    blocks = min(MOST_BLOCKS, -(-B * T * K * G * k.shape[2] // BLOCK_SCORES))
    size = -(-T // blocks)
    parts = [
        _attend_block(q[:, i : i + size], k, v, mask[:, i : i + size], sinks, _rows(scoring, i, size, T))
        for i in range(0, T, size)
    ]
    return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]


def _rows(scoring: dict, start: int, size: int, T: int) -> dict:
    """The scoring arguments of queries start to start + size: only the bias differs by query."""
    bias = scoring.get("bias")
    if bias is None or size >= T:
        return scoring
    return scoring | {"bias": bias[:, :, start : start + size]}


def _attend_block(q, k, v, mask, sinks, scoring) -> Array:
    powers, total = _exponentials(attention_scores(q, k, mask, **scoring), sinks)
    # Dividing the sum spares a pass over the scores.
    return (weighted_sum(powers, v) / total).astype(q.dtype).transpose(0, 2, 1, 3, 4)
