"""Which tile sizes are fastest on the device at hand, by timing them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import kernels
from jaxllm.errors import JaxllmError
from jaxllm.kernels import attention, dense, grouped, tiles
from jaxllm.kernels.tiles import Tiles
from jaxllm.quant import QTensor, encode, named

Array = jax.Array

# What is tried for each platform and operation, field by field; `rows` only up to what there is.
TRIED = {
    "tpu": {
        "matmul": dict(rows=(16, 32, 64, 128, 256, 512), out=(128, 256, 512, 1024), columns=(1024, 2048, 4096)),
        "grouped": dict(rows=(16, 32, 64, 128, 256), out=(128, 256, 512), columns=(1024, 2048)),
        "attend": dict(columns=(128, 256, 512, 1024, 2048)),
    },
    "cuda": {
        "matmul": dict(
            rows=(16, 32, 64, 128),
            out=(32, 64, 128),
            columns=(64, 128, 256),
            split=(1, 4, 16),
            warps=(4, 8),
            stages=(2, 4),
        ),
        "grouped": dict(rows=(16, 32, 64, 128), out=(32, 64, 128), columns=(64, 128), warps=(4, 8), stages=(2, 4)),
        "attend": dict(columns=(32, 64, 128), split=(8, 32, 64), warps=(4, 8), stages=(1, 2, 3)),
    },
    "hopper": {
        "matmul": dict(
            rows=(8, 16, 32, 64), out=(64, 128), columns=(128, 256, 512), split=(1, 4, 8), stages=(2, 4)
        ),
        "grouped": dict(rows=(8, 16, 32, 64), out=(64, 128), columns=(128, 256, 512), stages=(2, 4)),
        "attend": dict(columns=(64, 128), split=(8, 32, 64), stages=(2, 3)),
    },
}
PACE = 0.02  # seconds that a measurement takes at least
ROUNDS = 3  # the fastest of so many counts


def candidates(platform: str, op: str, rows: int) -> Iterator[Tiles]:
    """The tiles to try for an operation on so many rows (of one expert): the default first."""
    usual = next(t for most, t in tiles.DEFAULTS[platform][op] if rows <= most)
    yield usual
    fields = TRIED[platform][op]
    for values in itertools.product(*fields.values()):
        made = replace(usual, **dict(zip(fields, values, strict=True)))
        if made != usual and made.rows <= max(16, 1 << (rows - 1).bit_length()):
            yield made


def weight(format: str | None, *shape: int) -> Array | QTensor:
    """A weight [.., out, in] of zeros in a format (None: bfloat16): its time depends on no value."""
    if format is None:
        return jnp.zeros(shape, jnp.bfloat16)
    row = encode(np.ones((1, shape[-1]), np.float32), named(format))
    return jax.tree.map(lambda part: jnp.zeros((*shape[:-1], *part.shape[1:]), part.dtype), row)


def tune_product(
    format: str | None, shape: tuple[int, ...], rows: int, *, report: Callable[[str], None] = print
) -> dict[str, Tiles]:
    """The fastest tiles for bf16 rows [rows, in] times a weight [out, in] or, of experts, [E, out, in].

    The result is what `tiles.store` takes; it is empty where the kernels refuse. Raises JaxllmError where there is
    no accelerator.
    """
    w, x = weight(format, *shape), jnp.zeros((rows, shape[-1]), jnp.bfloat16)
    if len(shape) == 2:
        args, op, module, each = (w,), "matmul", dense, rows
    else:
        expert = jnp.sort(jnp.arange(rows, dtype=jnp.int32) % shape[0])
        args, op, module, each = (w, expert), "grouped", grouped, -(-rows // shape[0])
    if not (platform := _taking(f"{op} {list(shape)}", report, module, x, w)):
        return {}
    run = dense.matmul if len(shape) == 2 else grouped.grouped_matmul
    return _fastest(op, platform, dense.key(w), each, run, x, args, report)


def tune_attend(shape: tuple[int, ...], *, report: Callable[[str], None] = print) -> dict[str, Tiles]:
    """The fastest tiles for bf16 attention of `shape` (B, T, K, G, h, S), every slot visible.

    The result and errors as in `tune_product`.
    """
    B, T, K, G, h, S = shape
    q, k = jnp.zeros((B, T, K, G, h), jnp.bfloat16), jnp.zeros((B, K, S, h), jnp.bfloat16)
    if not (platform := _taking(f"attend {list(shape)}", report, attention, q, k, k)):
        return {}
    run = lambda q, *args, **how: attention.attend(q, *args, scale=0.1, **how)
    key = f"bfloat16 h{h} S{S}"
    return _fastest("attend", platform, key, T * G, run, q, (k, k, jnp.ones((B, T, S), bool)), report)


def bodies() -> tuple[str, ...]:
    """Whose kernels are tuned here, the best first. Raises JaxllmError where there are none."""
    if reason := kernels.unavailable():
        raise JaxllmError(f"tile sizes are tuned on the accelerator they are for: {reason}")
    return kernels.bodies()


def _taking(what: str, report: Callable[[str], None], module: ModuleType, *args) -> str | None:
    """The body of `module`'s operation that is taken here; None, reported, where all refuse."""
    reasons = {platform: module.refuses(*args, platform) for platform in bodies()}
    if taking := [platform for platform, reason in reasons.items() if reason is None]:
        return taking[0]
    report(f"{what}: not tuned, {list(reasons.values())[-1]}")
    return None


def _fastest(
    op, platform: str, key: str, rows: int, run: Callable, x: Array, args: tuple, report
) -> dict[str, Tiles]:
    best, found, key = float("inf"), {}, tiles.name(op, platform, key, rows)
    for tried in candidates(platform, op, rows):
        try:
            took = seconds(lambda x, *args, how=tried: run(x, *args, platform=platform, tiles=how), x, *args)
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # it does not fit the device's memory
            report(f"{key}: {tried} does not run ({str(error).splitlines()[0][:60]})")
            continue
        if took < best:
            best, found = took, {key: tried}
            report(f"{key}: {took * 1e6:.1f} us with {tried}")
    return found


def seconds(f: Callable, x: Array, *args) -> float:
    """What one call of f(x, *args) -> array takes, in a loop on the device: the fastest of ROUNDS.

    Each call waits for the one before: x gets a zero that was worked out from its result.
    """

    @jax.jit
    def many(n, x, *args):
        again = lambda _, x: x + (0 * f(x, *args).astype(x.dtype)).reshape(-1)[0]
        return lax.fori_loop(0, n, again, x).reshape(-1)[0]

    def once(n: int) -> float:
        began = time.perf_counter()
        many(n, x, *args).block_until_ready()
        return time.perf_counter() - began

    once(1)
    n = max(1, int(PACE / max(once(2) / 2, 1e-7)))
    return min(once(n) for _ in range(ROUNDS)) / n
