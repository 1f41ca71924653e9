"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel save it.

qweight i32 [K * bits / 32, N]: fields along the in axis, lowest first, 3-bit ones without gaps; qzeros i32
[G, N * bits / 32], fields along the out axis; scales [G, N]; g_idx i32 [K], the group of each column (act-order).
In the first version of the format zeros are stored minus one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.packed.repack import fields, integers, octets
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, bits, by_leaf, group_size
from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
WIDTHS = (2, 3, 4, 8)
WORDS = ("int32", "uint32")


@dataclass(frozen=True)
class Layout:
    """What config.json says of every module."""

    bits: int
    group: int | None
    less_one: bool  # zeros are stored minus one
    symmetric: bool  # zeros are all the middle code, and need not be kept
    varied: bool  # modules may have bits and groups of their own; their shapes tell
    dtype: str


def gptq(job: Job) -> Scheme:
    """Checkpoints of AutoGPTQ ("gptq") and GPTQModel ("gptq_v2"), 2, 3, 4 and 8 bits."""
    c = job.settings
    c.expect("is_marlin_format", False)
    c.expect("pack_dtype", "int32")
    less_one = c.choice("checkpoint_format", {"gptq": True, "gptq_v2": False}, "gptq")
    width, group = bits(c, "bits", WIDTHS), group_size(c)
    layout = Layout(width, group, less_one, c.flag("sym", True), bool(c.table("dynamic", {})), job.dtype)
    return Scheme(by_leaf(LEAVES), lambda module: _reader(module, layout))


def _reader(module: Module, layout: Layout) -> Read:
    words, N = module.shape("qweight", WORDS)
    G = module.shape("scales", FLOATS)[0]
    module.expect("scales", FLOATS, (G, N))
    width, group = _told(module, words, N, layout.group) if layout.varied else (layout.bits, layout.group)
    if words * 32 % width:
        raise CheckpointError(
            f"qweight has {words} rows of 32 bits, which are no whole number of {width}-bit codes"
        )
    K = words * 32 // width
    wanted = -(-K // (group or K))
    if wanted != G:
        raise CheckpointError(f"{K} columns in groups of {group or K} need {wanted} rows of scales, there are {G}")
    module.expect("qzeros", WORDS, (G, -(-N * width // 32)))
    if module.has("g_idx"):
        module.expect("g_idx", ("int32", "int64"), (K,))
    return lambda: _read(module, width, K, group, layout)


def _told(module: Module, words: int, N: int, usual: int | None) -> tuple[int, int | None]:
    """(bits, group) by the shapes of a module; the usual group where it fits."""
    G, columns = module.shape("qzeros", WORDS)
    width = next((b for b in WIDTHS if -(-N * b // 32) == columns), 0)
    if not width or words * 32 % width:
        raise CheckpointError(
            f"{columns} words of zeros for {N} rows are of none of {', '.join(map(str, WIDTHS))} bits"
        )
    K = words * 32 // width
    if -(-K // (usual or K)) == G:
        return width, usual
    return width, None if G == 1 else -(-K // G)


def _read(module: Module, width: int, K: int, group: int | None, layout: Layout) -> QTensor:
    scale = np.ascontiguousarray(module.read_finite("scales").T)
    N = len(scale)
    zero = fields(octets(module.read("qzeros")), width, N)  # [G, N]
    if layout.less_one:
        zero = (zero + np.uint8(1)) & np.uint8(2**width - 1)
    needless = layout.symmetric and (zero == 2 ** (width - 1)).all()
    zero = None if needless else np.ascontiguousarray(zero.T)
    words = module.read("qweight")
    data = octets(np.ascontiguousarray(words.T))
    order = column_order(module.read("g_idx"), K, group or K) if module.has("g_idx") else None
    data = data if order is None else fields(data, width, K)[:, order]
    parts = dict(scale=scale, zero=zero, order=order, loose=order is not None)
    return integers(data, bits=width, columns=K, group=group, dtype=layout.dtype, **parts)


def column_order(g_idx: np.ndarray, K: int, group: int) -> np.ndarray | None:
    """The columns sorted by group, i32 [K]; None where they are sorted already, or no group was written (-1).

    Raises CheckpointError where a group has other than `group` columns."""
    if (g_idx == -1).all():
        return None
    plain = np.arange(K) // group
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], plain):
        raise CheckpointError(
            f"g_idx should put {group} columns in each of {plain[-1] + 1} groups, the last may have fewer; "
            f"it has groups from {g_idx.min()} to {g_idx.max()} of other sizes"
        )
    return None if np.array_equal(g_idx, plain) else order
