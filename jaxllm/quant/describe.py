"""What a parameter is, without its values, as JSON: the one description that every file of ours shares.

Used wherever parameters are written in jaxllm's own form (Orbax, safetensors with packed weights). `describe` and
`abstract` are for files that hold each array by itself; where headers tell of the arrays, `head` and `weight`
are enough.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.quant.formats import FLOAT8, LEVELS, Format, as_json, from_json
from jaxllm.quant.qtensor import PARTS, PLANES, QTensor
from jaxllm.quant.recipe import DTYPES as COMPUTED  # what a packed weight stands for

DTYPES = (
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"),
    *("int32", "int16", "int8", "int4", "uint32", "uint16", "uint8", "uint4", "bool"),
)
ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def describe(leaf: Any) -> dict[str, Any]:
    """A parameter (array or QTensor, or an abstract one) as JSON: {"shape", "dtype"}, or {"format", "columns",
    "dtype", "parts": {name: {"shape", "dtype"}}}.

    Raises CheckpointError for any other leaf (an adapter is merged first, or saved by itself)."""
    if isinstance(leaf, QTensor):
        parts = {name: _array(part) for name, part in leaf.parts().items()}
        return head(leaf, as_json(leaf.format)) | {"parts": parts}
    if not isinstance(leaf, ARRAYS) or str(leaf.dtype) not in DTYPES:
        raise CheckpointError(
            f"a parameter to be saved should be an array or a QTensor, got {type(leaf).__name__} "
            f"({reprlib.repr(leaf)}); merge adapters first"
        )
    return _array(leaf)


def head(q: QTensor, format: Any) -> dict[str, Any]:
    """What a packed weight is but for its parts, as JSON; `format` says its format, by its fields or a name."""
    return {"format": format, "columns": q.columns, "dtype": q.dtype_name}


def is_head(values: Any) -> bool:
    """Whether a value from a file is like one of `head`, whatever it has for the format."""
    if not isinstance(values, Mapping) or values.keys() != {"format", "columns", "dtype"}:
        return False
    columns = values["columns"]
    return type(columns) is int and 0 < columns < 2**40 and values["dtype"] in COMPUTED


def _array(x: Any) -> dict[str, Any]:
    return dict(shape=[int(n) for n in x.shape], dtype=str(x.dtype))


def abstract(described: Any) -> jax.ShapeDtypeStruct | QTensor:
    """The inverse of `describe`: the leaf with jax.ShapeDtypeStructs for its arrays.

    Raises CheckpointError for what describes no parameter, a QTensor whose parts do not fit together included."""
    if not isinstance(described, Mapping) or "parts" not in described:
        return _struct(described)
    parts, known = described["parts"], {name: value for name, value in described.items() if name != "parts"}
    if not is_head(known) or not isinstance(parts, Mapping) or not {"codes", "scale"} <= parts.keys() <= {*PARTS}:
        raise _fault(described)
    try:
        format = readable(known["format"])
    except ConfigError as error:
        raise CheckpointError(f"a packed parameter has no known format: {error}") from error
    structs = {name: _struct(part) for name, part in parts.items()}
    return weight(structs, format=format, columns=known["columns"], dtype=known["dtype"])


def readable(values: Any) -> Format:
    """A format from its fields, as `from_json` has it.

    Raises ConfigError as that does, and for one whose codes or activations a later version may know."""
    f = from_json(values)
    if f.levels not in ("int", *LEVELS, *FLOAT8) or (f.levels not in FLOAT8 and f.bits not in PLANES):
        raise ConfigError(f"codes of {f.bits} bits for levels {f.levels[:40]!r} are not known; update jaxllm")
    if f.activations not in (None, "int8", *FLOAT8):
        raise ConfigError(f"activations of dtype {f.activations[:40]!r} are not known; update jaxllm")
    if f.levels in LEVELS and len(LEVELS[f.levels]) < 2**f.bits:
        raise ConfigError(f"{f.levels} has {len(LEVELS[f.levels])} levels, too few for {f.bits} bits")
    return f


def weight(parts: Mapping[str, Any], *, format: Format, columns: int, dtype: str) -> QTensor:
    """The packed weight of these parts, numpy arrays or jax.ShapeDtypeStructs, in a format that is `readable`.

    Raises CheckpointError where they do not fit together."""
    q = QTensor(**parts, format=format, columns=columns, dtype_name=dtype)
    if problem := _misfit(q):
        what = f"the parts of a weight of {columns} columns in {format.name}"
        raise CheckpointError(f"{what} do not fit together: {problem}")
    return q


def _struct(described: Any) -> jax.ShapeDtypeStruct:
    if not isinstance(described, Mapping) or described.keys() != {"shape", "dtype"}:
        raise _fault(described)
    shape, dtype = described["shape"], described["dtype"]
    sizes = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if not sizes or not isinstance(dtype, str) or dtype not in DTYPES:
        raise _fault(described)
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def _fault(described: Any) -> CheckpointError:
    return CheckpointError(f"this describes no parameter: {reprlib.repr(described)}; save the model again")


def _misfit(q: QTensor) -> str | None:
    """What is wrong with the shapes and dtypes of a packed weight's parts, or None."""
    f, lead = q.format, q.codes.shape[:-1]
    widths = (8,) if f.levels in FLOAT8 else PLANES[f.bits]
    kinds = (f.levels,) if f.levels in FLOAT8 else ("uint8", "int8") if f.bits == 8 else ("uint8",)
    if q.codes.ndim < 2 or q.codes.dtype.name not in kinds:
        return f"codes {q.codes.dtype} {list(q.codes.shape)}"
    columns = q.codes.shape[-1] * 8 // widths[0]
    groups = q.scale.shape[-1] if q.scale.ndim else 0
    if not groups or columns % groups or not q.columns <= columns < q.columns + math.lcm(8, columns // groups):
        return f"{q.columns} columns in codes {list(q.codes.shape)} with scales {list(q.scale.shape)}"
    if f.group and columns // groups != f.group:
        return f"groups of {columns // groups} columns instead of {f.group}"
    above = q.super_scale.shape[-1] if q.super_scale is not None and q.super_scale.ndim else 1
    wanted = {
        "high": (*lead, columns * widths[-1] // 8) if len(widths) > 1 else None,
        **dict.fromkeys(("scale", "zero", "offset"), (*lead, groups)),
        **dict.fromkeys(("super_scale", "super_offset"), (*lead, above)),
        "order": (*lead[:-1], q.columns),
        "input_scale": lead[:-1] if q.input_scale is not None and q.input_scale.ndim else (),  # one an expert
    }
    for name, part in q.parts().items():
        if name != "codes" and part.shape != wanted[name]:
            return f"{name} of shape {list(part.shape)} instead of {wanted[name] and list(wanted[name])}"
    return _missing(q, groups, above)


def _missing(q: QTensor, groups: int, above: int) -> str | None:
    if len(PLANES.get(q.format.bits, ())) > 1 and q.high is None:
        return "its high bits are missing"
    if not above or groups % above or (q.super_offset is not None and q.offset is None):
        return "scales of scales that do not fit"
    if isinstance(q.order, np.ndarray) and (np.sort(q.order, -1) != np.arange(q.columns)).any():
        return "order is no order of its columns"
    return None


def nbytes(leaf: jax.ShapeDtypeStruct | QTensor) -> int:
    """Bytes of an abstract parameter."""
    parts = leaf.parts().values() if isinstance(leaf, QTensor) else [leaf]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in parts)
