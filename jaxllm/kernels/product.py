"""Products with packed or plain weights, one expert to a block of rows: the Pallas kernels of `matmul` and
`grouped_matmul`. A plain product is one expert for all rows.

On TPU the grid walks over tiles of columns and adds in VMEM; the scales of groups are spread over the columns by
a product with zeros and ones, exactly, since the lanes of a register do not move otherwise. On a GPU every
program loops over the columns itself, in Triton; on Hopper in Mosaic GPU (`hopper.py`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxllm.kernels import coding
from jaxllm.kernels.coding import Coding
from jaxllm.kernels.tiles import Tiles, capability, fitted
from jaxllm.quant import QTensor

Array = jax.Array

PART = 512  # stored columns that are expanded at a time (TPU): temporaries stay near the registers


def product(
    x: Array,
    w: Array | QTensor,
    owner: Array,
    used: Array,
    tiles: Tiles,
    *,
    platform: str,
    interpret: bool = False,
) -> Array:
    """Rows x [I * rows, in], of which block i belongs to expert owner[i] of w [E, N, in] -> f32 [I * rows, N].

    tiles.rows is the size of a block; owner i32 [I], used i32 [1]: blocks from there on are zeros.
    """
    c, parts = coding.coding(w), coding.operands(w, halves=platform == "hopper")
    call = {"tpu": _on_tpu, "cuda": _on_gpu, "hopper": _on_hopper}[platform]
    return call(x, owner, used, parts, c, tiles, interpret)


def fits(x: Array, w: Array | QTensor, rows: int, platform: str) -> str | None:
    """Why the kernel of that platform does not take w [.., out, in] with so many rows of x; None where it does."""
    if platform == "tpu":
        return None
    return _fits_hopper(x, w, rows) if platform == "hopper" else _fits_gpu(w)


def _fits_gpu(w: Array | QTensor) -> str | None:
    c, N = coding.coding(w), w.shape[-2]
    if N % 16 or c.columns % 32:
        return f"tiles of a GPU have 16 rows and 32 columns of a weight, which do not divide {N}x{c.columns}"
    if c.group and c.group & (c.group - 1):
        return f"tiles of a GPU are powers of two, and groups have {c.group} columns"
    if math.prod(w.shape[:-1]) * c.width >= 2**31:
        return "offsets are of 31 bits, and the weight has more elements"
    if isinstance(w, QTensor) and w.codes.dtype == jnp.float8_e4m3fn and capability() < 8.9:
        return f"float8_e4m3fn needs compute capability 8.9 (Ada), and this GPU has {capability()}"
    return None


def _fits_hopper(x: Array, w: Array | QTensor, rows: int) -> str | None:
    c, N = coding.coding(w), w.shape[-2]
    columns = 32 * c.planes
    plain = None if isinstance(w, QTensor) else w.dtype
    if other := [dtype for dtype in (x.dtype, plain) if dtype not in (None, jnp.bfloat16)]:
        return f"on Hopper it multiplies bfloat16, not {other[0]}"
    if rows > 64:
        return f"on Hopper it takes 1 to 64 rows, not {rows}"
    if N % 64 or c.columns % columns:
        return (
            f"tiles on Hopper have 64 rows and {columns} columns of a weight, which do not divide {N}x{c.columns}"
        )
    if not 0 <= c.center <= 128 // (16 if c.planes == 2 else 1):
        return f"on Hopper a code's zero is among the lower half of the codes, not at {c.center}"
    if c.group and (c.group & (c.group - 1) or c.group > 256):
        return f"tiles on Hopper have powers of two up to 256, and groups have {c.group} columns"
    return None


# ---- TPU --------------------------------------------------------------------------------------------------


def _on_tpu(x: Array, owner: Array, used: Array, parts: dict, c: Coding, tiles: Tiles, interpret: bool) -> Array:
    from jax.experimental.pallas import tpu as pltpu

    N, width = parts["codes"].shape[1:]
    columns = min(tiles.columns, 128 * (c.group or tiles.columns))  # the scales of more lie in several registers
    out, size = min(tiles.out, N), min(columns // c.planes, width)
    grid = (owner.shape[0], pl.cdiv(N, out), pl.cdiv(width, size))
    x = coding.planes(x, c, grid[2] * size)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=grid,
        in_specs=[
            pl.BlockSpec((c.planes, tiles.rows, size), lambda i, j, at, owner, used: (0, i, at)),
            *(_tpu_spec(name, c, out, size) for name in parts),
        ],
        out_specs=pl.BlockSpec((tiles.rows, out), lambda i, j, at, owner, used: (i, j)),
        scratch_shapes=[pltpu.VMEM((tiles.rows, out), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_tpu_body, c=c, names=tuple(parts)),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], N), jnp.float32),
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="jaxllm_product",
    )(owner, used, x, *parts.values())


def _tpu_spec(name: str, c: Coding, out: int, size: int) -> pl.BlockSpec:
    """The block of a part at grid point i, j, at: lanes come in whole registers of 128, or all of them."""
    if name == "codes":
        return pl.BlockSpec((None, out, size), lambda i, j, at, owner, used: (owner[i], j, at))
    if c.group is None:
        return pl.BlockSpec((None, 1, out), lambda i, j, at, owner, used: (owner[i], 0, j))
    lanes, columns = _lanes(c), size * c.planes
    return pl.BlockSpec(
        (None, out, lanes), lambda i, j, at, owner, used: (owner[i], j, lax.div(at * columns, lanes * c.group))
    )


def _lanes(c: Coding) -> int:
    return min(128, c.groups)


def _tpu_body(owner, used, x, *refs, c: Coding, names: tuple[str, ...]):
    parts, (y, total) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    i, at = pl.program_id(0), pl.program_id(2)

    @pl.when(at == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(i < used[0])
    def _():
        wide = {name: _scales(parts[name], name, at, c, x.shape[2]) for name in names[1:] if c.group}
        for start in range(0, x.shape[2], PART):
            total[...] += _tpu_part(x, parts["codes"], wide, at, c, slice(start, min(start + PART, x.shape[2])))

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        y[...] = total[...] * parts["scale"][...] if c.scale and not c.group else total[...]


def _tpu_part(x, codes, wide: dict, at: Array, c: Coding, part: slice) -> Array:
    """The product of some columns of a tile [rows, out]."""
    size = part.stop - part.start
    first = at * x.shape[2] + part.start
    spread = {name: _spread(pieces, first, size, c) for name, pieces in wide.items()}
    packed = codes[:, part]
    y = jnp.zeros((x.shape[1], packed.shape[0]), jnp.float32)
    for plane in range(c.planes):
        w = coding.weights(packed, plane, c, spread, x.dtype)
        if c.width % x.shape[2] and c.levels == "float":  # behind the last column may lie anything, NaN too
            w = jnp.where(first + lax.broadcasted_iota(jnp.int32, w.shape, 1) < c.width, w, 0).astype(x.dtype)
        y += coding.dot(x[plane, :, part], w, transposed=True)
    return y


def _scales(ref, name: str, at: Array, c: Coding, size: int) -> list[Array]:
    """The scales (zeros) of the tile's registers of groups [out, lanes] as bf16 pieces that add up to them."""
    dtype, lanes = getattr(c, name), _lanes(c)
    x = coding.numbers(ref[...], dtype)
    if c.groups % lanes:
        first = lax.div(at * size * c.planes, lanes * c.group) * lanes
        x = jnp.where(first + lax.broadcasted_iota(jnp.int32, x.shape, 1) < c.groups, x, 0)
    pieces = []
    for _ in range(coding.PIECES[dtype]):
        pieces.append(x.astype(jnp.bfloat16))
        x = x - pieces[-1].astype(jnp.float32)
    return pieces


