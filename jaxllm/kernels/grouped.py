"""Products of rows with the weights of experts, rows sorted by expert."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxllm.kernels import coding
from jaxllm.kernels.dense import key
from jaxllm.kernels.product import fits, product
from jaxllm.kernels.tiles import Tiles, chosen
from jaxllm.quant import QTensor

Array = jax.Array


def refuses(x: Array, w: Array | QTensor, platform: str) -> str | None:
    """Why the kernel does not take x [R, in] and w [E, out, in] on that platform; None where it does."""
    if x.dtype not in coding.FLOATS:
        return f"it multiplies float32 and bfloat16, not {x.dtype}"
    if w.ndim != 3 or not x.shape[0]:
        return f"it multiplies rows by experts' matrices, not {list(x.shape)} by {list(w.shape)}"
    each = -(-x.shape[0] // w.shape[0])
    if not isinstance(w, QTensor):
        return fits(x, w, each, platform) if w.dtype in coding.FLOATS else f"it has no weights of {w.dtype}"
    if w.order is not None:
        return "it keeps the order of columns"
    return coding.refuses(w) or fits(x, w, each, platform)


def grouped_matmul(
    x: Array,
    w: Array | QTensor,
    expert: Array,
    *,
    platform: str,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """Row i of x [R, in] times w[expert[i]] (w [E, out, in]) -> f32 [R, out]. `expert` i32 [R] never decreases.

    Each expert's rows are padded to whole blocks; blocks that no row fills cost nothing.
    """
    w = replace(w, input_scale=None) if isinstance(w, QTensor) else w
    (R, _), E = x.shape, w.shape[0]
    tiles = tiles or chosen("grouped", platform, key(w), -(-R // E))
    blocks = min(R, R // tiles.rows + E)
    place, owner, used = _places(expert, E, tiles.rows, blocks)
    rows = jnp.zeros((blocks * tiles.rows, x.shape[1]), x.dtype).at[place].set(x)
    return product(rows, w, owner, used, tiles, platform=platform, interpret=interpret)[place]


def _places(expert: Array, E: int, size: int, blocks: int) -> tuple[Array, Array, Array]:
    """Where each row goes i32 [R], whose each block is i32 [blocks], and how many are used i32 [1].

    Unused blocks belong to the expert of the last used one, so that no weight is fetched for them.
    """
    counts = jnp.bincount(expert, length=E)
    padded = -(-counts // size) * size
    ends = jnp.cumsum(padded)
    place = (ends - padded)[expert] + jnp.arange(expert.shape[0]) - (jnp.cumsum(counts) - counts)[expert]
    used = ends[-1] // size
    block = jnp.minimum(jnp.arange(blocks), used - 1)
    owner = jnp.searchsorted(ends, block * size, side="right")
    return place, jnp.minimum(owner, E - 1).astype(jnp.int32), used.astype(jnp.int32)[None]
