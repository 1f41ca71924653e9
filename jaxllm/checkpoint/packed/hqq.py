"""HQQ (github.com/mobiusml/hqq) as its linear layers save themselves to safetensors.

W_q: codes of the matrix reshaped to [N K / group, group] (axis 1) or [group, N K / group] (axis 0), rows that are
far apart packed together: byte r holds rows r, r + R, .. with the first one in the highest bits. scale and zero
are those of each such row (axis 1) or column (axis 0): value = (code - zero) * scale. Numbers and words beside
them are tensors, too. Groups of axis 0 run across rows of the matrix, so such weights are expanded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.packed.repack import integers
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, by_leaf
from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor

# Packing -> (bits, dtype, codes in one of it)
PACKINGS = {
    "8bit_u8": (8, np.uint8, 1),
    "4bit_u8": (4, np.uint8, 2),
    "3bit_32": (3, np.int32, 10),
    "2bit_u8": (2, np.uint8, 4),
    "1bit_u8": (1, np.uint8, 8),
}
SETTINGS = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "view_as_float",
    "unpack_view_dtype",
    "channel_wise",
)
SETTINGS = (*SETTINGS, "quant_scale", "quant_zero", "compute_dtype", "optimize", "round_zero", "offload_meta")
LEAVES = ("W_q", "scale", "zero", *SETTINGS, "encoded_state_dict", "stores_quant_config")
WHOLE = ("uint8", "int32", "int64")


@dataclass(frozen=True)
class Layout:
    """The settings of one layer."""

    shape: tuple[int, int]  # N, K
    group: int
    axis: int
    packing: str

    @property
    def rows(self) -> int:
        """Rows of the reshaped matrix."""
        n = math.prod(self.shape)
        return n // self.group if self.axis == 1 else self.group


def hqq(job: Job) -> Scheme:
    """Checkpoints of quant_method "hqq" in safetensors, 1, 2, 3, 4 and 8 bits."""
    return Scheme(by_leaf(LEAVES), lambda module: _reader(module, job))


def _reader(module: Module, job: Job) -> Read:
    layout = _layout(module)
    n = math.prod(layout.shape)
    _, kind, per = PACKINGS[layout.packing]
    stored = module.tensors["W_q"]
    need = -(-layout.rows // per) * (n // layout.rows) * np.dtype(kind).itemsize
    if math.prod(stored.shape) * stored.dtype.itemsize != need:
        raise CheckpointError(
            f"W_q should take {need} bytes for {list(layout.shape)}, its shape is {list(stored.shape)}"
        )
    many = n // layout.group
    for leaf in ("scale", "zero"):
        module.expect(leaf, FLOATS, (many, 1), (1, many), (many,))
    if layout.axis == 0 or layout.shape[1] % layout.group:
        job.notes["groups run across rows of the matrix, so they are expanded"] += 1
        return lambda: _expanded(module, layout, job.dtype)
    return lambda: _packed(module, layout, job.dtype)


def _layout(module: Module) -> Layout:
    """The settings of a layer. Raises CheckpointError where they do not fit together."""
    module.shape("W_q", ("uint8", "int32", *FLOATS), None)
    shape = [int(x) for x in module.note("shape", WHOLE).reshape(-1)]
    if len(shape) != 2 or not all(1 <= x < 2**31 for x in shape):
        raise CheckpointError(f"shape should be two sizes, it is {shape!s:.60}")
    packing = module.note("packing", ("uint8",)).tobytes().decode("latin-1")
    if packing not in PACKINGS:
        raise CheckpointError(f"packing is {packing!r:.40}; read are {', '.join(PACKINGS)}")
    for leaf in ("quant_scale", "quant_zero"):
        if module.has(leaf) and module.note(leaf, WHOLE).any():
            raise CheckpointError(f"{leaf}: scales that are packed themselves are not read")
    axis = _number(module, "axis", 1)
    group = _number(module, "group_size", shape[1] if axis == 1 else shape[0])
    if axis not in (0, 1) or group < 1 or math.prod(shape) % group:
        raise CheckpointError(f"axis {axis} and groups of {group} do not fit a matrix of {shape}")
    return Layout(tuple(shape), group, axis, packing)


def _number(module: Module, leaf: str, default: int) -> int:
    return int(module.note(leaf, WHOLE).reshape(-1)[0]) if module.has(leaf) else default


def _codes(module: Module, layout: Layout) -> np.ndarray:
    """Codes of the reshaped matrix, u8 [rows, n / rows]."""
    bits, kind, per = PACKINGS[layout.packing]
    data = np.ascontiguousarray(module.read("W_q")).reshape(-1).view(kind)
    data = data.reshape(-(-layout.rows // per), -1)
    parts = [(data >> (bits * (per - 1 - i))) & (2**bits - 1) for i in range(per)]
    return np.concatenate(parts).astype(np.uint8)[: layout.rows]


def _packed(module: Module, layout: Layout, dtype: str) -> QTensor:
    (N, K), bits = layout.shape, PACKINGS[layout.packing][0]
    codes = _codes(module, layout).reshape(N, K)
    scale, zero = (module.read_finite(leaf).reshape(N, -1) for leaf in ("scale", "zero"))
    parts = dict(scale=scale, zero=zero, loose=True)
    return integers(codes, bits=bits, columns=K, group=layout.group, dtype=dtype, **parts)


def _expanded(module: Module, layout: Layout, dtype: str) -> np.ndarray:
    by_row = (-1, 1) if layout.axis == 1 else (1, -1)
    scale, zero = (module.read_finite(leaf).astype(np.float32).reshape(by_row) for leaf in ("scale", "zero"))
    values = (_codes(module, layout).astype(np.float32) - zero) * scale
    return values.reshape(layout.shape).astype(np.dtype(dtype))