def _spread(pieces: list[Array], first: Array, size: int, c: Coding) -> Array:
    """pieces [out, lanes] -> f32 [out, size]: stored column `first` + k gets the scale of its group."""
    lanes, per = pieces[0].shape[1], c.group // c.planes
    shape = (lanes, size)
    group = lax.div(first + lax.broadcasted_iota(jnp.int32, shape, 1), per)
    own = (lax.rem(group, lanes) if c.groups > lanes else group) == lax.broadcasted_iota(jnp.int32, shape, 0)
    own = own.astype(jnp.float32).astype(jnp.bfloat16)
    return sum(coding.dot(piece, own) for piece in pieces)


# ---- GPU --------------------------------------------------------------------------------------------------


def _on_gpu(x: Array, owner: Array, used: Array, parts: dict, c: Coding, tiles: Tiles, interpret: bool) -> Array:
    from jax.experimental.pallas import triton

    N, width = parts["codes"].shape[1:]
    tiles = fitted(tiles, owner.shape[0], N, c.columns, c.group)
    out, size = tiles.out, tiles.columns // c.planes
    grid = (owner.shape[0], N // out, tiles.split)
    x = coding.planes(x, c, width)
    y = pl.pallas_call(
        functools.partial(_gpu_body, c=c, names=tuple(parts), tiles=tiles, steps=width // size // tiles.split),
        out_shape=jax.ShapeDtypeStruct((tiles.split, x.shape[1], N), jnp.float32),
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="jaxllm_product",
    )(owner, used, x, *parts.values())
    return y[0] if tiles.split == 1 else y.sum(0)


def _gpu_body(owner, used, x, *refs, c: Coding, names: tuple[str, ...], tiles: Tiles, steps: int):
    parts, y = dict(zip(names, refs, strict=False)), refs[-1]
    i, j, z = (pl.program_id(axis) for axis in range(3))
    expert, size = owner[i], tiles.columns // c.planes
    rows, out = pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.out, tiles.out)

    def add(step, total):
        at = z * steps + step
        columns, group = pl.ds(at * size, size), tiles.columns // c.group if c.group else 0
        packed = parts["codes"][expert, out, columns]
        wide = {}
        for name in names[1:] if c.group else ():
            scales = coding.numbers(parts[name][expert, out, pl.ds(at * group, group)], getattr(c, name))
            wide[name] = _repeated(scales, size)
        for plane in range(c.planes):
            w = coding.weights(packed, plane, c, wide, x.dtype)
            # The weight leads: it then goes from registers to the tensor cores, and few rows make narrow tiles.
            total += coding.dot(w, x[plane, rows, columns], transposed=True)
        return total

    total = jnp.zeros((tiles.out, tiles.rows), jnp.float32)
    total = lax.fori_loop(0, steps * (i < used[0]).astype(jnp.int32), add, total)
    if c.scale and not c.group:
        total = total * parts["scale"][expert, 0, out][:, None]
    y[z, rows, out] = total.T


def _repeated(x: Array, size: int) -> Array:
    """x [out, groups] -> [out, size]: every scale as often as its group has columns."""
    out, groups = x.shape
    return jnp.broadcast_to(x[:, :, None], (out, groups, size // groups)).reshape(out, size)


# ---- Hopper -----------------------------------------------------------------------------------------------


def _on_hopper(*args) -> Array:
    from jaxllm.kernels import hopper

    return hopper.product(*args)
