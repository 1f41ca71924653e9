"""QTensor: a packed weight as one leaf of the parameter tree, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.quant.formats import FLOAT8, LEVELS, Format

Array = jax.Array | np.ndarray

# Codes of b bits are stored as little-endian fields of these widths in bytes: the low bits, then the high ones.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
# The arrays of a QTensor, in the order of its fields; files name them so.
PARTS = ("codes", "scale", "high", "zero", "offset", "super_scale", "super_offset", "order", "input_scale")
_WHOLE = ("order", "input_scale")  # these have no out axis


@partial(
    jax.tree_util.register_dataclass,
    data_fields=PARTS,
    meta_fields=("format", "columns", "dtype_name"),
)
@dataclass(frozen=True)
class QTensor:
    """A weight [.., out, in] in few bits. Shape and dtype are those of the values it stands for.

    value = (level(code) - zero[n, g]) * scale[n, g] * super_scale[n, s] + offset[n, g] * super_offset[n, s]

    with g the group of column k and s its super-group. N = out rows, C = columns padded to whole groups,
    G = groups, S = super-groups. All parts may have leading axes (experts). Parts that a format lacks are None.
    """

    codes: Array  # u8 [.., N, C * w // 8], fields of w bits, column 0 lowest; int8 or float8: [.., N, C]
    scale: Array  # [.., N, G]
    high: Array | None = None  # u8: the bits above the first field, packed likewise (3, 5 and 6 bits)
    zero: Array | None = None  # [.., N, G] in units of codes
    offset: Array | None = None  # [.., N, G]
    super_scale: Array | None = None  # [.., N, S], S divides G
    super_offset: Array | None = None  # [.., N, S]
    order: Array | None = None  # i32 [.., in]: column c of the codes is column order[c] of the weight
    input_scale: Array | None = None  # f32 []: what activations are divided by before they are rounded
    format: Format = None
    columns: int = 0  # in
    dtype_name: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.columns)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype_name)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    @property
    def padded(self) -> int:
        """C: the columns that there are codes for."""
        return self.codes.shape[-1] * 8 // PLANES[self.format.bits][0]

    @property
    def columns_per_scale(self) -> int:
        """Columns that share a scale, those that fill up the last group included."""
        return self.padded // self.scale.shape[-1]

    @property
    def divisible(self) -> bool:
        """Whether some groups of columns are a weight of their own, whose products are part of a sum.

        Not where activations are rounded by what a whole row of them holds, nor where codes fill up a group."""
        return not self.format.activations and self.padded == self.columns and self.order is None

    def parts(self) -> dict[str, Array]:
        """The arrays it consists of, by field name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def astype(self, dtype: Any) -> QTensor:
        """The same codes standing for values of another dtype."""
        return replace(self, dtype_name=jnp.dtype(dtype).name)

    def row_parts(self) -> dict[str, Array]:
        """The parts with an out axis: whatever moves rows of the weight moves them likewise in each."""
        return {name: part for name, part in self.parts().items() if name not in _WHOLE}

    def __repr__(self) -> str:
        return f"QTensor({self.format.name}, {list(self.shape)}, {self.dtype_name})"


def pack(codes: Array, bits: int) -> tuple[Array, Array | None]:
    """codes (integers 0 .. 2**bits - 1) [.., C] -> u8 planes: the low fields and, for 3, 5, 6 bits, the high ones.

    C is a multiple of 8."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return (*planes, None)[:2]


def _pack_plane(codes: Array, width: int) -> Array:
    xp = _module(codes)
    per = 8 // width
    fields_ = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, per)
    out = fields_[..., 0]
    for i in range(1, per):
        out = out | xp.left_shift(fields_[..., i], np.uint8(i * width))
    return out


def unpack(low: Array, high: Array | None, bits: int) -> Array:
    """The inverse of `pack`: u8 [.., C]."""
    widths = PLANES[bits]
    codes = _unpack_plane(low, widths[0])
    if high is None:
        return codes
    return codes | _module(codes).left_shift(_unpack_plane(high, widths[1]), np.uint8(widths[0]))


def _unpack_plane(packed: Array, width: int) -> Array:
    if width == 8:
        return packed
    xp = _module(packed)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    codes = xp.right_shift(packed[..., None], shifts) & np.uint8(2**width - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _module(x: Array) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def levels(q: QTensor) -> Array:
    """What the codes stand for before zeros and scales: f32 [.., N, C]."""
    f, xp = q.format, _module(q.codes)
    if f.levels in FLOAT8:
        return q.codes.astype(np.float32)
    codes = unpack(q.codes, q.high, f.bits)
    if f.levels == "int":
        return codes.astype(np.float32) - np.float32(f.center) if f.center else codes.astype(np.float32)
    return xp.take(xp.asarray(LEVELS[f.levels], np.float32), codes.astype(np.int32), axis=0)


def dequantize(q: QTensor, dtype: Any = None) -> Array:
    """The values [.., N, in] in `dtype` (default q.dtype), worked out in f32. numpy parts give a numpy array."""
    x = levels(q)
    x = x.reshape(*x.shape[:-1], q.scale.shape[-1], -1)  # [.., N, G, columns of a group]
    if q.zero is not None:
        x = x - q.zero.astype(np.float32)[..., None]
    x = x * _wide(q.scale, q.super_scale)[..., None]
    if q.offset is not None:
        x = x + _wide(q.offset, q.super_offset)[..., None]
    x = x.reshape(*x.shape[:-2], -1)
    if q.order is not None:
        x = _in_order(x, q.order)
    return x[..., : q.columns].astype(dtype or q.dtype)


def _wide(part: Array, above: Array | None) -> Array:
    """Scales f32 [.., N, G], times those above them [.., N, S]."""
    part = part.astype(np.float32)
    if above is None:
        return part
    by_super = part.reshape(*part.shape[:-1], above.shape[-1], -1) * above.astype(np.float32)[..., None]
    return by_super.reshape(part.shape)


def _in_order(x: Array, order: Array) -> Array:
    xp = _module(x)
    place = xp.argsort(order, axis=-1)  # the inverse permutation
    return xp.take_along_axis(x, xp.broadcast_to(place[..., None, :], (*x.shape[:-1], place.shape[-1])), -1)


def rows(q: QTensor, index: Array) -> QTensor:
    """The rows `index` i32 [...] of q [N, in]: shape [..., in]."""
    return replace(q, **{name: part[index] for name, part in q.row_parts().items()})


def select(q: QTensor, index: Any) -> QTensor:
    """Element `index` of the leading axis (one expert) of q [E, .., in]."""
    shared = ("input_scale",) if q.input_scale is not None and np.ndim(q.input_scale) == 0 else ()
    return replace(q, **{name: part[index] for name, part in q.parts().items() if name not in shared})
