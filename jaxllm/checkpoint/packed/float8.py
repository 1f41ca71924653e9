"""Weights in float8: as Hugging Face's "fp8" (DeepSeek, Qwen, MiniMax) and "fbgemm_fp8" save them.

weight e4m3 [N, K]. fp8: weight_scale_inv, what each block of block_size [rows, columns] is multiplied by,
[ceil(N / rows), ceil(K / columns)], or one for the whole matrix; activation_scale where activations are divided by
a number found beforehand. fbgemm_fp8: weight_scale, one for each row. Activations are rounded to e4m3 with a scale
for each row (each of its groups, for blocks); the bound that fbgemm_fp8 puts on that scale
(activation_scale_ub) serves to clip outliers and is not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxllm.checkpoint.packed.repack import floats8
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, by_leaf, finite
from jaxllm.errors import CheckpointError
from jaxllm.families.fields import Fields
from jaxllm.quant import QTensor

E4M3 = "float8_e4m3fn"
POWERS = "float8_e8m0fnu"
FLOAT8 = (E4M3, "float8_e5m2")
SCALES = (*FLOATS, POWERS, "uint8")  # u8: the exponents of powers of two
BLOCK_LEAVES = ("weight_scale_inv", "activation_scale", "weight_scale", "input_scale")


def fp8(job: Job) -> Scheme:
    """Checkpoints of quant_method "fp8": blocks or one scale for a matrix, dynamic or static activations."""
    c = job.settings
    static = c.choice("activation_scheme", {"dynamic": False, "static": True}, "dynamic")
    block = block_size(c, "weight_block_size")
    c.expect("fmt", "e4m3", "float8_e4m3fn")

    def reader(module: Module) -> Read:
        leaf = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
        divisor = next((n for n in ("activation_scale", "input_scale") if module.has(n)), None)
        if static and divisor is None:
            raise CheckpointError("activation_scale is missing, and the config says that activations are static")
        return scaled(module, leaf, block, dtype=job.dtype, activations=E4M3, divisor=divisor if static else None)

    return Scheme(by_leaf(BLOCK_LEAVES), reader)


def fbgemm_fp8(job: Job) -> Scheme:
    """Checkpoints of quant_method "fbgemm_fp8": a scale for each row."""

    def reader(module: Module) -> Read:
        return scaled(module, "weight_scale", None, dtype=job.dtype, activations=E4M3)

    return Scheme(by_leaf(("weight_scale", "input_scale_ub")), reader)


def block_size(c: Fields, name: str) -> tuple[int, int] | None:
    """[rows, columns] of a block, None where there are none; anything else is a problem."""
    value: Any = c.raw(name)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and 1 <= n < 2**31 for n in value):
        return tuple(value)
    c.problem(f"{name} should be two sizes from 1, rows and columns, got {value!r:.60}")
    return None


def scaled(
    module: Module,
    leaf: str,
    block: tuple[int, int] | None,
    *,
    dtype: str,
    activations: str | None,
    divisor: str | None = None,
) -> Read:
    """The reader of float8 weights with one scale for the matrix, for each row, or for each block.

    leaf: the scales' name; divisor: that of what activations are divided by.
    Raises CheckpointError where shapes do not fit."""
    N, K = module.shape("weight", FLOAT8)
    scale = spread(module, leaf, N, K, block)
    if divisor:
        module.expect(divisor, FLOATS, (), (1,))
    group = None if block is None else block[1]

    def read() -> QTensor:
        given = None if divisor is None else positive(module, divisor)
        common = dict(dtype=dtype, activations=activations, input_scale=given)
        return floats8(module.read("weight"), group=group, scale=scale(), **common)

    return read


def spread(
    module: Module, leaf: str, N: int, K: int, block: tuple[int, int] | None, dtypes: tuple[str, ...] = SCALES
) -> Callable[[], np.ndarray]:
    """The reader of scales [N, G] that the file has for the whole matrix, for rows, or for blocks.

    Raises CheckpointError where their shape is none of these."""
    if block is not None:
        module.expect(leaf, dtypes, (-(-N // block[0]), -(-K // block[1])))
        return lambda: np.repeat(scales(module, leaf), block[0], 0)[:N]
    module.expect(leaf, dtypes, (), (1,), (1, 1), (N,), (N, 1))
    return lambda: np.ascontiguousarray(np.broadcast_to(scales(module, leaf).reshape(-1, 1), (N, 1)))


def scales(module: Module, leaf: str) -> np.ndarray:
    """A tensor of scales; exponents u8 become the powers they stand for.

    Raises CheckpointError where one is infinite or not a number."""
    return finite(powers(module.read(leaf)), leaf)


def powers(x: np.ndarray) -> np.ndarray:
    """Exponents u8 as the powers of two they stand for (OCP Microscaling Formats 1.0); others as they are."""
    return x.view(np.dtype(POWERS)) if x.dtype == np.uint8 else x


def positive(module: Module, leaf: str) -> np.ndarray:
    """What activations are divided by: f32 [], above zero.

    Raises CheckpointError where it is not."""
    x = module.read_finite(leaf).astype(np.float32).reshape(())
    if x <= 0:
        raise CheckpointError(f"{leaf} should be above 0, it is {x}")
    return x
