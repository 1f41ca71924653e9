"""Products of rows with one packed weight."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxllm.kernels import coding
from jaxllm.kernels.product import fits, product
from jaxllm.kernels.tiles import Tiles, chosen
from jaxllm.quant import QTensor

Array = jax.Array


def refuses(x: Array, w: QTensor, platform: str) -> str | None:
    """Why the kernel does not take x [M, in] and w [out, in] on that platform; None where it does."""
    if x.dtype not in coding.FLOATS:
        return f"it multiplies float32 and bfloat16, not {x.dtype}"
    if w.ndim != 2 or not x.shape[0]:
        return f"it multiplies rows by a matrix, not {list(x.shape)} by {list(w.shape)}"
    return coding.refuses(w) or fits(x, w, x.shape[0], platform)


def matmul(x: Array, w: QTensor, *, platform: str, tiles: Tiles | None = None, interpret: bool = False) -> Array:
    """x [M, in] times w [out, in] transposed -> f32 [M, out], expanded in registers and added in f32.

    platform is "tpu", "cuda" or "hopper"; interpret runs it anywhere, slowly: True, or for "hopper" an
    `InterpretGPUParams` of JAX.
    """
    x = x if w.order is None else x[:, w.order]
    w = replace(w, order=None, input_scale=None)
    tiles = tiles or chosen("matmul", platform, key(w), x.shape[0])
    blocks = -(-x.shape[0] // tiles.rows)
    rows = jnp.pad(x, ((0, blocks * tiles.rows - x.shape[0]), (0, 0)))
    owner, used = jnp.zeros(blocks, jnp.int32), jnp.full(1, blocks, jnp.int32)
    one = jax.tree.map(lambda part: part[None], w)
    return product(rows, one, owner, used, tiles, platform=platform, interpret=interpret)[: x.shape[0]]


def key(w: Array | QTensor) -> str:
    """What tile sizes are stored for: shape and coding of a weight."""
    c = coding.coding(w)
    kind = (
        f"{c.levels}{w.codes.dtype.itemsize * 8 // c.planes if isinstance(w, QTensor) else w.dtype.itemsize * 8}"
    )
    return f"{kind} g{c.group or 0} {'x'.join(map(str, w.shape))}"
