"""One plain forward without a cache: what loops, chunks and windows are held against."""

import jax
import numpy as np

from jaxllm import layers
from jaxllm.model import Model

SIZE = 64  # rows are padded on the right to a multiple, so that few programs serve all lengths
FORWARD = jax.jit(layers.forward, static_argnums=0)


def logits(model: Model, ids) -> np.ndarray:
    """f32 [T, V]: what a causal model says after each of the tokens ids [T]."""
    size = min(-(-len(ids) // SIZE) * SIZE, model.config.max_len)
    row = np.zeros((1, size), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(FORWARD(model.config, model.params, row)[0])[0, : len(ids)]
