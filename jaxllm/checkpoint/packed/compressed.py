"""compressed-tensors, as LLM Compressor saves it for vLLM.

By the tensors beside a module's:
- pack-quantized: weight_packed i32 [N, W], rows of fields without gaps; weight_shape [2]; weight_zero_point
  i32 [., G], fields along the out axis; weight_g_idx i32 [K], the group of each column;
- int-quantized, naive-quantized: weight i8 [N, K], weight_zero_point i8;
- float-quantized, naive-quantized: weight e4m3 [N, K]; mxfp8-quantized: with exponents u8 for 32 columns;
- nvfp4-pack-quantized: weight_packed u8 [N, K / 2], weight_scale e4m3 [N, K / 16] over weight_global_scale [1];
  mxfp4-pack-quantized: weight_scale u8 exponents [N, K / 32].

Scales are those of the matrix, of rows, of groups or of blocks, by the group of settings that names the module.
Activations are rounded as it says where that is in 8 bits without zeros, for a row at a time or by a number found
beforehand; one scale for all rows becomes one for each. Otherwise they stay as they are, with a notice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.checkpoint.packed import float8, targets
from jaxllm.checkpoint.packed.gptq import column_order
from jaxllm.checkpoint.packed.repack import fields, floats8, integers, octets, signed_bytes, table4
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, by_leaf
from jaxllm.errors import CheckpointError
from jaxllm.families.fields import Fields
from jaxllm.quant import QTensor

LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
LEAVES = (*LEAVES, "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale")
LEAVES = (*LEAVES, "output_scale", "output_zero_point")
CACHE = re.compile(r".*\.[qkv]_(scale|zero_point|global_scale)")  # of a quantized cache
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
FORMATS = (*FORMATS, "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
WIDTHS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Group:
    """The settings of the modules that some targets name."""

    targets: tuple[re.Pattern[str] | str, ...]
    bits: int
    symmetric: bool
    group: int | None  # columns that share a scale
    block: tuple[int, int] | None
    activations: str | None  # what they are rounded to
    static: bool  # by a number found beforehand
    by_group: bool  # with a scale for some columns of a row, not for the whole row
    kept: str | None  # why activations that the file rounds are not


def compressed_tensors(job: Job) -> Scheme:
    """Checkpoints of quant_method "compressed-tensors"."""
    c = job.settings
    c.expect("format", *FORMATS)
    if c.section("sparsity_config").raw("format", "dense") != "dense":
        c.problem("sparsity_config: sparse weights are not read; use a checkpoint that is only quantized")
    if c.section("transform_config").table("config_groups", {}):
        c.problem("transform_config: rotated weights are not read; use a checkpoint without transforms")
    groups = [_group(c, name, value) for name, value in c.table("config_groups").items()]
    if not groups:
        c.problem("config_groups is empty; it should say how weights are quantized")
    if c.raw("kv_cache_scheme"):
        job.notes["the scales of a quantized cache are not used"] += 1
    return Scheme(by_leaf(LEAVES), lambda module: _reader(module, groups, job), drop=_of_cache)


def _of_cache(name: str) -> bool:
    return CACHE.fullmatch(name) is not None


def _group(c: Fields, name: str, value: Any) -> Group:
    g = Fields(value if isinstance(value, dict) else {})
    g.expect("format", *FORMATS)
    w = g.section("weights")
    integer = w.choice("type", {"int": True, "float": False}, "int")
    width = w.int("num_bits", 8)
    if width not in (WIDTHS if integer else (4, 8)):
        w.problem(f"num_bits is {width}; read are {', '.join(map(str, WIDTHS))}, and 4 and 8 for floats")
    strategy = w.choice("strategy", {s: s for s in STRATEGIES}, _strategy(w))
    grouped = strategy in ("group", "tensor_group")
    size = w.int("group_size") if grouped else None
    block = float8.block_size(w, "block_structure") if strategy == "block" else None
    if strategy == "block" and block is None:
        w.problem("block_structure is missing, and the strategy is block")
    aims = tuple(t for t in (targets.pattern(g, t) for t in g.items("targets")) if t is not None)
    symmetric = w.flag("symmetric", True)
    activations, static, by_group, kept = _activations(g)
    for problem in g.problems:
        c.problem(f"config_groups.{name}: {problem}")
    return Group(aims, width, symmetric, size, block, activations, static, by_group, kept)


def _strategy(w: Fields) -> str:
    size = w.raw("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _activations(g: Fields) -> tuple[str | None, bool, bool, str | None]:
    """The last four fields of a Group."""
    if not g.table("input_activations", {}):
        return None, False, False, None
    a = g.section("input_activations")
    kind = a.choice("type", {"int": "int8", "float": float8.E4M3}, "int")
    width, symmetric = a.int("num_bits", 8), a.flag("symmetric", True)
    dynamic, strategy = a.raw("dynamic", False), a.raw("strategy", "tensor")
    if width != 8 or not symmetric or strategy not in ("token", "tensor", "group"):
        zeros = "" if symmetric else " with zeros"
        return None, False, False, f"activations stay as they are, the file rounds them to {width} bits{zeros}"
    return kind, dynamic is False, strategy == "group", None


def _reader(module: Module, groups: list[Group], job: Job) -> Read:
    g = _chosen(module, groups)
    if g.kept:
        job.notes[g.kept] += 1
    if module.has("weight_packed"):
        packed = module.tensors["weight_packed"].dtype.name
        return _four(module, g, job) if packed == "uint8" else _fields(module, g, job)
    kind = module.tensors["weight"].dtype.name if module.has("weight") else ""
    return _bytes(module, g, job) if kind == "int8" else _float8(module, g, job)


def _chosen(module: Module, groups: list[Group]) -> Group:
    if len(groups) == 1:
        return groups[0]
    for kind in (str, re.Pattern):  # names come before patterns, patterns before the class of all linear maps
        for g in groups:
            if any(isinstance(t, kind) and t != "Linear" and targets.matches(t, module.name) for t in g.targets):
                return g
    found = next((g for g in groups if "Linear" in g.targets), None)
    if found is None:
        raise CheckpointError("it is quantized, and no group of config_groups has a target that names it")
    return found


def _rounding(module: Module, g: Group, job: Job) -> tuple[dict[str, Any], str | None]:
    """The activations of a module, and the name of the number they are divided by.

    They are rounded a row at a time, or a group of columns where weights are in blocks; where the file has it
    otherwise, they are left alone."""
    common = dict(dtype=job.dtype)
    if g.activations is None:
        return common, None
    if g.group is not None or g.by_group != (g.block is not None):
        job.notes["activations stay as they are, the file rounds them in other groups than weights"] += 1
        return common, None
    if g.static:
        module.expect("input_scale", FLOATS, (), (1,))
    return common | dict(activations=g.activations), "input_scale" if g.static else None


def _divisor(module: Module, leaf: str | None) -> np.ndarray | None:
    return None if leaf is None else float8.positive(module, leaf)


def _fields(module: Module, g: Group, job: Job) -> Read:
    """pack-quantized."""
    N, W = module.shape("weight_packed", ("int32",))
    K = _columns(module, N, W, g.bits)
    scales = _scales(module, g, N, K)
    G = -(-K // (g.group or K))
    if not g.symmetric:
        module.expect("weight_zero_point", ("int32",), (-(-N * g.bits // 32), G))
    if module.has("weight_g_idx"):
        module.expect("weight_g_idx", ("int32", "int64"), (K,))
    common, divisor = _rounding(module, g, job)

    def read() -> QTensor:
        zero = None
        if not g.symmetric:
            zero = fields(octets(module.read("weight_zero_point").T), g.bits, N).T
            zero = np.ascontiguousarray(zero)
        data, order = octets(module.read("weight_packed")), None
        if module.has("weight_g_idx"):
            order = column_order(module.read("weight_g_idx"), K, g.group or K)
            data = data if order is None else fields(data, g.bits, K)[:, order]
        parts = dict(
            loose=order is not None, scale=scales(), zero=zero, order=order, input_scale=_divisor(module, divisor)
        )
        return integers(data, bits=g.bits, columns=K, group=g.group, **parts, **common)

    return read


def _columns(module: Module, N: int, W: int, bits: int) -> int:
    """In columns, by weight_shape."""
    shape = module.note("weight_shape", ("int32", "int64")).tolist()
    if not isinstance(shape, list) or len(shape) != 2 or shape[0] != N or shape[1] < 1:
        raise CheckpointError(f"weight_shape is {shape!s:.60}, and weight_packed has {N} rows")
    need = -(-shape[1] * bits // 32)
    if need != W:
        raise CheckpointError(
            f"weight_shape says {shape[1]} columns, which take {need} words of {bits}-bit codes; there are {W}"
        )
    return shape[1]


def _scales(module: Module, g: Group, N: int, K: int, dtypes: tuple[str, ...] = FLOATS):
    """The reader of scales [N, G]. Raises CheckpointError where their shape does not fit."""
    if g.group is None:
        return float8.spread(module, "weight_scale", N, K, g.block, dtypes)
    module.expect("weight_scale", dtypes, (N, -(-K // g.group)))
    return lambda: float8.scales(module, "weight_scale")


def _bytes(module: Module, g: Group, job: Job) -> Read:
    """int-quantized."""
    N, K = module.shape("weight", ("int8",))
    group = g.block[1] if g.block else g.group
    scales = _scales(module, g, N, K)
    shape = module.tensors["weight_scale"].shape
    if not g.symmetric:
        module.expect("weight_zero_point", ("int8",), shape)
    common, divisor = _rounding(module, g, job)

    def read() -> QTensor:
        scale = scales()
        zero = None if g.symmetric else _zeros(module.read("weight_zero_point"), g, scale.shape)
        parts = dict(scale=scale, zero=zero, input_scale=_divisor(module, divisor))
        return signed_bytes(module.read("weight"), group=group, **parts, **common)

    return read


def _zeros(zero: np.ndarray, g: Group, shape: tuple[int, int]) -> np.ndarray:
    """Zeros as the file has them -> [N, G]."""
    if g.block:
        return np.repeat(zero, g.block[0], 0)[: shape[0]]
    return zero if zero.shape == shape else np.ascontiguousarray(np.broadcast_to(zero.reshape(-1, 1), shape))


def _float8(module: Module, g: Group, job: Job) -> Read:
    """float-quantized and mxfp8-quantized."""
    N, K = module.shape("weight", (float8.E4M3,))
    group = g.block[1] if g.block else g.group
    scales = _scales(module, g, N, K, float8.SCALES)
    common, divisor = _rounding(module, g, job)

    def read() -> QTensor:
        given = _divisor(module, divisor)
        return floats8(module.read("weight"), group=group, scale=scales(), input_scale=given, **common)

    return read


def _four(module: Module, g: Group, job: Job) -> Read:
    """nvfp4- and mxfp4-pack-quantized."""
    N, half = module.shape("weight_packed", ("uint8",))
    K, group = 2 * half, g.group or 16
    kinds = (float8.E4M3,) if module.has("weight_global_scale") else ("uint8", float8.POWERS)
    module.expect("weight_scale", kinds, (N, -(-K // group)))
    if module.has("weight_global_scale"):
        module.expect("weight_global_scale", FLOATS, (), (1,))
    if g.activations:
        job.notes["activations stay as they are, the file rounds them for weights of 4 bits"] += 1
    return lambda: _read_four(module, K, group, job.dtype)


def _read_four(module: Module, K: int, group: int, dtype: str) -> QTensor:
    above = None
    if module.has("weight_global_scale"):  # what scales were multiplied by when they were made
        factor = np.float32(1) / float8.positive(module, "weight_global_scale")
        above = np.full((module.tensors["weight_packed"].shape[0], 1), factor, np.float32)
    data, scale = module.read("weight_packed"), float8.scales(module, "weight_scale")
    name = "mxfp4" if above is None else "nvfp4"
    return table4(data, "e2m1", name=name, columns=K, group=group, scale=scale, super_scale=above, dtype=dtype)
