"""torchao's tensors, as transformers writes them to safetensors.

The file's metadata names each weight's type; its parts are X._weight_qdata, X._weight_scale, ... Read are
- Int8Tensor: qdata i8 [N, K], scale [N, 1] or [1, 1], zero_point of that shape;
- IntxUnpackedToInt8Tensor: qdata i8 [N, K], scale and zero_point [N, G];
- Int4Tensor: qdata [N, K / 2], two signed codes a byte, the first one low; scale and zero_point [G, N]:
  value = code * scale + zero_point;
- Float8Tensor: qdata e4m3 [N, K], scale [N, 1] or [1, 1].
Activations are rounded where Float8Tensor and Int8Tensor say so, a row at a time.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from jaxllm.checkpoint.packed import float8
from jaxllm.checkpoint.packed.repack import floats8, integers, octets, signed_bytes
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, by_leaf
from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor

PARTS = ("qdata", "scale", "zero_point", "act_pre_scale", "act_quant_scale", "act_quant_zero_point")
PARTS = (*PARTS, "scale_and_zero", "per_tensor_scale")
LEAVES = tuple(f"_weight_{part}" for part in PARTS)
QDATA, SCALE, ZERO = LEAVES[:3]
ROUNDED = {"Int8Tensor": "int8", "Float8Tensor": float8.E4M3}


def torchao(job: Job) -> Scheme:
    """Checkpoints of quant_method "torchao" whose metadata names the types above."""
    metadata = job.metadata()

    def reader(module: Module) -> Read:
        kind, data = _described(metadata.get(f"{module.name}.weight"))
        if kind not in READERS:
            raise CheckpointError(f"torchao's {kind!r:.60} is not read; read are {', '.join(READERS)}")
        if module.has("_weight_act_pre_scale"):
            raise CheckpointError("activations that are scaled beforehand (act_pre_scale) are not read")
        return READERS[kind](module, _common(kind, data, job))

    return Scheme(by_leaf(LEAVES), reader, also=())


def _described(text: str | None) -> tuple[Any, dict[str, Any]]:
    """(type, attributes) of a weight by the file's metadata."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the file's metadata is not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("_type"), str):
        raise CheckpointError("the file's metadata does not say which of torchao's types it is")
    data = value.get("_data")
    return value["_type"], data if isinstance(data, dict) else {}


def _common(kind: str, data: dict[str, Any], job: Job) -> dict[str, Any]:
    common: dict[str, Any] = dict(dtype=job.dtype)
    if data.get("activation_quantization"):
        job.notes["activations stay as they are, the file rounds them to 8 bits with zeros"] += 1
    if data.get("act_quant_kwargs") and kind in ROUNDED:
        common["activations"] = ROUNDED[kind]
    return common


def _bytes(module: Module, common: dict[str, Any]) -> Read:
    """Int8Tensor and IntxUnpackedToInt8Tensor."""
    N, K = module.shape(QDATA, ("int8",))
    group, scales = _groups(module, SCALE, FLOATS, N, K)
    zeros = _groups(module, ZERO, ("int8", *FLOATS), N, K)[1] if module.has(ZERO) else None

    def read() -> QTensor:
        zero = None if zeros is None else zeros()
        zero = None if zero is None or not zero.any() else zero
        return signed_bytes(module.read(QDATA), group=group, scale=scales(), zero=zero, **common)

    return read


def _groups(module: Module, leaf: str, dtypes: tuple[str, ...], N: int, K: int):
    """(group, reader of [N, G]) for [N, G] or one value for the matrix."""
    rows, G = module.shape(leaf, dtypes)
    if (rows != N and (rows, G) != (1, 1)) or K % G:
        raise CheckpointError(f"{leaf} should have a row for each of {N} and groups of {K}, it has {[rows, G]}")
    read = lambda: np.ascontiguousarray(np.broadcast_to(module.read_finite(leaf), (N, G)))
    return None if G == 1 else K // G, read


def _nibbles(module: Module, common: dict[str, Any]) -> Read:
    """Int4Tensor."""
    N, half = module.shape(QDATA, ("int8", "uint8"))
    K = 2 * half
    G = module.shape(SCALE, FLOATS)[0]
    module.expect(SCALE, FLOATS, (G, N))
    module.expect(ZERO, FLOATS, (G, N))
    if K % G:
        raise CheckpointError(f"{K} columns have no {G} equal groups")

    def read() -> QTensor:
        scale, offset = (np.ascontiguousarray(module.read_finite(leaf).T) for leaf in (SCALE, ZERO))
        data = octets(module.read(QDATA)) ^ np.uint8(0x88)  # signed codes, now 8 more
        return integers(data, bits=4, columns=K, group=K // G, scale=scale, offset=offset, **common)

    return read


def _float8(module: Module, common: dict[str, Any]) -> Read:
    """Float8Tensor."""
    N, K = module.shape(QDATA, (float8.E4M3,))
    scales = float8.spread(module, SCALE, N, K, None)
    return lambda: floats8(module.read(QDATA), group=None, scale=scales(), **common)


READERS = {
    "Int8Tensor": _bytes,
    "IntxUnpackedToInt8Tensor": _bytes,
    "Int4Tensor": _nibbles,
    "Float8Tensor": _float8,
}
