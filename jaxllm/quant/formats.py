"""The table of weight formats. Data only: a new format is a row here.

A weight [out, in] is stored as codes of a few bits; `group` neighbouring columns of a row share one scale:

    value = (level[code] - zero) * scale + offset
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from jaxllm.errors import ConfigError

# The floats that codes of few bits stand for; a code's level is its index.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, section 5.3.3
_NF4 = (  # QLoRA, arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF3 = (-1.0, -0.5350227355957031, -0.2469314038753510, 0.0, 0.1833375245332718, 0.3819939494132996)
_NF3 = (*_NF3, 0.6229856610298157, 1.0)  # the same construction with eight levels
_FP4 = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)  # bitsandbytes
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml kvalues_iq4nl


def _signed(levels: tuple[float, ...]) -> tuple[float, ...]:
    return (*levels, *(-x for x in levels))


def _minifloat(exponent: int, mantissa: int) -> tuple[float, ...]:
    """All values of a sign, `exponent` and `mantissa` bits; no infinities (OCP Microscaling Formats 1.0)."""
    bias = 2 ** (exponent - 1) - 1

    def one(code: int) -> float:
        e, m = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
        return m * 2.0 ** (1 - bias) if e == 0 else (1 + m) * 2.0 ** (e - bias)

    return _signed(tuple(one(code) for code in range(2 ** (exponent + mantissa))))


LEVELS = {
    "e2m1": _signed(_E2M1),
    "e2m3": _minifloat(2, 3),
    "e3m2": _minifloat(3, 2),
    "nf4": _NF4,
    "nf3": _NF3,
    "fp4": _signed(_FP4),
    "iq4": tuple(float(x) for x in _IQ4),
}
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Format:
    """How a weight [.., out, in] is stored, and how plain rounding makes it."""

    name: str
    bits: int  # of one code
    group: int | None = None  # columns of a row that share a scale; None: the whole row
    levels: str = "int"  # "int": code - center; a name of LEVELS; or a float8 dtype, whose bytes are the codes
    center: int = 0  # what code stands for zero ("int"); 0 with 8 bits and no zero: signed bytes
    scale: str = "float16"  # dtype of the scales
    zero: str | None = None  # None; "code": subtracted before scaling; "value": added after it
    low: int = 0  # the smallest and the largest code that rounding makes ("int")
    high: int = 0
    rows: int | None = 1  # rows that share a scale, where it is made; None: all of the matrix
    power: bool = False  # scales are powers of two
    global_scale: bool = False  # scales are stored over one f32 scale a matrix
    rounding: str = "even"  # or "away": how halves are rounded
    dtype: str | None = None  # of activations and of what is not quantized; None: as the model has it
    ends: bool = True  # the embedding and the head are quantized too
    activations: str | None = None  # what activations are rounded to, a row at a time: "int8", a float8 dtype
    axis: str = "NK"  # MLC's files: "KN" has both parts transposed

    @property
    def bits_per_weight(self) -> float:
        """With scales and zeros as they are stored; a scale for a whole row counts as nothing."""
        if self.group is None:
            return float(self.bits)
        size = 8 * (2 if self.scale in ("float16", "bfloat16") else 4 if self.scale == "float32" else 1)
        extra = {None: 0, "code": 8, "value": size}[self.zero]
        return self.bits + (size + extra) / self.group


def _mlc(name: str, bits: int, dtype: str, scale: str | None = None, **changes) -> Format:
    most = 2 ** (bits - 1) - 1
    group = {3: 40, 4: 32, 8: 32}[bits]
    usual = dict(center=most, high=2 * most, dtype=dtype, scale=scale or dtype)
    return Format(name, bits, group, **(usual | changes))


def _table(*formats: Format) -> dict[str, Format]:
    return {f.name: f for f in formats}


# Formats that `quantize` makes. MLC's names mean exactly what MLC-LLM writes under them.
FORMATS = _table(
    _mlc("q3f16_0", 3, "float16", axis="KN"),
    _mlc("q3f16_1", 3, "float16"),
    _mlc("q4f16_0", 4, "float16", axis="KN"),
    _mlc("q4f16_1", 4, "float16"),
    _mlc("q4f16_2", 4, "float16", ends=False),
    _mlc("q4f32_1", 4, "float32"),
    _mlc("q4bf16_0", 4, "bfloat16", axis="KN"),
    _mlc("q4bf16_1", 4, "bfloat16"),
    _mlc("q8f16_1", 8, "float16"),
    _mlc("q8bf16_1", 8, "bfloat16"),
    Format("q0f32", 32, levels="float32", dtype="float32"),
    Format("q0f16", 16, levels="float16", dtype="float16"),
    Format("q0bf16", 16, levels="bfloat16", dtype="bfloat16"),
    *(
        Format(f"int{bits}_g{group}", bits, group, center=2 ** (bits - 1), high=2**bits - 1)
        for bits in (2, 3, 4, 5, 6)
        for group in (32, 64, 128)
    ),
    *(Format(f"int8_g{group}", 8, group, low=-127, high=127) for group in (32, 64, 128)),
    Format("int4", 4, None, center=8, high=15, scale="float32"),
    Format("int8", 8, None, low=-127, high=127, scale="float32"),
    *(
        Format(f"uint{bits}_g{group}", bits, group, high=2**bits - 1, zero="code")
        for bits in (2, 3, 4, 5, 8)
        for group in (32, 64, 128)
    ),
    Format("w8a8", 8, None, low=-127, high=127, scale="float32", activations="int8"),
    *(
        Format(f"fp8_{kind}{name}", 8, group, f"float8_{kind}{tail}", scale="float32", rows=rows, ends=False)
        for kind, tail in (("e4m3", "fn"), ("e5m2", ""))
        for name, group, rows in (("", None, 1), ("_tensor", None, None), ("_block", 128, 128))
    ),
    *(
        Format(
            f"fp8_e4m3{name}_w8a8",
            8,
            group,
            "float8_e4m3fn",
            scale="float32",
            rows=rows,
            ends=False,
            activations="float8_e4m3fn",
        )
        for name, group, rows in (("", None, 1), ("_tensor", None, None), ("_block", 128, 128))
    ),
    Format("nf4", 4, 64, "nf4", scale="float32"),
    Format("nf3", 3, 64, "nf3", scale="float32"),
    Format("fp4", 4, 64, "fp4", scale="float32"),
    Format("fp6_e2m3", 6, 32, "e2m3"),
    Format("fp6_e3m2", 6, 32, "e3m2"),
    Format("mxfp4", 4, 32, "e2m1", scale="float8_e8m0fnu", power=True),
    Format("mxfp6", 6, 32, "e2m3", scale="float8_e8m0fnu", power=True),
    Format("mxfp8", 8, 32, "float8_e4m3fn", scale="float8_e8m0fnu", power=True),
    Format("nvfp4", 4, 16, "e2m1", scale="float8_e4m3fn", global_scale=True),
    Format("ternary", 2, None, center=1, high=2, scale="float32", rows=None, ends=False, activations="int8"),
)
UNQUANTIZED = ("q0f32", "q0f16", "q0bf16")


def named(name: str, **changes) -> Format:
    """The format of that name, with fields changed (group=128, say).

    Raises ConfigError for an unknown name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"there is no weight format {reprlib.repr(name)}; there are {', '.join(FORMATS)}")
    return replace(FORMATS[name], **changes) if changes else FORMATS[name]


