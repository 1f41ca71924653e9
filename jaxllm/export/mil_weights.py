"""Parameters as constants of MIL: arrays as they are, codes as `constexpr_blockwise_shift_scale` has them.

Codes are moved and never rounded. Signed ones of 4 or 8 bits are scale * code; unsigned ones with zero points
scale * (code - zero). Scales are in the dtype that the weight is used in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.quant import Format, QTensor
from jaxllm.quant.qtensor import unpack

HELD = (4, 8)  # bits of a code


def refusal(path: str, f: Format) -> str | None:
    """Why Core ML cannot hold a weight in a format, or None."""
    if f.activations:
        return f"{path} is in {f.name}, whose activations are rounded to {f.activations}, and Core ML has no such"
    if f.levels != "int" or f.bits not in HELD or f.zero == "value" or f.power or f.global_scale:
        return (
            f"{path} is in {f.name}, and Core ML holds groups of codes of 4 or 8 bits; int4_g32, q4f16_1, int8 "
            "and uint4_g32 are such formats"
        )
    return None


def odd(path: str, leaf: QTensor) -> str | None:
    """What of a packed weight Core ML could not hold, though its format is one that it can; or None."""
    extra = [name for name in leaf.parts() if name not in ("codes", "scale", "zero")]
    if extra:
        return f"{path} has {' and '.join(extra)} beside its codes and scales, and Core ML has no place for them"
    if leaf.zero is not None and not (np.asarray(leaf.zero) == np.round(np.asarray(leaf.zero))).all():
        return f"{path} has zero points that are no codes"
    return None


def constant(mb: Any, leaf: QTensor) -> Any:
    """A variable of MIL: the weight, expanded by Core ML."""
    from coremltools.converters.mil.mil import types

    data, offset = codes(leaf)
    kinds = {4: (types.np_int4_dtype, types.np_uint4_dtype), 8: (np.int8, np.uint8)}
    kind = kinds[leaf.format.bits][offset is not None]
    more = {} if offset is None else {"offset": offset.astype(kind)}
    whole = mb.constexpr_blockwise_shift_scale(data=data.astype(kind), scale=scales(leaf), **more)
    if leaf.padded == leaf.columns:
        return whole
    return mb.slice_by_index(x=whole, begin=[0] * len(leaf.shape), end=list(leaf.shape))  # codes fill up a group


def codes(leaf: QTensor) -> tuple[np.ndarray, np.ndarray | None]:
    """(signed codes i8 [.., N, C], None), or unsigned ones u8 and their zero points u8 [.., N, G]."""
    f, packed = leaf.format, np.asarray(leaf.codes)
    if f.bits == 8 and leaf.zero is None and not f.center:
        return packed.view(np.int8), None
    plain = unpack(packed, None, f.bits).astype(np.int16) - f.center
    most = 2 ** (f.bits - 1)
    if leaf.zero is None and plain.min(initial=0) >= -most and plain.max(initial=0) < most:
        return plain.astype(np.int8), None
    zero = np.zeros(leaf.scale.shape) if leaf.zero is None else np.asarray(leaf.zero, np.float32)
    return (plain + f.center).astype(np.uint8), (zero + f.center).astype(np.uint8)


def scales(leaf: QTensor) -> np.ndarray:
    """[.., N, G], in the dtype of the weight."""
    return np.asarray(leaf.scale).astype(leaf.dtype)
