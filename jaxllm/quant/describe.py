"""What a parameter is, without its values, as JSON: the one description that every file of ours shares.

Used wherever parameters are written in jaxllm's own form (Orbax, safetensors with packed weights): `describe`
when they are saved, `abstract` to know before reading what will come.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.quant.formats import as_json, from_json
from jaxllm.quant.qtensor import PLANES, QTensor

DTYPES = (
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"),
    *("int32", "int16", "int8", "int4", "uint32", "uint16", "uint8", "uint4", "bool"),
)
ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
COMPUTED = ("float32", "bfloat16", "float16")  # what a packed weight stands for
PARTS = tuple(f.name for f in fields(QTensor) if f.name not in ("format", "columns", "dtype_name"))


def describe(leaf: Any) -> dict[str, Any]:
    """A parameter (array or QTensor, or an abstract one) as JSON: {"shape", "dtype"}, or {"format", "columns",
    "dtype", "parts": {name: {"shape", "dtype"}}}.

    Raises CheckpointError for any other leaf (an adapter is merged first, or saved by itself)."""
    if isinstance(leaf, QTensor):
        parts = {name: _array(part) for name, part in leaf.parts().items()}
        return dict(format=as_json(leaf.format), columns=leaf.columns, dtype=leaf.dtype_name, parts=parts)
    if not isinstance(leaf, ARRAYS) or str(leaf.dtype) not in DTYPES:
        raise CheckpointError(
            f"a parameter to be saved should be an array or a QTensor, got {type(leaf).__name__} "
            f"({reprlib.repr(leaf)}); merge adapters first"
        )
    return _array(leaf)


def _array(x: Any) -> dict[str, Any]:
    return dict(shape=[int(n) for n in x.shape], dtype=str(x.dtype))


def abstract(described: Any) -> jax.ShapeDtypeStruct | QTensor:
    """The inverse of `describe`: the leaf with jax.ShapeDtypeStructs for its arrays.

    Raises CheckpointError for what describes no parameter, a QTensor whose parts do not fit together included."""
    if not isinstance(described, Mapping) or "parts" not in described:
        return _struct(described)
    if described.keys() != {"format", "columns", "dtype", "parts"} or not isinstance(described["parts"], Mapping):
        raise _fault(described)
    parts, columns = described["parts"], described["columns"]
    known = {"codes", "scale"} <= parts.keys() and parts.keys() <= set(PARTS)
    if not known or described["dtype"] not in COMPUTED or type(columns) is not int:
        raise _fault(described)
    try:
        format = from_json(described["format"])
    except ConfigError as error:
        raise CheckpointError(f"a packed parameter has no known format: {error}") from error
    structs = {name: _struct(part) for name, part in parts.items()}
    q = QTensor(**structs, format=format, columns=columns, dtype_name=described["dtype"])
    _check(q)
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


def _check(q: QTensor) -> None:
    """CheckpointError where the parts of an abstract QTensor cannot belong to one weight."""
    lead, codes = q.codes.shape[:-1], q.codes.shape[-1:]
    if not lead or q.format.bits not in PLANES or q.scale.shape[:-1] != lead or 0 in q.scale.shape:
        raise CheckpointError(f"the codes {q.codes.shape} and scales {q.scale.shape} of a weight do not fit")
    width = 8 if q.codes.dtype != np.uint8 else PLANES[q.format.bits][0]
    stored, G = codes[0] * 8 // width, q.scale.shape[-1]
    rows = {name: part for name, part in q.row_parts().items() if name not in ("codes", "high")}
    fits = q.columns >= 1 and stored >= q.columns and stored % G == 0
    fits = fits and all(part.shape[:-1] == lead and _divides(part.shape[-1], G) for part in rows.values())
    if q.high is not None:
        fits = fits and len(PLANES[q.format.bits]) == 2 and q.high.shape[:-1] == lead
        fits = fits and q.high.shape[-1] * 8 // PLANES[q.format.bits][-1] == stored
    if not fits:
        shapes = {name: part.shape for name, part in q.parts().items()}
        raise CheckpointError(f"the parts of a weight of {q.columns} columns do not fit together: {shapes}")


def _divides(n: int, whole: int) -> bool:
    return n > 0 and whole % n == 0


def nbytes(leaf: jax.ShapeDtypeStruct | QTensor) -> int:
    """Bytes of an abstract parameter."""
    parts = leaf.parts().values() if isinstance(leaf, QTensor) else [leaf]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in parts)
