"""AWQ (arXiv 2306.00978) as AutoAWQ saves it: 4 bits with zeros.

GEMM: qweight i32 [K, N / 8], qzeros i32 [G, N / 8], scales [G, N]; the eight fields of a word are rows
0, 2, 4, 6, 1, 3, 5, 7 of the weight. GEMV: qweight i32 [N, K / 8], fields in order along the in axis; qzeros
i32 [N, W] and scales [N, 8 W], the groups of a row padded to whole words.
"""

from __future__ import annotations

import numpy as np

from jaxllm.checkpoint.packed.repack import fields, integers, octets
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, bits, by_leaf, group_size
from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor

LEAVES = ("qweight", "qzeros", "scales")
WORDS = ("int32", "uint32")
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # field that holds row 0, 1, .. of a word's eight


def awq(job: Job) -> Scheme:
    """Checkpoints of AutoAWQ, versions "gemm" (also as exllama and ipex use it) and "gemv"."""
    c = job.settings
    bits(c, "bits|w_bit", (4,))
    group = group_size(c, "group_size|q_group_size")
    version = c.raw("version|format", "gemm")
    version = version.lower() if isinstance(version, str) else version
    readers = {"gemm": _gemm, "exllama": _gemm, "ipex": _gemm, "gemv": _gemv}
    if version not in tuple(readers):
        c.problem(f"version is {version!r:.60}; read are {', '.join(readers)}")
    reader = readers["gemv" if version == "gemv" else "gemm"]
    return Scheme(by_leaf(LEAVES), lambda module: reader(module, group, job.dtype))


def _gemm(module: Module, group: int | None, dtype: str) -> Read:
    K, words = module.shape("qweight", WORDS)
    N, G = 8 * words, _groups(K, group)
    module.expect("qzeros", WORDS, (G, words))
    module.expect("scales", FLOATS, (G, N))
    if K % 2:
        raise CheckpointError(f"qweight should have an even number of columns, it has {K}")

    def read() -> QTensor:
        scale = np.ascontiguousarray(module.read_finite("scales").T)
        zero = _pairs(np.repeat(module.read("qzeros"), 2, 0)) & np.uint8(15)
        data = _pairs(module.read("qweight"))
        return integers(data, bits=4, columns=K, group=group, scale=scale, zero=zero, dtype=dtype)

    return read


def _pairs(words: np.ndarray) -> np.ndarray:
    """[K, N / 8] words -> rows of codes, two a byte, the first one low: u8 [N, K / 2]."""
    K, count = words.shape
    out = np.empty((count, 8, K // 2), np.uint8)
    for row, place in enumerate(PLACE):
        codes = ((words >> (4 * place)) & 15).astype(np.uint8)
        out[:, row] = (codes[0::2] | (codes[1::2] << 4)).T
    return out.reshape(8 * count, K // 2)


def _gemv(module: Module, group: int | None, dtype: str) -> Read:
    N, words = module.shape("qweight", WORDS)
    K = 8 * words
    G = _groups(K, group)
    _, W = module.shape("qzeros", WORDS)
    if 8 * W < G:
        raise CheckpointError(f"qzeros should hold {G} groups a row, it holds {8 * W}")
    module.expect("qzeros", WORDS, (N, W))
    module.expect("scales", FLOATS, (N, 8 * W))

    def read() -> QTensor:
        scale = module.read_finite("scales")[:, :G]
        zero = fields(octets(module.read("qzeros")), 4, G)
        data = octets(module.read("qweight"))
        return integers(data, bits=4, columns=K, group=group, scale=scale, zero=zero, dtype=dtype)

    return read


def _groups(K: int, group: int | None) -> int:
    return -(-K // (group or K))
