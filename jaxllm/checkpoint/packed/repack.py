"""Codes as files have them -> QTensor's one packing, bit for bit; scales keep their own dtype. numpy only.

N out rows, K in columns, C columns padded to whole groups and bytes, G groups of a row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxllm.quant import Format, QTensor
from jaxllm.quant.qtensor import pack, unpack

ROWS_AT_A_TIME = 2**24  # bits unpacked to bytes at once


def fields(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` fields of each row u8 [N, bytes], lowest bits first, without gaps: u8 [N, count]."""
    if 8 % bits == 0:
        return unpack(np.ascontiguousarray(data), None, bits)[:, :count]
    out = np.empty((len(data), count), np.uint8)
    step = max(1, ROWS_AT_A_TIME // max(1, 8 * data.shape[1]))
    for start in range(0, len(data), step):
        flat = np.unpackbits(data[start : start + step], axis=1, count=count * bits, bitorder="little")
        flat = flat.reshape(len(flat), count, bits)
        out[start : start + step] = np.packbits(flat, axis=2, bitorder="little")[..., 0]
    return out


def octets(words: np.ndarray) -> np.ndarray:
    """Integers [N, W] as the bytes that hold them, lowest first: u8 [N, W * size]."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)


def padded(columns: int, group: int | None, bits: int) -> tuple[int, int]:
    """(C, G) for rows of so many columns: whole groups, and whole bytes in every plane."""
    unit = 1 if bits == 8 else 8
    if group is None:
        return -(-columns // unit) * unit, 1
    step = unit // math.gcd(group, unit)
    groups = -(-columns // group)
    groups = -(-groups // step) * step
    return groups * group, groups


def widened(x: np.ndarray, columns: int) -> np.ndarray:
    """x [N, ..] with zeros on the right, up to so many columns."""
    more = columns - x.shape[-1]
    return np.pad(x, ((0, 0), (0, more))) if more else x


def integers(
    data: np.ndarray,
    *,
    bits: int,
    columns: int,
    group: int | None,
    scale: np.ndarray,
    zero: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    center: int | None = None,
    loose: bool = False,
    **rest: Any,
) -> QTensor:
    """Unsigned codes as rows of fields without gaps, lowest bits first, u8 [N, bytes] -> QTensor.

    scale [N, G]; zero [N, G] in codes, or None where code `center` stands for zero (the middle one by default).
    loose: there is one code in each byte. Symmetric 8-bit codes become signed bytes. `rest`: further fields of
    QTensor, and activations of its format.
    """
    center = (2 ** (bits - 1) if zero is None else 0) if center is None else center
    C, G = padded(columns, group, bits)
    if bits == 8 and center == 128:
        codes, high, center = widened((data[:, :columns] ^ np.uint8(128)).view(np.int8), C), None, 0
    elif 8 % bits == 0 and columns == C and not loose:
        codes, high = data[:, : columns * bits // 8], None
    else:
        codes, high = pack(widened(data if loose else fields(data, bits, columns), C), bits)
    parts = dict(columns=columns, group=group, high=high, center=center, **_padded_to(G, scale, zero, offset))
    return made(f"{'int' if zero is None else 'uint'}{bits}", codes, bits=bits, **parts, **rest)


def _padded_to(G: int, scale: np.ndarray, zero: np.ndarray | None, offset: np.ndarray | None) -> dict[str, Any]:
    parts = dict(scale=scale, zero=zero, offset=offset)
    return {name: None if part is None else widened(part, G) for name, part in parts.items()}


def signed_bytes(
    codes: np.ndarray, *, group: int | None, scale: np.ndarray, zero: np.ndarray | None = None, **rest: Any
) -> QTensor:
    """int8 codes [N, K], scale [N, G] and zero [N, G] in codes -> QTensor."""
    C, G = padded(codes.shape[1], group, 8)
    parts = dict(columns=codes.shape[1], group=group, **_padded_to(G, scale, zero, None))
    return made("int8", widened(codes, C), bits=8, **parts, **rest)


def floats8(codes: np.ndarray, *, group: int | None, scale: np.ndarray, **rest: Any) -> QTensor:
    """float8 codes [N, K] and scale [N, G] -> QTensor."""
    C, G = padded(codes.shape[1], group, 8)
    kind = codes.dtype.name
    parts = dict(columns=codes.shape[1], group=group, levels=kind, scale=widened(scale, G))
    return made(kind.removesuffix("fn").replace("float8", "fp8"), widened(codes, C), bits=8, **parts, **rest)


def table4(
    data: np.ndarray, levels: str, *, columns: int, group: int | None, scale: np.ndarray, **rest: Any
) -> QTensor:
    """Codes of a table of 16 levels, two a byte, the first one low: u8 [.., N, K / 2] -> QTensor."""
    C, G = padded(columns, group, 4)
    if columns != C:
        data = pack(widened(fields(data, 4, columns), C), 4)[0]
        scale = widened(scale, G)
    return made(levels, data, bits=4, levels=levels, columns=columns, group=group, scale=scale, **rest)


def made(
    kind: str,
    codes: np.ndarray,
    *,
    bits: int,
    group: int | None,
    scale: np.ndarray,
    columns: int,
    dtype: str,
    levels: str = "int",
    center: int = 0,
    zero: np.ndarray | None = None,
    activations: str | None = None,
    name: str | None = None,
    **parts: Any,
) -> QTensor:
    """The QTensor of these parts, with a Format that says so; `name` is the format's, made up where not given."""
    unsigned = bool(center) or zero is not None
    format = Format(
        name or kind + (f"_g{group}" if group else "") + ("_a8" if activations else ""),
        bits,
        group,
        levels,
        center=center,
        scale=scale.dtype.name,
        zero=None if zero is None else "code",
        low=0 if unsigned else -(2 ** (bits - 1)),
        high=2**bits - 1 if unsigned else 2 ** (bits - 1) - 1,
        activations=activations,
    )
    return QTensor(codes, scale, zero=zero, format=format, columns=columns, dtype_name=dtype, **parts)
