"""bitsandbytes' 4-bit (nf4, fp4) and 8-bit weights.

4 bits: X.weight holds n / 2 bytes, the first code of each high; blocks of `blocksize` codes run over the flat
matrix and share absmax [ceil(n / blocksize)]. Double quantization (arXiv 2305.14314) stores absmax as codes u8:
nested_quant_map[code] * nested_absmax[of 256 blocks] + nested_offset. Sizes are JSON in the bytes of
quant_state.bitsandbytes__nf4.

8 bits: X.weight i8 [N, K] and SCB f32 [N], the largest magnitude of each row, for which 127 stands. The columns of
activations that bitsandbytes keeps in 16 bits as outliers are many here: activations are not rounded at all.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.packed.repack import fields, signed_bytes, table4
from jaxllm.checkpoint.packed.stored import FLOATS, LARGEST_NOTE, Job, Module, Read, Scheme, by_leaf
from jaxllm.errors import CheckpointError
from jaxllm.families.fields import Fields
from jaxllm.quant import QTensor
from jaxllm.quant.formats import LEVELS

STATE = "weight.quant_state.bitsandbytes__"
FOUR = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
STATES = (f"{STATE}nf4", f"{STATE}fp4")
EIGHT = ("SCB", "weight_format")
STORAGE = ("uint8", "bfloat16", "float16", "float32", "int8")
NARROWEST = 16  # columns that share a scale: for fewer the scales outweigh what packing saves


@dataclass(frozen=True)
class Blocks:
    """The JSON beside a 4-bit weight."""

    levels: str
    size: int  # codes that share a scale
    shape: tuple[int, int]
    nested: int | None  # blocks that share a scale of scales
    offset: float

    @property
    def count(self) -> int:
        return -(-math.prod(self.shape) // self.size)

    @property
    def group(self) -> int:
        """Columns of a row that surely lie in one block."""
        return math.gcd(self.shape[1], self.size)


def bitsandbytes(job: Job) -> Scheme:
    """Checkpoints of quant_method "bitsandbytes", load_in_4bit or load_in_8bit; modules tell which they are."""

    def reader(module: Module) -> Read:
        return _eight(module, job) if module.has("SCB") else _four(module, job)

    return Scheme(by_leaf((*FOUR, *STATES, *EIGHT)), reader)


def _eight(module: Module, job: Job) -> Read:
    N, _ = module.shape("weight", ("int8",))
    module.expect("SCB", FLOATS, (N,))
    if module.has("weight_format") and module.note("weight_format", ("uint8",)).any():
        raise CheckpointError("weight_format should be 0 (rows); other layouts are those of one GPU's kernels")

    def read() -> QTensor:
        scale = module.read_finite("SCB").astype(np.float32) / np.float32(127)
        return signed_bytes(module.read("weight"), group=None, scale=scale[:, None], dtype=job.dtype)

    return read


def _four(module: Module, job: Job) -> Read:
    state = _state(module)
    module.shape("weight", STORAGE, None)
    stored = module.tensors["weight"]
    given, n = math.prod(stored.shape) * stored.dtype.itemsize, math.prod(state.shape)
    if given != -(-n // 2):
        raise CheckpointError(
            f"weight should hold {n} codes of 4 bits for {list(state.shape)}, it has {given} bytes"
        )
    _check_scales(module, state)
    if not np.allclose(module.note("weight.quant_map", FLOATS), LEVELS[state.levels], rtol=0, atol=1e-6):
        raise CheckpointError(f"weight.quant_map is not the table of {state.levels}")
    expand = state.group < NARROWEST and state.size % state.shape[1]
    if expand:
        job.notes[f"blocks of {state.size} codes do not fit rows of {state.shape[1]}, so they are expanded"] += 1
    return lambda: _expanded(module, state, job.dtype) if expand else _packed(module, state, job.dtype)


def _state(module: Module) -> Blocks:
    """The JSON of a module. Raises CheckpointError where it is missing or malformed."""
    leaf = next((name for name in STATES if module.has(name)), None)
    if leaf is None:
        raise CheckpointError(f"{STATES[0]} is missing beside {', '.join(sorted(module.tensors))}")
    try:
        values = json.loads(module.note(leaf, ("uint8",)).tobytes()[:LARGEST_NOTE].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{leaf} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{leaf} should be an object")
    c = Fields(values)
    levels = c.choice("quant_type", {name: name for name in ("nf4", "fp4")}, leaf.removeprefix(STATE))
    nested = c.int("nested_blocksize") if module.has("weight.nested_absmax") else None
    shape = c.items("shape", 2)
    if len(shape) != 2 or not all(type(n) is int and 1 <= n < 2**31 for n in shape):
        c.problem("shape should be two sizes")
    size, offset = c.int("blocksize"), c.number("nested_offset", 0.0)
    if c.problems:
        raise CheckpointError(f"{leaf}: {'; '.join(c.problems)}")
    return Blocks(levels, size, tuple(shape), nested, float(offset))


def _check_scales(module: Module, state: Blocks) -> None:
    module.expect("weight.quant_map", FLOATS, (16,))
    if state.nested is None:
        module.expect("weight.absmax", FLOATS, (state.count,))
        return
    module.expect("weight.absmax", ("uint8",), (state.count,))
    module.expect("weight.nested_absmax", FLOATS, (-(-state.count // state.nested),))
    module.expect("weight.nested_quant_map", FLOATS, (256,))


def _absmax(module: Module, state: Blocks) -> np.ndarray:
    """The scale of every block: f32 [count]."""
    if state.nested is None:
        return module.read_finite("weight.absmax").astype(np.float32)
    table = module.read_finite("weight.nested_quant_map").astype(np.float32)
    above = np.repeat(module.read_finite("weight.nested_absmax").astype(np.float32), state.nested)[: state.count]
    return table[module.read("weight.absmax")] * above + np.float32(state.offset)


def _codes(module: Module) -> np.ndarray:
    """The flat codes two a byte, the first one low: u8."""
    data = np.ascontiguousarray(module.read("weight")).reshape(-1).view(np.uint8)
    return (data >> 4) | (data << 4)


def _packed(module: Module, state: Blocks, dtype: str) -> QTensor:
    N, K = state.shape
    whole = state.size % K == 0  # a block is some whole rows
    group = K if whole else state.group
    of_group = np.arange(0, N * K, group) // state.size
    scale = _absmax(module, state)[of_group].reshape(N, -1)
    if K % 2:
        flat = fields(_codes(module)[None], 4, N * K).reshape(N, K)
        data = np.pad(flat, ((0, 0), (0, 1)))
        data = data[:, 0::2] | (data[:, 1::2] << 4)
    else:
        data = _codes(module).reshape(N, K // 2)
    return table4(data, state.levels, columns=K, group=None if whole else group, scale=scale, dtype=dtype)


def _expanded(module: Module, state: Blocks, dtype: str) -> np.ndarray:
    """The values themselves [N, K], for blocks that rows cut."""
    n = math.prod(state.shape)
    codes = fields(_codes(module)[None], 4, n)[0]
    scale = np.repeat(_absmax(module, state), state.size)[:n]
    values = np.asarray(LEVELS[state.levels], np.float32)[codes] * scale
    return values.astype(np.dtype(dtype)).reshape(state.shape)
