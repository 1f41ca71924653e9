"""How a tile of a packed weight becomes numbers inside a kernel: what both platforms share.

Codes of 4 bits lie two to a byte, column 2j in the low half of byte j. No kernel puts them next to each other:
the activations' even and odd columns are taken apart instead (`planes`), and each half is multiplied by its own.
Dtypes that the hardware lacks travel as integers of their size (`operands`) and become floats by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.quant import QTensor
from jaxllm.quant.formats import FLOAT8

Array = jax.Array

FLOATS = (jnp.float32, jnp.bfloat16)
AS_INTEGERS = {"float16": jnp.uint16, "float8_e8m0fnu": jnp.uint8}
SCALES = ("float16", "bfloat16", "float32", "float8_e8m0fnu")
ZEROS = ("uint8", "int8", *SCALES[:3])
# How many bfloat16 numbers add up to exactly one of the dtype.
PIECES = {"float16": 2, "bfloat16": 1, "float32": 3, "float8_e8m0fnu": 1, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class Coding:
    """What the codes of a weight [E, N, C] mean; static, so that it is part of a kernel's program."""

    levels: str  # "int": the code less `center`; "e2m1"; "float": the codes are the numbers
    planes: int  # columns in one stored element: 2 for 4 bits, else 1
    columns: int  # C, whole groups
    center: int = 0
    group: int | None = None  # columns that share a scale; None: a scale for each row, or none at all
    scale: str | None = None  # dtype; None: no scales
    zero: str | None = None  # dtype of the zeros, which only groups have

    @property
    def width(self) -> int:
        """Stored elements of a row."""
        return self.columns // self.planes

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.columns // self.group if self.group else 1


def refuses(q: QTensor) -> str | None:
    """Why no kernel multiplies by q [.., N, in]; None where they do."""
    f = q.format
    if f.activations:
        return f"{f.name} rounds activations"
    if other := [name for name in ("high", "offset", "super_scale") if getattr(q, name) is not None]:
        return f"a weight with {other[0].replace('_', ' ')}s is not known to it"
    if f.bits not in (4, 8) or f.levels not in ("int", "e2m1", *FLOAT8):
        return f"it knows integers, e2m1 and float8 in 4 or 8 bits, not {f.levels} in {f.bits}"
    if q.scale.dtype.name not in SCALES or (q.zero is not None and q.zero.dtype.name not in ZEROS):
        return f"scales of {q.scale.dtype} or zeros of {q.zero is not None and q.zero.dtype} are not known to it"
    return _refuses_groups(q)


