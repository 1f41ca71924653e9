"""Attention of a few queries over a long cache: softmax over blocks of slots, kept up to date as they come.

Milakov and Gimelshein, arXiv 1805.02867; in blocks, FlashAttention, arXiv 2205.14135; slots shared out to several
programs (GPU), Flash-Decoding. Blocks before the first and behind the last slot that any query sees are not read.
A kernel returns sums that are not yet divided, with their maximum and their total; `_joined` puts them together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxllm.kernels.coding import FLOATS, dot
from jaxllm.kernels.tiles import Tiles, chosen

Array = jax.Array

MOST_ROWS = (
    64  # queries of one kv head, T * G: beyond that many, attention is no longer bound by reading the cache
)
LOWEST = float(jnp.finfo(jnp.float32).min)
_LANES = 128  # one number a row fills a TPU's register


def refuses(q: Array, k: Array, v: Array, platform: str) -> str | None:
    """Why the kernel does not take q [B, T, K, G, h] and k, v [B, K, S, h] there; None where it does."""
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"it is for float32 or bfloat16 throughout, not {q.dtype}, {k.dtype} and {v.dtype}"
    B, T, _, G, h = q.shape
    if T * G > MOST_ROWS or not B * T * G:
        return f"it takes 1 to {MOST_ROWS} queries of a kv head, not {B * T * G}"
    S = k.shape[2]
    if platform == "hopper" and (q.dtype != jnp.bfloat16 or S % 64 or h not in (64, 128)):
        taken = "bfloat16, heads of 64 or 128, and a multiple of 64 slots"
        return f"on Hopper it takes {taken}, not {q.dtype}, {h} and {S}"
    if platform == "cuda" and (S % 16 or h & (h - 1) or not 16 <= h <= 256):
        return f"on a GPU it takes heads of 16 to 256, a power of two, and a multiple of 16 slots, not {h} and {S}"
    return None


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    platform: str,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """Softmax attention of q [B, T, K, G, h] over k, v [B, K, S, h] where mask bool [B, T, S] -> as q.

    sinks [K, G] as in `jaxllm.softmax.attention_weights`. A query that sees nothing gets zeros.
    """
    B, T, K, G, h = q.shape
    tiles = tiles or chosen("attend", platform, f"{q.dtype.name} h{h} S{k.shape[2]}", T * G)
    fill = -(T * G) % 16
    rows = jnp.pad(q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, h), ((0, 0), (0, 0), (0, fill), (0, 0)))
    seen = mask if T == 1 else jnp.pad(jnp.repeat(mask, G, 1), ((0, 0), (0, fill), (0, 0)))
    run = {"tpu": _on_tpu, "cuda": _on_gpu, "hopper": _on_hopper}[platform]
    scores = functools.partial(_scores, scale=scale, softcap=softcap)
    sums, highest, total = (
        a[..., : T * G, :] for a in run(rows, k, v, seen.astype(jnp.int8), scores, tiles, interpret)
    )
    y = _joined(sums, highest, total, None if sinks is None else jnp.tile(sinks, (1, T))[..., None])
    return y.reshape(B, K, T, G, h).transpose(0, 2, 1, 3, 4).astype(q.dtype)


def _joined(sums: Array, highest: Array, total: Array, sinks: Array | None) -> Array:
    """sums f32 [Z, B, K, R, h] with highest, total [Z, B, K, R, 1] of Z shares of the slots -> [B, K, R, h]."""
    most = highest.max(0)
    sink = 0.0
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)
        most = jnp.maximum(most, sinks)
        sink = jnp.exp(sinks - most)
    weight = jnp.exp(highest - most)
    total = (total * weight).sum(0) + sink
    return (sums * weight).sum(0) / jnp.where(total == 0, 1, total)


def _span(seen: Array, size: int) -> Array:
    """i32 [2, B]: the first block of `size` slots that holds a visible one, and the block behind the last."""
    S = seen.shape[2]
    any_ = (seen != 0).any(1)
    last = S - jnp.argmax(any_[:, ::-1], 1)
    span = jnp.stack([jnp.argmax(any_, 1) // size, -(-last // size)])
    return jnp.where(any_.any(1), span, 0).astype(jnp.int32)


# ---- inside a kernel --------------------------------------------------------------------------------------


def _scores(products: Array, *, scale: float, softcap: float | None) -> Array:
    """Logits of products of queries and keys, f32 [R, slots]."""
    scores = products * scale
    return jnp.tanh(scores / softcap) * softcap if softcap else scores


def _step(scores: Array, mix, seen: Array, state: tuple, *, keepdims: bool = True) -> tuple:
    """(sums [R, h], highest [R, 1], total [R, 1]) with one block of slots more; mix(powers) are its sums.

    keepdims False: highest and total are vectors [R].
    """
    wide = lambda x, like: x if keepdims else lax.broadcast_in_dim(x, like.shape, (0,))
    sums, highest, total = state
    scores = jnp.where(seen, scores, LOWEST)
    new = jnp.maximum(highest, scores.max(-1, keepdims=keepdims))
    powers = jnp.where(seen, jnp.exp(scores - wide(new, scores)), 0.0)
    less = jnp.exp(highest - new)
    sums = sums * wide(less, sums) + mix(powers)
    return sums, new, total * less + powers.sum(-1, keepdims=keepdims)


def _mixed(values: Array):
    return lambda powers: dot(powers.astype(values.dtype), values)


# ---- TPU --------------------------------------------------------------------------------------------------


def _on_tpu(q: Array, k: Array, v: Array, seen: Array, scores, tiles: Tiles, interpret: bool) -> list[Array]:
    from jax.experimental.pallas import tpu as pltpu

    (B, K, R, h), S = q.shape, k.shape[2]
    size = min(S, tiles.columns)
    near = lambda b, at, span: jnp.clip(at, span[0, b], jnp.maximum(span[1, b] - 1, 0))
    whole = lambda width: pl.BlockSpec((None, None, R, width), lambda b, n, at, span: (b, n, 0, 0))
    slots = pl.BlockSpec((None, None, size, h), lambda b, n, at, span: (b, n, near(b, at, span), 0))
    mask = pl.BlockSpec((None, seen.shape[1], size), lambda b, n, at, span: (b, 0, near(b, at, span)))
    sizes = (h, _LANES, _LANES)
    made = pl.pallas_call(
        functools.partial(_tpu_body, scores=scores, S=S),
        out_shape=[jax.ShapeDtypeStruct((B, K, R, width), jnp.float32) for width in sizes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, pl.cdiv(S, size)),
            in_specs=[whole(h), slots, slots, mask],
            out_specs=[whole(width) for width in sizes],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="jaxllm_attend",
    )(_span(seen, size), q, k, v, seen)
    return [made[0][None], *(a[None, ..., :1] for a in made[1:])]


def _tpu_body(span, q, k, v, seen, sums, highest, total, *, scores, S: int):
    b, at, size = pl.program_id(0), pl.program_id(2), k.shape[0]

    @pl.when(at == 0)
    def _():
        sums[...], total[...] = jnp.zeros_like(sums), jnp.zeros_like(total)
        highest[...] = jnp.full_like(highest, LOWEST)

    @pl.when((at >= span[0, b]) & (at < span[1, b]))
    def _():
        visible, values = seen[...].astype(jnp.int32) != 0, v[...]
        if S % size:  # behind the last slot may lie anything, NaN too
            visible &= at * size + lax.broadcasted_iota(jnp.int32, visible.shape, 1) < S
            inside = at * size + lax.broadcasted_iota(jnp.int32, values.shape, 0) < S
            values = jnp.where(inside, values, 0).astype(values.dtype)
        logits = scores(dot(q[...], k[...], transposed=True))
        state = sums[...], highest[:, :1], total[:, :1]
        made = _step(logits, _mixed(values), jnp.broadcast_to(visible, logits.shape), state)
        sums[...] = made[0]
        highest[...] = jnp.broadcast_to(made[1], highest.shape)
        total[...] = jnp.broadcast_to(made[2], total.shape)


# ---- GPU --------------------------------------------------------------------------------------------------


def _on_gpu(q: Array, k: Array, v: Array, seen: Array, scores, tiles: Tiles, interpret: bool) -> list[Array]:
    from jax.experimental.pallas import triton

    (B, K, R, h), S = q.shape, k.shape[2]
    size = tiles.columns
    while S % size:
        size //= 2
    whole = max(16, 1 << (R - 1).bit_length())  # a power of two
    q = jnp.pad(q, ((0, 0), (0, 0), (0, whole - R), (0, 0)))
    seen = seen if seen.shape[1] == 1 else jnp.pad(seen, ((0, 0), (0, whole - R), (0, 0)))
    share = min(tiles.split, S // size, -(-264 // (B * K)))
    shapes = [(share, B, K, whole, h), *[(share, B, K, whole)] * 2]
    made = pl.pallas_call(
        functools.partial(_gpu_body, scores=scores, size=size),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(B, K, share),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="jaxllm_attend",
    )(_span(seen, size), q, k, v, seen)
    return [made[0], *(a[..., None] for a in made[1:])]


def _gpu_body(span, q, k, v, seen, sums, highest, total, *, scores, size: int):
    b, n, z = (pl.program_id(axis) for axis in range(3))
    queries = q[b, n]
    R, h = queries.shape

    def step(at, state):
        slots = pl.ds(at * size, size)
        logits = scores(dot(queries, k[b, n, slots], transposed=True))
        visible = seen[b, :, slots] if seen.shape[1] > 1 else seen[b, 0, slots][None]
        visible = jnp.broadcast_to(visible.astype(jnp.int32) != 0, logits.shape)
        return _step(logits, _mixed(v[b, n, slots]), visible, state)

    first, end = span[0, b], span[1, b]
    each = lax.div(end - first + pl.num_programs(2) - 1, pl.num_programs(2))
    start = first + z * each
    empty = jnp.zeros((R, h), jnp.float32), jnp.full((R, 1), LOWEST, jnp.float32), jnp.zeros((R, 1), jnp.float32)
    made = lax.fori_loop(start, jnp.minimum(start + each, end), step, empty)
    sums[z, b, n], highest[z, b, n], total[z, b, n] = made[0], made[1][:, 0], made[2][:, 0]


# ---- Hopper -----------------------------------------------------------------------------------------------


def _on_hopper(*args) -> list[Array]:
    from jaxllm.kernels import hopper_attention

    return hopper_attention.attend(*args)
