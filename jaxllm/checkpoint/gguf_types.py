"""GGUF's tensor types: blocks of a row's values, kept packed where a QTensor says the same, else expanded.

Source of the layouts: github.com/ggml-org/ggml, ggml-common.h (the structs) and ggml-quants.c
(dequantize_row_*), whose order of operations is followed so that values come out equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.gguf_grids import grid
from jaxllm.quant.formats import FORMATS, Format
from jaxllm.quant.qtensor import QTensor, dequantize, pack

AT_ONCE = 2**22  # values unpacked at a time: what a tensor needs beside itself
Parts = dict[str, np.ndarray]


class TensorType(NamedTuple):
    """One type: `block` values of a row in `nbytes` bytes, and which of three ways it is read.

    dtype: the values are plain; format and split: they become a QTensor; expand: they become floats.
    """

    name: str
    block: int
    nbytes: int
    dtype: np.dtype | None = None
    format: Format | None = None
    split: Callable[[np.ndarray], Parts] | None = None
    expand: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def expanded(self) -> bool:
        """Whether it takes more memory than in the file."""
        return self.expand is not None


def values(kind: TensorType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | QTensor:
    """A tensor's bytes u8 [n] as an array or a packed weight of `shape` (GGUF's sizes, last first: [.., out, in]).

    A vector of a packed type becomes f32, and what no QTensor can say bf16.
    """
    if kind.dtype is not None:
        return raw.view(kind.dtype).reshape(shape)
    if kind.expand:
        return _expanded(kind, raw, shape, ml_dtypes.bfloat16)
    q = _packed(kind, raw, shape)
    return q if len(shape) > 1 else dequantize(q, np.float32)


def floats(kind: TensorType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The same as f32, exactly."""
    if kind.expand:
        return _expanded(kind, raw, shape, np.float32)
    x = values(kind, raw, shape)
    return dequantize(x, np.float32) if isinstance(x, QTensor) else x.astype(np.float32)


