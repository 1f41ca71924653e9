"""BitNet b1.58 (arXiv 2402.17764): weights of -1, 0 and 1, activations in 8 bits a row, as transformers saves it.

Offline: weight u8 [N / 4, K], four codes a byte; the lowest bits of byte row r are row r, the next ones row
r + N / 4, and so on; code 1 stands for zero. weight_scale [1] multiplies ("autobitlinear") or divides
("bitlinear"). The codes may also be there unpacked, as values.
Online: weights are ordinary values, rounded here as every forward pass does there, over the mean magnitude.
"""

from __future__ import annotations

import numpy as np

from jaxllm.checkpoint.packed.repack import integers
from jaxllm.checkpoint.packed.stored import FLOATS, Job, Module, Read, Scheme, by_leaf, finite
from jaxllm.checkpoint.safetensors import Tensor
from jaxllm.errors import CheckpointError
from jaxllm.quant import QTensor

SMALLEST = np.float32(1e-5)  # mean magnitude that is divided by
ENDS = ("embed_tokens", "lm_head")


def bitnet(job: Job) -> Scheme:
    """Checkpoints of quant_method "bitnet", offline (packed or not) and online."""
    c = job.settings
    c.expect("use_rms_norm", False)
    divides = c.choice("linear_class", {"bitlinear": True, "autobitlinear": False}, "bitlinear")
    online = c.choice("quantization_mode", {"offline": False, "online": True}, "offline")
    kept = (*ENDS, *(str(name) for name in c.items("modules_to_not_convert", None, [])))
    if online and not divides:
        return Scheme(_every_matrix(kept), lambda module: lambda: _rounded(module, job.dtype), also=())
    return Scheme(by_leaf(("weight_scale",)), lambda module: _reader(module, divides, job.dtype))


def _every_matrix(kept: tuple[str, ...]):
    """A split that takes every matrix but those of modules that are kept."""

    def split(name: str, tensor: Tensor) -> tuple[str, str] | None:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(tensor.shape) != 2 or tensor.dtype.name not in FLOATS:
            return None
        dotted = f".{module}."
        return None if any(f".{k.removesuffix('.weight')}." in dotted for k in kept) else (module, leaf)

    return split


def _reader(module: Module, divides: bool, dtype: str) -> Read:
    module.shape("weight", ("uint8", *FLOATS))
    module.expect("weight_scale", FLOATS, (), (1,))
    packed = module.tensors["weight"].dtype == np.uint8

    def read() -> QTensor:
        x = module.read("weight")
        codes = _unpacked(x) if packed else _whole(x)
        scale = module.read_finite("weight_scale").astype(np.float32).reshape(1, 1)
        if divides and scale <= 0:
            raise CheckpointError(f"weight_scale should be above 0, it is {scale.item()}")
        return _ternary(codes, 1 / scale if divides else scale, dtype)

    return read


def _unpacked(x: np.ndarray) -> np.ndarray:
    """u8 [N / 4, K] -> codes u8 [N, K]. Raises CheckpointError for a code of 3."""
    codes = np.concatenate([(x >> shift) & 3 for shift in (0, 2, 4, 6)])
    if (codes == 3).any():
        raise CheckpointError("weight has codes of 3, and only 0, 1 and 2 stand for anything")
    return codes


def _whole(x: np.ndarray) -> np.ndarray:
    codes = x.astype(np.float32) + 1
    if not np.isin(codes, (0, 1, 2)).all():
        raise CheckpointError("weight should be -1, 0 and 1 beside a weight_scale, it has other values")
    return codes.astype(np.uint8)


def _rounded(module: Module, dtype: str) -> QTensor:
    x = module.read("weight")
    values = finite(x, "weight").astype(np.float32)
    scale = np.float32(1) / np.maximum(np.abs(values).mean(dtype=np.float32), SMALLEST)
    codes = np.clip(np.round(values * scale), -1, 1) + 1
    # A forward pass there casts the rounded weight back to the dtype it is stored in.
    size = (np.float32(1) / scale).astype(x.dtype).astype(np.float32)
    return _ternary(codes.astype(np.uint8), size.reshape(1, 1), dtype)


def _ternary(codes: np.ndarray, scale: np.ndarray, dtype: str) -> QTensor:
    N, K = codes.shape
    parts = dict(name="ternary", scale=np.repeat(scale, N, 0), center=1, loose=True)
    return integers(codes, bits=2, columns=K, group=None, activations="int8", dtype=dtype, **parts)
