"""NVIDIA ModelOpt's checkpoints in Hugging Face's form: FP8 and NVFP4.

FP8: weight e4m3 [N, K], weight_scale [] and input_scale []. NVFP4: weight u8 [N, K / 2], codes e2m1, the first of
a byte low; weight_scale e4m3 [N, K / 16] times weight_scale_2 []. Activations of NVFP4 stay as they are.
"""

from __future__ import annotations

import re

import numpy as np

from jaxllm.checkpoint.packed import float8
from jaxllm.checkpoint.packed.repack import table4
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, by_leaf
from jaxllm.quant import QTensor

GROUP = 16
LEAVES = ("weight_scale", "weight_scale_2", "input_scale")
CACHE = re.compile(r".*\.([qkv]|[kv]_proj\.[kv])_scale")  # of a quantized cache


def modelopt(job: Job) -> Scheme:
    """Checkpoints of quant_method "modelopt" with quant_algo FP8 or NVFP4."""
    c = job.settings
    four = c.choice("quant_algo", {"FP8": False, "NVFP4": True})
    if c.raw("kv_cache_quant_algo") or c.raw("kv_cache_scheme"):
        job.notes["the scales of a quantized cache are not used"] += 1
    reader = _nvfp4 if four else _float8
    return Scheme(by_leaf(LEAVES), lambda module: reader(module, job), drop=lambda n: bool(CACHE.fullmatch(n)))


def _float8(module: Module, job: Job) -> Read:
    divisor = "input_scale" if module.has("input_scale") else None
    activations = float8.E4M3 if divisor else None
    return float8.scaled(module, "weight_scale", None, dtype=job.dtype, activations=activations, divisor=divisor)


def _nvfp4(module: Module, job: Job) -> Read:
    N, half = module.shape("weight", ("uint8",))
    module.expect("weight_scale", (float8.E4M3,), (N, -(-2 * half // GROUP)))
    module.expect("weight_scale_2", FLOATS, (), (1,))
    if module.has("input_scale"):
        job.notes["activations stay as they are, the file rounds them for weights of 4 bits"] += 1

    def read() -> QTensor:
        above = np.full((N, 1), float8.positive(module, "weight_scale_2"), np.float32)
        scale = float8.scales(module, "weight_scale")
        parts = dict(name="nvfp4", columns=2 * half, group=GROUP, scale=scale, super_scale=above, dtype=job.dtype)
        return table4(module.read("weight"), "e2m1", **parts)

    return read