def as_json(format: Format) -> dict[str, Any]:
    """The fields of a format that differ from their defaults, as JSON has them. `from_json` is the inverse."""
    defaults = {f.name: f.default for f in fields(Format)}
    return {name: value for name, value in asdict(format).items() if value != defaults[name]}


_LIMITS = {"bits": (1, 64), "group": (1, 2**31), "rows": (1, 2**31), "center": (0, 2**16)}
_LIMITS |= {"low": (-(2**16), 2**16), "high": (-(2**16), 2**16)}


def from_json(values: Mapping[str, Any]) -> Format:
    """A format from its fields, or from {"base": a name of FORMATS, fields that differ ...}.

    Raises ConfigError for an unknown field, or a value that is not of its field's type and range."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"a weight format should be an object of fields, got {reprlib.repr(values)}")
    known = {f.name: f.type for f in fields(Format)}
    if unknown := [name for name in values if name not in known and name != "base"]:
        raise ConfigError(f"a weight format has no field {unknown[0]!r}; it has base, {', '.join(known)}")
    changes = {name: value for name, value in values.items() if name != "base"}
    for name, value in changes.items():
        _check_field(name, value, known[name])
    if "base" in values:
        return replace(named(values["base"]), **changes)
    if not {"name", "bits"} <= changes.keys():
        raise ConfigError(f"a weight format needs base, or name and bits; got {reprlib.repr(dict(values))}")
    return Format(**changes)


def _check_field(name: str, value: Any, kind: str) -> None:
    types = {"str": str, "int": int, "bool": bool, "None": type(None)}
    wanted = [types[word] for word in kind.split(" | ")]
    low, high = _LIMITS.get(name, (None, None))
    out = type(value) is int and low is not None and not low <= value <= high
    if type(value) not in wanted or out:
        span = f" from {low} to {high}" if low is not None else ""
        raise ConfigError(f"{name} of a weight format should be {kind}{span}, got {reprlib.repr(value)}")
