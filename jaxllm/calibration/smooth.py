"""SmoothQuant (arXiv 2211.10438): where activations are rounded too, some of their range moves into weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxllm.calibration.awq import Weights, shared
from jaxllm.calibration.moments import Moments
from jaxllm.calibration.reads import Read
from jaxllm.quant import dequantize, encode, products

STRENGTHS = tuple(i / 20 for i in range(6, 19))  # 0.3 .. 0.9


def search(weights: Weights, moments: Moments, read: Read) -> np.ndarray:
    """The scales f32 [K] of an activation with which the readers' outputs lose least: max|x|^a / max|w|^(1 - a)
    (equation 4 of the paper), with `a` chosen by the products of some rows, both sides rounded; or ones.
    """
    largest = np.maximum(shared(moments.max_abs, read, np.max), 1e-5)
    heaviest = np.maximum(np.max([np.abs(w).max(0) for w, _ in weights], 0), 1e-5)
    heaviest = shared(heaviest, read, np.max)
    tried = [np.ones_like(largest), *(largest**a / heaviest ** (1 - a) for a in STRENGTHS)]
    return min((s.astype(np.float32) for s in tried), key=lambda s: loss(weights, moments.rows, s))


def loss(weights: Weights, rows: np.ndarray, s: np.ndarray) -> float:
    """Squared error of the products of rows f32 [R, K] when rows / s and the weights times s are rounded."""
    total = 0.0
    for w, f in weights:
        q = encode(w * s, f)
        x = rows / s
        x = np.asarray(products.rounded_activations(jnp.asarray(x), q)) if f.activations else x
        total += float(np.square(x @ dequantize(q, np.float32).T - rows @ w.T).sum(dtype=np.float64))
    return total
