"""AWQ (arXiv 2306.00978): scale up the channels that carry large activations before the weights are rounded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.calibration.moments import Moments
from jaxllm.calibration.reads import Read
from jaxllm.quant import dequantize, encode
from jaxllm.quant.formats import Format

STEPS = 20  # exponents tried between 0 (no scaling) and 1
Weights = Sequence[tuple[np.ndarray, Format]]  # (w f32 [N, K], its format) of the linears of one read


def search(weights: Weights, moments: Moments, read: Read) -> np.ndarray:
    """The scales f32 [K] of an activation with which its readers lose least: a power of its mean magnitudes.

    The loss of a weight is tr(d H d^T) with d what plain rounding of the scaled weight changes.
    """
    size = np.maximum(shared(moments.mean_abs, read, np.mean), 1e-4)
    hessian = moments.hessian.astype(np.float32)
    tried = [_balanced(size ** (i / STEPS)) for i in range(STEPS)]
    return min(tried, key=lambda s: sum(_loss(w * s, w, s, hessian, f) for w, f in weights))


def _balanced(s: np.ndarray) -> np.ndarray:
    """Scales about one: their largest and smallest are each other's inverse."""
    return (s / np.sqrt(s.max() * s.min())).astype(np.float32)


def _loss(scaled: np.ndarray, w: np.ndarray, s: np.ndarray, hessian: np.ndarray, f: Format) -> float:
    d = dequantize(encode(scaled, f), np.float32) / s - w
    return float(((d @ hessian) * d).sum(dtype=np.float64))


def shared(x: np.ndarray, read: Read, reduce) -> np.ndarray:
    """x [K], reduced over the channels that one row of the maker feeds (query heads of a kv head)."""
    if read.repeat == 1:
        return x
    heads = x.reshape(-1, read.repeat, read.head)
    return np.repeat(reduce(heads, axis=1), read.repeat, 0).reshape(x.shape)
