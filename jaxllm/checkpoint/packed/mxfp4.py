"""MXFP4 (OCP Microscaling Formats 1.0) as gpt-oss saves its experts.

X_blocks u8 [E, N, G, 16]: 32 codes e2m1 of a group, the first of a byte low; X_scales u8 [E, N, G]: exponents of
powers of two, 127 more than they stand for. Together they are X, [E, N, 32 G].
"""

from __future__ import annotations

import numpy as np

from jaxllm.checkpoint.packed.float8 import powers
from jaxllm.checkpoint.packed.repack import table4
from jaxllm.checkpoint.packed.stored import Job, Module, Read, Scheme, finite
from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor

GROUP = 32


def mxfp4(job: Job) -> Scheme:
    """Checkpoints of quant_method "mxfp4": stacked experts; everything else is not packed."""
    return Scheme(_split, lambda module: _reader(module, job.dtype), also=(), target="{}")


def _split(name: str, tensor: object) -> tuple[str, str] | None:
    stem, _, leaf = name.rpartition("_")
    return (stem, leaf) if leaf in ("blocks", "scales") and stem else None


def _reader(module: Module, dtype: str) -> Read:
    *lead, G, half = module.shape("blocks", ("uint8",), None)
    if len(lead) not in (1, 2) or half != GROUP // 2:
        raise CheckpointError(f"blocks should have shape [E, N, G, 16], it has {[*lead, G, half]}")
    module.expect("scales", ("uint8",), (*lead, G))

    def read() -> QTensor:
        data = module.read("blocks").reshape(*lead, -1)
        scale = finite(powers(module.read("scales")), "scales")
        return table4(
            data,
            "e2m1",
            name="mxfp4",
            columns=GROUP * G,
            group=GROUP,
            scale=np.ascontiguousarray(scale),
            dtype=dtype,
        )

    return read