def _rows(kind: TensorType, raw: np.ndarray, shape: tuple[int, ...]):
    """(where, blocks u8 [rows, blocks of a row, bytes]) of some rows at a time."""
    blocks = raw.reshape(-1, shape[-1] // kind.block, kind.nbytes)
    step = max(1, AT_ONCE // shape[-1])
    for at in range(0, len(blocks), step):
        yield slice(at, at + step), blocks[at : at + step]


def _expanded(kind: TensorType, raw: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    out = np.empty((raw.size // kind.nbytes * kind.block // shape[-1], shape[-1]), dtype)
    for where, blocks in _rows(kind, raw, shape):
        out[where] = kind.expand(blocks).reshape(-1, shape[-1])
    return out.reshape(shape)


def _packed(kind: TensorType, raw: np.ndarray, shape: tuple[int, ...]) -> QTensor:
    whole: Parts = {}
    rows = raw.size // kind.nbytes * kind.block // shape[-1]
    for where, blocks in _rows(kind, raw, shape):
        for name, part in _parts(kind, blocks).items():
            if name not in whole:
                whole[name] = np.empty((rows, part.shape[-1]), part.dtype)
            whole[name][where] = part
    parts = {name: part.reshape(*shape[:-1], -1) for name, part in whole.items()}
    return QTensor(**parts, format=kind.format, columns=shape[-1])


def _parts(kind: TensorType, blocks: np.ndarray) -> Parts:
    """The QTensor's arrays [rows, ..] of some rows."""
    parts = {name: part.reshape(len(blocks), -1) for name, part in kind.split(blocks).items()}
    if kind.format.bits < 8:
        low, high = pack(parts["codes"], kind.format.bits)
        parts |= {"codes": low} if high is None else {"codes": low, "high": high}
    return parts


# ---- pieces of a block: every function takes u8 [rows, blocks, bytes] and keeps the first two axes ---------


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.float16)


def _signed(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.int8)


def _words(x: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(x).view(dtype)


def _spread(x: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Fields of `bits` bits: the lowest of `run` bytes, then the next of these, then those of the next run."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = x.reshape(*x.shape[:-1], -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return fields.reshape(*x.shape[:-1], -1)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(x, axis=-1, bitorder="little")


def _q4_0(b: np.ndarray) -> Parts:
    return dict(codes=_spread(b[..., 2:], 16, 4), scale=_half(b[..., :2]))


def _q4_1(b: np.ndarray) -> Parts:
    return dict(codes=_spread(b[..., 4:], 16, 4), scale=_half(b[..., :2]), offset=_half(b[..., 2:4]))


def _q5_0(b: np.ndarray) -> Parts:
    return dict(codes=_spread(b[..., 6:], 16, 4) | _bits(b[..., 2:6]) << 4, scale=_half(b[..., :2]))


def _q5_1(b: np.ndarray) -> Parts:
    codes = _spread(b[..., 8:], 16, 4) | _bits(b[..., 4:8]) << 4
    return dict(codes=codes, scale=_half(b[..., :2]), offset=_half(b[..., 2:4]))


def _q8_0(b: np.ndarray) -> Parts:
    return dict(codes=_signed(b[..., 2:]), scale=_half(b[..., :2]))


def _q2_k(b: np.ndarray) -> Parts:
    return dict(
        codes=_spread(b[..., 16:80], 32, 2),
        scale=b[..., :16] & 15,
        offset=b[..., :16] >> 4,
        super_scale=_half(b[..., 80:82]),
        super_offset=-_half(b[..., 82:84]),
    )


def _q3_k(b: np.ndarray) -> Parts:
    low, high = _spread(b[..., 96:104], 8, 4), _spread(b[..., 104:108], 4, 2)
    scale = (low | high << 4).astype(np.int8) - np.int8(32)
    codes = _spread(b[..., 32:96], 32, 2) | _spread(b[..., :32], 32, 1) << 2
    return dict(codes=codes, scale=scale, super_scale=_half(b[..., 108:]))


def _six_bit_pairs(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes as 8 scales and 8 minima of 6 bits."""
    d, m, rest = b[..., :4], b[..., 4:8], b[..., 8:]
    scale = np.concatenate([d & 63, rest & 15 | d >> 2 & 48], -1)
    return scale, np.concatenate([m & 63, rest >> 4 | m >> 2 & 48], -1)


def _k_scales(b: np.ndarray) -> Parts:
    scale, least = _six_bit_pairs(b[..., 4:16])
    return dict(scale=scale, offset=least, super_scale=_half(b[..., :2]), super_offset=-_half(b[..., 2:4]))


def _q4_k(b: np.ndarray) -> Parts:
    return dict(codes=_spread(b[..., 16:], 32, 4), **_k_scales(b))


def _q5_k(b: np.ndarray) -> Parts:
    return dict(codes=_spread(b[..., 48:], 32, 4) | _spread(b[..., 16:48], 32, 1) << 4, **_k_scales(b))


def _q6_k(b: np.ndarray) -> Parts:
    codes = _spread(b[..., :128], 64, 4) | _spread(b[..., 128:192], 32, 2) << 4
    return dict(codes=codes, scale=_signed(b[..., 192:208]), super_scale=_half(b[..., 208:]))


def _iq4_xs(b: np.ndarray) -> Parts:
    low, high = _spread(b[..., 4:8], 1, 4), _spread(b[..., 2:4], 1, 2)
    scale = (low | high << 4).astype(np.int8) - np.int8(32)
    return dict(codes=_spread(b[..., 8:], 16, 4), scale=scale, super_scale=_half(b[..., :2]))


def _ternary_of_five(b: np.ndarray, run: int, count: int = 5) -> np.ndarray:
    """`count` base-3 digits of each byte, as fixed-point fractions; those of `run` bytes in turn."""
    powers = np.asarray([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
    x = b.reshape(*b.shape[:-1], -1, 1, run) * powers  # wraps: what is left is the fraction
    return ((x.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(*b.shape[:-1], -1)


def _tq1_0(b: np.ndarray) -> Parts:
    digits = [_ternary_of_five(b[..., :32], 32), _ternary_of_five(b[..., 32:48], 16)]
    digits.append(_ternary_of_five(b[..., 48:52], 4, 4))
    return dict(codes=np.concatenate(digits, -1), scale=_half(b[..., 52:]))


def _tq2_0(b: np.ndarray) -> Parts:
    return dict(codes=_spread(b[..., :64], 32, 2), scale=_half(b[..., 64:]))


def _e2m1(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 8, np.uint8(0), codes)  # ggml has no negative zero


def _mxfp4(b: np.ndarray) -> Parts:
    return dict(codes=_e2m1(_spread(b[..., 1:], 16, 4)), scale=_words(b[..., :1], ml_dtypes.float8_e8m0fnu))


def _nvfp4(b: np.ndarray) -> Parts:
    scale = b[..., :4] & 127
    scale = np.where(scale == 127, np.uint8(0), scale)  # what would be NaN is nothing in ggml
    return dict(codes=_e2m1(_spread(b[..., 4:], 8, 4)), scale=_words(scale, ml_dtypes.float8_e4m3fn))


# ---- types whose codes stand for rows of a codebook --------------------------------------------------------


def _parity_signs(index: np.ndarray) -> np.ndarray:
    """Seven signs and an eighth that makes their number even, from 7 bits: +1 or -1, f32 [.., 8]."""
    index = index.astype(np.uint8)
    even = np.bitwise_count(index) & np.uint8(1)
    return _sign((index | even << 7)[..., None])


def _sign(x: np.ndarray) -> np.ndarray:
    """The bits of bytes [.., n] as +1 and -1, f32 [.., 8 n]."""
    return np.float32(1) - np.float32(2) * _bits(x).astype(np.float32)


def _times(scale: np.ndarray, levels: np.ndarray, signs: np.ndarray | float = 1.0) -> np.ndarray:
    """Scales [r, b, g] times the levels [r, b, values], g of them taking equal shares, times their signs."""
    shares = levels.reshape(*scale.shape, -1)
    signs = signs.reshape(shares.shape) if isinstance(signs, np.ndarray) else np.float32(signs)
    return (scale[..., None] * shares * signs).reshape(*scale.shape[:2], -1)


def _iq2_xxs(b: np.ndarray) -> np.ndarray:
    words = _words(b[..., 2:], np.uint32)  # eight pairs: four codes; four sign indices and a scale
    codes, rest = np.ascontiguousarray(words[..., 0::2]).view(np.uint8), words[..., 1::2]
    scale = _half(b[..., :2]).astype(np.float32) * (np.float32(0.5) + (rest >> 28).astype(np.float32))
    signs = _parity_signs(rest[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127))
    return _times(scale * np.float32(0.25), grid("IQ2_XXS")[codes], signs)


def _quarter_scales(d: np.ndarray, packed: np.ndarray) -> np.ndarray:
    steps = np.float32(0.5) + _spread(packed, 1, 4).astype(np.float32)
    return _half(d).astype(np.float32) * steps * np.float32(0.25)


def _iq2_xs(b: np.ndarray) -> np.ndarray:
    codes = _words(b[..., 2:66], np.uint16)
    scale = _quarter_scales(b[..., :2], b[..., 66:])
    return _times(scale, grid("IQ2_XS")[codes & 511], _parity_signs(codes >> 9))


def _iq2_s(b: np.ndarray) -> np.ndarray:
    codes = b[..., 2:34].astype(np.uint16) | _spread(b[..., 66:74], 1, 2).astype(np.uint16) << 8
    scale = _quarter_scales(b[..., :2], b[..., 74:])
    return _times(scale, grid("IQ2_S")[codes], _sign(b[..., 34:66]))


def _iq3_xxs(b: np.ndarray) -> np.ndarray:
    rest = _words(b[..., 66:], np.uint32)
    scale = _half(b[..., :2]).astype(np.float32) * (np.float32(0.5) + (rest >> 28).astype(np.float32))
    signs = _parity_signs(rest[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127))
    return _times(scale * np.float32(0.5), grid("IQ3_XXS")[b[..., 2:66]], signs)


def _iq3_s(b: np.ndarray) -> np.ndarray:
    codes = b[..., 2:66].astype(np.uint16) | _bits(b[..., 66:74]).astype(np.uint16) << 8
    steps = (1 + 2 * _spread(b[..., 106:], 1, 4)).astype(np.float32)
    scale = _half(b[..., :2]).astype(np.float32) * steps
    return _times(scale, grid("IQ3_S")[codes], _sign(b[..., 74:106]))


def _shifted(levels: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Levels [r, b, n, 8] with an eighth added, or taken away where `negative` [r, b, m] says so."""
    step = np.where(negative, np.float32(-0.125), np.float32(0.125))
    return levels.reshape(*step.shape, -1) + step[..., None]


def _iq1_s(b: np.ndarray) -> np.ndarray:
    high = _words(b[..., 34:], np.uint16)
    scale = _half(b[..., :2]).astype(np.float32) * (2 * (high >> 12 & 7) + 1).astype(np.float32)
    third = (high[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)) << 8
    codes = b[..., 2:34].astype(np.uint16) | third.reshape(*high.shape[:2], -1)
    return _times(scale, _shifted(grid("IQ1_S")[codes], high & 0x8000 != 0))


def _iq1_m(b: np.ndarray) -> np.ndarray:
    packed = _words(b[..., 48:], np.uint16)  # four words of four scales of 3 bits and a nibble of the f16 above
    nibbles = packed >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    above = np.bitwise_or.reduce(nibbles, -1, keepdims=True).astype(np.uint16).view(np.float16)
    steps = packed[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
    scale = above.astype(np.float32) * (2 * steps.reshape(*packed.shape[:2], -1) + 1).astype(np.float32)
    high = _spread(b[..., 32:48], 1, 4)
    codes = b[..., :32].astype(np.uint16) | (high & 7).astype(np.uint16) << 8
    return _times(scale, _shifted(grid("IQ1_S")[codes], high & 8 != 0))


# ---- the table ---------------------------------------------------------------------------------------------


def _groups(name: str, bits: int, group: int, center: int = 0, **changes) -> Format:
    return Format(name, bits, group, center=center, high=2**bits - 1, **changes)


_SUB = dict(scale="int8")
_SUBS = dict(scale="uint8", zero="value")
_TERNARY = replace(FORMATS["ternary"], group=256, scale="float16", rows=1, activations=None, ends=True)
_IQ4 = Format("iq4_nl", 4, 32, "iq4")

TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, np.dtype("<f4")),
    1: TensorType("F16", 1, 2, np.dtype("<f2")),
    2: TensorType("Q4_0", 32, 18, format=_groups("q4_0", 4, 32, 8), split=_q4_0),
    3: TensorType("Q4_1", 32, 20, format=_groups("q4_1", 4, 32, zero="value"), split=_q4_1),
    6: TensorType("Q5_0", 32, 22, format=_groups("q5_0", 5, 32, 16), split=_q5_0),
    7: TensorType("Q5_1", 32, 24, format=_groups("q5_1", 5, 32, zero="value"), split=_q5_1),
    8: TensorType("Q8_0", 32, 34, format=replace(FORMATS["int8_g32"], name="q8_0"), split=_q8_0),
    10: TensorType("Q2_K", 256, 84, format=_groups("q2_k", 2, 16, **_SUBS), split=_q2_k),
    11: TensorType("Q3_K", 256, 110, format=_groups("q3_k", 3, 16, 4, **_SUB), split=_q3_k),
    12: TensorType("Q4_K", 256, 144, format=_groups("q4_k", 4, 32, **_SUBS), split=_q4_k),
    13: TensorType("Q5_K", 256, 176, format=_groups("q5_k", 5, 32, **_SUBS), split=_q5_k),
    14: TensorType("Q6_K", 256, 210, format=_groups("q6_k", 6, 16, 32, **_SUB), split=_q6_k),
    16: TensorType("IQ2_XXS", 256, 66, expand=_iq2_xxs),
    17: TensorType("IQ2_XS", 256, 74, expand=_iq2_xs),
    18: TensorType("IQ3_XXS", 256, 98, expand=_iq3_xxs),
    19: TensorType("IQ1_S", 256, 50, expand=_iq1_s),
    20: TensorType("IQ4_NL", 32, 18, format=_IQ4, split=_q4_0),
    21: TensorType("IQ3_S", 256, 110, expand=_iq3_s),
    22: TensorType("IQ2_S", 256, 82, expand=_iq2_s),
    23: TensorType("IQ4_XS", 256, 136, format=replace(_IQ4, name="iq4_xs", **_SUB), split=_iq4_xs),
    24: TensorType("I8", 1, 1, np.dtype("i1")),
    25: TensorType("I16", 1, 2, np.dtype("<i2")),
    26: TensorType("I32", 1, 4, np.dtype("<i4")),
    27: TensorType("I64", 1, 8, np.dtype("<i8")),
    28: TensorType("F64", 1, 8, np.dtype("<f8")),
    29: TensorType("IQ1_M", 256, 56, expand=_iq1_m),
    30: TensorType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    34: TensorType("TQ1_0", 256, 54, format=replace(_TERNARY, name="tq1_0"), split=_tq1_0),
    35: TensorType("TQ2_0", 256, 66, format=replace(_TERNARY, name="tq2_0", high=3), split=_tq2_0),
    39: TensorType("MXFP4", 32, 17, format=FORMATS["mxfp4"], split=_mxfp4),
    40: TensorType("NVFP4", 64, 36, format=FORMATS["nvfp4"], split=_nvfp4),
}
