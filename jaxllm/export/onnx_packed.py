"""Packed weights as ONNX Runtime's MatMulNBits wants them: the same codes, shifted by what stands for zero.

Its layout (onnxruntime, docs/ContribOperators.md): B uint8 [N, blocks, block * bits / 8], the lower columns in the
lower bits, scales [N, blocks], and 2^(bits - 1) as the code of zero unless zero_points [N, blocks * bits / 8] say
otherwise. Ours differ in the code of zero, which moves all codes by one number where there is room, and in groups
longer than a block may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor
from jaxllm.quant.formats import Format
from jaxllm.quant.qtensor import unpack

BLOCK = 128  # columns that share a scale where a whole row does
LONGEST = 256  # of a block


@dataclass(frozen=True)
class Blocks:
    """Arrays of a packed weight [.., N, K] as the operator takes them. Each is worked out when it is asked for."""

    bits: int
    block: int
    count: int  # blocks of a row
    codes: Callable[[], np.ndarray]  # u8 [.., N, blocks, block * bits / 8]
    scales: Callable[[], np.ndarray]  # f16 or f32 [.., N, blocks]
    scale_dtype: np.dtype
    zeros: Callable[[], np.ndarray] | None  # u8 [.., N, bytes]


def refused(f: Format) -> str | None:
    """Why the operator cannot take weights of this format, or None."""
    if f.activations:
        return f"activations rounded to {f.activations} have no operator there"
    if f.levels != "int":
        return f"codes that stand for {f.levels} have no operator there"
    if f.zero == "value":
        return "offsets after scaling have no operator there"
    if f.group is not None and not (_power(f.group) and f.group >= 16):
        return f"groups of {f.group} columns have no operator there, which wants 16, 32, 64, 128 or 256"
    return None


def _power(n: int) -> bool:
    return n & (n - 1) == 0


def blocks(q: QTensor, fetch: Callable[[str], np.ndarray]) -> Blocks:
    """How q, whose parts are abstract or not, is written; fetch(part) gives a part's numbers."""
    f = q.format
    bits = 4 if f.bits <= 4 and (f.zero or _fits(f, 8)) else 8
    shared = q.columns_per_scale  # columns
    block = min(shared, LONGEST) if _power(shared) and shared >= 16 else BLOCK
    count = -(-q.columns // block)
    middle = 0 if f.zero else 2 ** (bits - 1)

    def codes() -> np.ndarray:
        u = _integers(q, fetch) + middle
        u = u[..., : q.columns]
        short = count * block - u.shape[-1]
        u = np.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, short)], constant_values=middle).astype(np.uint8)
        if bits == 4:
            u = u[..., 0::2] | u[..., 1::2] << 4
        return u.reshape(*u.shape[:-1], count, -1)

    def scales() -> np.ndarray:
        wide = _wide(fetch("scale"), q.super_scale, fetch)
        return _spread(wide, shared, block, count).astype(dtype)

    def zeros() -> np.ndarray:
        z = _spread(np.asarray(fetch("zero"), np.float32), shared, block, count)
        whole = z.astype(np.uint8)
        if (whole != z).any():
            raise CheckpointError("a weight's zeros are no whole codes, which ONNX Runtime's products cannot take")
        if bits == 8:
            return whole
        whole = np.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, whole.shape[-1] % 2)])
        return whole[..., 0::2] | whole[..., 1::2] << 4

    half = q.scale.dtype.name == "float16" and q.super_scale is None
    dtype = np.dtype(np.float16 if half else np.float32)
    return Blocks(bits, block, count, codes, scales, dtype, zeros if f.zero else None)


def _fits(f: Format, middle: int) -> bool:
    """Whether codes minus `center` plus `middle` are codes of 4 bits."""
    return middle - f.center >= 0 and (f.high or 2**f.bits - 1) - f.center + middle <= 15


def _integers(q: QTensor, fetch) -> np.ndarray:
    """int16 [.., N, C]: codes minus the code of zero, or as they are where zeros are a part."""
    codes = fetch("codes")
    if q.format.bits == 8 and not q.format.zero and not q.format.center:
        return codes.view(np.int8).astype(np.int16)
    high = fetch("high") if q.high is not None else None
    return unpack(codes, high, q.format.bits).astype(np.int16) - q.format.center


def _wide(scale: np.ndarray, above, fetch) -> np.ndarray:
    """Scales f32 [.., N, G], times those above them."""
    scale = scale.astype(np.float32)
    if above is None:
        return scale
    above = fetch("super_scale").astype(np.float32)
    by_super = scale.reshape(*scale.shape[:-1], above.shape[-1], -1) * above[..., None]
    return by_super.reshape(scale.shape)


def _spread(x: np.ndarray, shared: int, block: int, count: int) -> np.ndarray:
    """[.., G] numbers of groups of `shared` columns -> [.., count] of blocks."""
    return x[..., np.arange(count) * block // shared]
