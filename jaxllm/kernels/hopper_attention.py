"""Attention of a few queries over a long cache on Hopper (compute capability 9.0), in Mosaic GPU.

Keys and values stream through shared memory by the copy engine, and both products are the tensor cores' (wgmma),
with the queries of a kv head filled up to the 64 rows that they take: reading the cache takes longer than that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxllm.kernels.attention import LOWEST, _span, _step
from jaxllm.kernels.coding import dot
from jaxllm.kernels.hopper import HEIGHT, swizzled
from jaxllm.kernels.tiles import Tiles

Array = jax.Array


def attend(q: Array, k: Array, v: Array, seen: Array, scores, tiles: Tiles, interpret) -> list[Array]:
    """As `attention._on_gpu`: sums f32 [Z, B, K, R, h] of Z shares of the slots, their maxima and totals."""
    (B, K, R, h), S = q.shape, k.shape[2]
    size = tiles.columns
    while S % size:
        size //= 2
    q = jnp.pad(q, ((0, 0), (0, 0), (0, HEIGHT - R), (0, 0)))
    seen = seen if seen.shape[1] == 1 else jnp.pad(seen, ((0, 0), (0, HEIGHT - R), (0, 0)))
    share = min(tiles.split, S // size, -(-264 // (B * K)))

    def jaxllm_attend(*refs):
        _body(*refs, scores=scores, size=size, share=share, stages=tiles.stages, interpret=interpret)

    shapes = [(share, B, K, R, h), *[(share, B, K, R)] * 2]
    made = plgpu.kernel(
        jaxllm_attend,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(B, K, share),
        grid_names=("b", "n", "z"),
        scratch_types=[
            plgpu.SMEM((HEIGHT, h), q.dtype, transforms=swizzled(h, q.dtype)),
            plgpu.SMEM((HEIGHT, h), jnp.float32),
            plgpu.SMEM((HEIGHT,), jnp.float32),
            plgpu.SMEM((HEIGHT,), jnp.float32),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )(_span(seen, size), q, k, v, seen)
    return [made[0], *(a[..., None] for a in made[1:])]


def _body(span, q, k, v, seen, sums, highest, total, queries, *scratch, scores, size, share, stages, interpret):
    b, n, z = (lax.axis_index(name) for name in "bnz")
    made, barrier = scratch[:-1], scratch[-1]
    plgpu.copy_gmem_to_smem(q.at[b, n], queries, barrier)
    plgpu.barrier_wait(barrier)
    first, end = span[0, b], span[1, b]
    each = lax.div(end - first + share - 1, share)
    start = first + z * each
    steps = jnp.clip(end - start, 0, each)

    def step(_, keys, values, visible, state):
        products, mix = _products(queries, keys, values, interpret)
        logits = scores(products)
        visible = _visible(visible, logits.shape)
        return _step(logits, mix, visible, state, keepdims=False)

    h = q.shape[-1]
    empty = (
        jnp.zeros((HEIGHT, h), jnp.float32),
        jnp.full(HEIGHT, LOWEST, jnp.float32),
        jnp.zeros(HEIGHT, jnp.float32),
    )
    slots = plgpu.BlockSpec(
        (None, None, size, h), lambda at: (b, n, start + at, 0), transforms=swizzled(h, k.dtype)
    )
    mask = plgpu.BlockSpec((None, seen.shape[1], size), lambda at: (b, 0, start + at))
    state = plgpu.emit_pipeline(
        step, grid=(steps,), in_specs=[slots, slots, mask], max_concurrent_steps=stages, init_carry=empty
    )(k, v, seen)
    for part, value in zip(made, state, strict=True):
        part[...] = value
    plgpu.commit_smem()
    for part, y in zip(made, (sums, highest, total), strict=True):
        plgpu.copy_smem_to_gmem(part.at[pl.ds(0, y.shape[3])], y.at[z, b, n])
    plgpu.wait_smem_to_gmem(0)


def _visible(ref, shape: tuple[int, int]) -> Array:
    """Bits of a block of slots, bool [R, size]: every query's own, or the same for all of them."""
    if ref.shape[0] > 1:
        return ref[...].astype(jnp.int32) != 0
    return lax.broadcast_in_dim(ref[0].astype(jnp.int32), shape, (1,)) != 0


def _products(queries, keys, values, interpret):
    """f32 [R, size] of queries and keys, and what multiplies powers by values."""
    if interpret:  # the interpreter multiplies from shared memory alone
        values = values[...]
        return dot(queries[...], keys[...], transposed=True), lambda powers: dot(
            powers.astype(values.dtype), values
        )

    def products(sums):
        plgpu.wgmma(sums, queries, keys.T)
        return sums[...]

    def mix(powers):
        def multiply(sums):
            plgpu.wgmma(sums, powers.astype(values.dtype), values)
            return sums[...]

        return pl.run_scoped(multiply, plgpu.ACC((HEIGHT, values.shape[1]), jnp.float32))

    return pl.run_scoped(products, plgpu.ACC((HEIGHT, keys.shape[0]), jnp.float32)), mix