def _refuses_groups(q: QTensor) -> str | None:
    groups, columns = q.scale.shape[-1], q.codes.shape[-1] * (8 // q.format.bits)
    if groups == 1:
        return "zeros without groups are not known to it" if q.zero is not None else None
    if columns % groups or columns // groups % 32:
        return f"groups of {columns / groups:g} columns are no multiple of 32"
    return None


def coding(w: Array | QTensor) -> Coding:
    """The coding of a weight [.., N, in], packed or plain."""
    if not isinstance(w, QTensor):
        return Coding("float", 1, w.shape[-1])
    planes = 8 // w.format.bits
    columns, groups = w.codes.shape[-1] * planes, w.scale.shape[-1]
    return Coding(
        levels="float" if w.format.levels in FLOAT8 else w.format.levels,
        planes=planes,
        columns=columns,
        center=w.format.center,
        group=None if groups == 1 else columns // groups,
        scale=w.scale.dtype.name,
        zero=None if w.zero is None else w.zero.dtype.name,
    )


def operands(w: Array | QTensor, *, halves: bool = False) -> dict[str, Array]:
    """The parts that kernels read: codes [.., N, width], scale and zero [.., N, groups].

    A scale for each row comes as f32 [.., 1, N], so that it lies along a product's columns. `halves`: the kernel
    reads float16 as it is.
    """
    if not isinstance(w, QTensor):
        return {"codes": w}
    parts = {"codes": w.codes, "scale": w.scale, **({} if w.zero is None else {"zero": w.zero})}
    if w.scale.shape[-1] == 1:
        return parts | {"scale": w.scale.astype(jnp.float32).swapaxes(-1, -2)}
    return {name: _as_integers(part, halves) if name != "codes" else part for name, part in parts.items()}


def _as_integers(x: Array, halves: bool) -> Array:
    kind = None if halves and x.dtype == jnp.float16 else AS_INTEGERS.get(x.dtype.name)
    return lax.bitcast_convert_type(x, kind) if kind else x


def planes(x: Array, c: Coding, width: int) -> Array:
    """x [R, in] as [planes, R, width]: plane p holds columns p, p + planes, ... and zeros up to `width`."""
    x = jnp.pad(x, ((0, 0), (0, width * c.planes - x.shape[1])))
    return jnp.stack([x[:, p :: c.planes] for p in range(c.planes)])


# ---- inside a kernel --------------------------------------------------------------------------------------


def numbers(x: Array, dtype: str) -> Array:
    """Scales or zeros of that dtype, as `operands` has them, in f32."""
    if dtype == "float16" and x.dtype != jnp.float16:
        return _half(x.astype(jnp.int32))
    if dtype == "float8_e8m0fnu":
        return _power(x.astype(jnp.int32))
    return (x.astype(jnp.int32) if dtype in ("uint8", "int8") else x).astype(jnp.float32)


def _half(bits: Array) -> Array:
    """i32 bits of float16 -> f32. Below the least normal number the mantissa counts steps of 2**-24."""
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    special = lax.bitcast_convert_type((magnitude << 13) + (224 << 23), jnp.float32)  # infinities, NaN
    x = jnp.where(magnitude < 0x400, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    x = jnp.where(magnitude >= 0x7C00, special, x)
    return jnp.where(bits > 0x7FFF, -x, x)


def _power(bits: Array) -> Array:
    """i32 exponents of e8m0 -> f32: 2**(bits - 127), and NaN for 255."""
    x = lax.bitcast_convert_type(jnp.where(bits == 0, 1 << 22, bits << 23), jnp.float32)
    return jnp.where(bits == 255, jnp.nan, x)


def levels(codes: Array, plane: int, c: Coding) -> Array:
    """What the codes of one plane stand for before zeros and scales: f32, of the codes' shape."""
    if c.levels == "float":
        return codes.astype(jnp.float32)
    x = codes.astype(jnp.int32)
    if c.planes == 2:
        x = x >> 4 if plane else x & 15
    return _e2m1(x) if c.levels == "e2m1" else (x - c.center).astype(jnp.float32)


def _e2m1(codes: Array) -> Array:
    magnitude = codes & 7
    # From 2 on the exponent and the mantissa's bit stand where those of f32 do, but for the bias.
    normal = lax.bitcast_convert_type((magnitude + (126 << 1)) << 22, jnp.float32)
    x = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * 0.5, normal)
    return jnp.where(codes > 7, -x, x)


def unit(plane: int, c: Coding) -> int:
    """How many times the levels of a plane `exact` gives, a power of two."""
    high = 16**plane if c.planes == 2 else 1
    return 2 * high if c.levels == "e2m1" else high


def exact(codes: Array, plane: int, c: Coding) -> Array:
    """`levels` times `unit`, in bfloat16, without a rounding and without leaving pairs of 16 bits.

    A GPU works on two of these at a time, but shifts and converts one by one: so the high half of a byte stays
    where it is, and 7 bits become the mantissa of 128, then a number by a difference (Kim et al., arXiv
    2211.10017). Exact for a center from 0 to half of the levels.
    """
    if codes.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):  # the only way that Hopper has
        return codes.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
    if c.levels == "float":
        return codes.astype(jnp.bfloat16)
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.bfloat16) - c.center
    x, high = codes.astype(jnp.int16), 16**plane if c.planes == 2 else 1
    if c.levels == "e2m1":
        return _exact_e2m1(x, high)
    if c.planes == 2 and not plane:
        return _embedded(x, 15) - (128 + c.center)
    low, top = _embedded(x, 0x70 if c.planes == 2 else 0x7F), _embedded(x, 0x80)
    base = 256 + c.center * high  # what both have too much; it is a bfloat16 unless odd
    return low + (top - base) if base % 2 == 0 else (low - (base - 128)) + (top - 128)


def _exact_e2m1(x: Array, high: int) -> Array:
    """Twice `high` times the numbers: their magnitudes rise by 1, from the code 4 on by 2, from 6 on by 4."""
    code = _embedded(x, 7 * high) - 128
    y = code + jnp.maximum(code, 4 * high)
    most = jnp.maximum(code, 6 * high)
    y = y + (most + most - 16 * high)
    sign = lax.bitcast_convert_type((132 if high == 1 else 192) - _embedded(x, 8 * high), jnp.int16)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(y, jnp.int16) ^ (sign & -(2**15)), jnp.bfloat16)


def _embedded(x: Array, mask: int) -> Array:
    """i16 bits in bf16: 128 plus the low 7 bits of the mask; of the eighth alone 128, or 256 where it is set."""
    return lax.bitcast_convert_type((x & mask) | 0x4300, jnp.bfloat16)


def weights(codes: Array, plane: int, c: Coding, wide: dict[str, Array], dtype: jnp.dtype) -> Array:
    """The numbers of one plane, in `dtype`; `wide` has the scales and zeros as f32 of the codes' shape."""
    if c.levels == "float" and not wide:
        return codes.astype(dtype)
    x = levels(codes, plane, c)
    x = x - wide["zero"] if "zero" in wide else x
    x = x * wide["scale"] if "scale" in wide else x
    return x.astype(dtype)


def dot(a: Array, b: Array, *, transposed: bool = False) -> Array:
    """a [m, k] times b [k, n], or [n, k] where transposed -> f32 [m, n]; f32 operands lose nothing."""
    axes = (((1,), (1,)) if transposed else ((1,), (0,))), ((), ())
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
