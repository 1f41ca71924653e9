"""Products with packed weights on Hopper (compute capability 9.0), in Mosaic GPU.

Codes stream through shared memory by the copy engine (TMA), are expanded in registers to bfloat16 that hold them
exactly, and go from there to the tensor cores (wgmma), the weight first: few rows of x make narrow tiles. The
scales of groups multiply the sums of a group instead of the weights, which is less work for few rows and loses
nothing to bfloat16. Zeros are taken off with the sums of x over a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxllm.kernels import coding
from jaxllm.kernels.coding import Coding
from jaxllm.kernels.tiles import Tiles, fitted

Array = jax.Array

HEIGHT = 64  # rows of a weight that one wgmma takes
_WHOLE = ((),) if jax.__version_info__ < (0, 11) else ()  # an older `load` asks for an index beside the reference


@dataclass(frozen=True)
class _Plan:
    """What is known of a product when it is compiled."""

    c: Coding
    tiles: Tiles
    names: tuple[str, ...]  # of the operands
    steps: int  # of one program, over columns
    chunk: int  # stored columns of one tile of x: they share a scale, and fill at most a row of shared memory
    interpret: object  # what `plgpu.kernel` takes to interpret; None to compile

    @property
    def size(self) -> int:
        """Stored columns of a step."""
        return self.tiles.columns // self.c.planes

    @property
    def groups(self) -> int:
        """Groups of a step; columns without groups are one."""
        return self.tiles.columns // self.c.group if self.c.group else 1


def product(x: Array, owner: Array, used: Array, parts: dict, c: Coding, tiles: Tiles, interpret) -> Array:
    """As `product.product`, of the parts of a weight (`coding.operands`): f32 [I * rows, N]."""
    N, width = parts["codes"].shape[1:]
    tiles = fitted(tiles, owner.shape[0], N, c.columns, c.group)
    size = tiles.columns // c.planes
    chunk = min(64, size, c.group // c.planes if c.group else size)
    args = {"owner": owner, "used": used, "x": _planes(x, c, chunk), **parts}
    if c.zero:
        args["sums"] = x.astype(jnp.float32).reshape(x.shape[0], c.groups, c.group).sum(2).T
    plan = _Plan(c, tiles, tuple(args), width // size // tiles.split, chunk, interpret or None)

    def jaxllm_product(*refs):
        _body(*refs, plan=plan)

    y = plgpu.kernel(
        jaxllm_product,
        out_type=jax.ShapeDtypeStruct((tiles.split, N, x.shape[0]), jnp.float32),
        grid=(owner.shape[0], N // tiles.out, tiles.split),
        grid_names=("i", "j", "z"),
        scratch_types=[plgpu.SMEM((tiles.out, tiles.rows), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plan.interpret,
    )(*args.values())
    return y.sum(0).T


def _planes(x: Array, c: Coding, chunk: int) -> Array:
    """x [R, in] as [planes, width / chunk, R, chunk], each plane divided by its unit."""
    y = coding.planes(x, c, c.width)
    y = y / jnp.asarray([coding.unit(p, c) for p in range(c.planes)], y.dtype)[:, None, None]
    return y.reshape(c.planes, x.shape[0], -1, chunk).swapaxes(1, 2)


# ---- inside the kernel ------------------------------------------------------------------------------------


def _body(*refs, plan: _Plan):
    parts, (y, made) = dict(zip(plan.names, refs, strict=False)), refs[len(plan.names) :]
    i, j, z = (lax.axis_index(name) for name in "ijz")
    filled, out = i < parts["used"][0], plan.tiles.out

    @pl.when(filled)
    def _():
        for n, total in enumerate(_totals(parts, plan, i, j, z)):
            made[_slab(n)] = total

    @pl.when(jnp.logical_not(filled))
    def _():
        made[...] = jnp.zeros(made.shape, jnp.float32)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(made, y.at[z, pl.ds(j * out, out), pl.ds(i * plan.tiles.rows, plan.tiles.rows)])
    plgpu.wait_smem_to_gmem(0)


def _totals(parts: dict, plan: _Plan, i: Array, j: Array, z: Array) -> list[Array]:
    """Products [HEIGHT, rows] of every slab of a program's rows of the weight."""
    c, tiles, expert, first = plan.c, plan.tiles, parts["owner"][i], z * plan.steps
    slabs = range(tiles.out // HEIGHT)
    below = [pl.ds(j * tiles.out + n * HEIGHT, HEIGHT) for n in slabs]
    beside = pl.ds(i * tiles.rows, tiles.rows)

    def wide(step: Array) -> dict[str, list[list[Array]]]:
        """Scales and zeros of a step, [slab][group]: fetched while the step before is worked on."""
        at = (first + jnp.minimum(step, plan.steps - 1)) * plan.groups
        column = lambda name, n, g: _vector(parts[name].at[expert, below[n], at + g], 1, plan)
        names = [name for name in ("scale", "zero") if c.group and name in parts]
        return {name: [[column(name, n, g) for g in range(plan.groups)] for n in slabs] for name in names}

    def step(index, x, codes, carry):
        (totals, now), then = carry, wide(index[0] + 1)
        at = (first + index[0]) * plan.groups
        sums = [_vector(parts["sums"].at[at + g, beside], 0, plan) if c.zero else None for g in range(plan.groups)]
        totals = list(totals)
        for n in slabs:
            packed = codes[_slab(n)]
            for g in range(plan.groups):
                own = {name: values[n][g] for name, values in now.items()}
                totals[n] += _scaled(_multiplied(packed, x, g, plan), own, sums[g], c)
        return tuple(totals), then

    zeros = tuple(jnp.zeros((HEIGHT, tiles.rows), jnp.float32) for _ in slabs)
    specs = _blocks(parts, plan, lambda k: (0, first + k, i, 0), lambda k: (expert, j, first + k))
    how = dict(max_concurrent_steps=tiles.stages, init_carry=(zeros, wide(jnp.int32(0))))
    totals, _ = plgpu.emit_pipeline(step, grid=(plan.steps,), in_specs=specs, **how)(parts["x"], parts["codes"])
    if not c.scale or c.group:
        return list(totals)
    scale = [_vector(parts["scale"].at[expert, 0, rows], 1, plan) for rows in below]
    return [total * _wide(own, total, 0) for total, own in zip(totals, scale, strict=True)]


def _blocks(parts: dict, plan: _Plan, at_x, at_codes) -> list[plgpu.BlockSpec]:
    """What of x and of the codes a step works on, where the functions of its number say."""
    x = (plan.c.planes, plan.size // plan.chunk, plan.tiles.rows, plan.chunk)
    codes = (None, plan.tiles.out, plan.size)
    return [
        plgpu.BlockSpec(x, at_x, transforms=swizzled(plan.chunk, parts["x"].dtype)),
        plgpu.BlockSpec(codes, at_codes, transforms=swizzled(plan.size, parts["codes"].dtype)),
    ]


def _slab(n: int) -> slice:
    return slice(n * HEIGHT, (n + 1) * HEIGHT)


def swizzled(row: int, dtype: jnp.dtype) -> tuple:
    """Transforms of a block in shared memory whose rows have so many elements: banks are met evenly."""
    bits = jnp.dtype(dtype).itemsize * 8
    size = min(128, row * bits // 8)
    return plgpu.TilingTransform((8, size * 8 // bits)), plgpu.SwizzleTransform(size)


def _vector(ref, axis: int, plan: _Plan) -> Array:
    """A vector of device memory, laid out as what remains of a product when `axis` is reduced."""
    if plan.interpret:
        return ref[...]
    return plgpu.load(ref, *_WHOLE, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _wide(x: Array, like: Array, axis: int) -> Array:
    return lax.broadcast_in_dim(x, like.shape, (axis,))


def _multiplied(packed: Array, x, g: int, plan: _Plan) -> Array:
    """Codes [HEIGHT, size] of one group times its tiles of x: f32 [HEIGHT, rows]."""
    per = plan.size // plan.groups
    tiles = range(g * per // plan.chunk, (g + 1) * per // plan.chunk)
    w = {
        (p, t): coding.exact(packed[:, t * plan.chunk : (t + 1) * plan.chunk], p, plan.c)
        for p in range(plan.c.planes)
        for t in tiles
    }
    if plan.interpret:  # the interpreter multiplies from shared memory alone
        return sum(coding.dot(w[at], x[at], transposed=True) for at in w)

    def multiply(sums):
        for at in w:
            plgpu.wgmma(sums, w[at], x.at[at].T)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((HEIGHT, plan.tiles.rows), jnp.float32))


def _scaled(y: Array, wide: dict[str, Array], sums: Array | None, c: Coding) -> Array:
    """Products of a group [HEIGHT, rows] with its zeros taken off and its scales put on."""
    if c.zero:
        y = y - _wide(coding.numbers(wide["zero"], c.zero), y, 0) * _wide(sums, y, 1)
    return y * _wide(coding.numbers(wide["scale"], c.scale), y, 0) if wide else y
