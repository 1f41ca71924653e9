"""Random parameters of any shape in any weight format: to measure with, where no checkpoint is needed.

What a step costs depends on shapes and formats, hardly on values. A few rows of each width are drawn, rounded by
`quant.encode` and repeated: no matrix is ever held in full precision, and 8 billion weights take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.arena import Arena, aligned
from jaxllm.checkpoint.canonical import nest
from jaxllm.config import ModelConfig, params_shape
from jaxllm.model import Model
from jaxllm.progress import progress
from jaxllm.quant import Format, QTensor, encode, recipe
from jaxllm.quant.formats import UNQUANTIZED

ROWS = 128  # drawn of each width: the rows that share a scale in any format


def random_model(
    config: ModelConfig,
    *,
    format: str | None = None,
    name: str = "random",
    values: Mapping[str, Any] | None = None,
) -> Model:
    """A Model with random weights: in config.dtype, or in a weight format as `quantize_model` gives it.

    values: its config.json, which `save` needs. Raises ConfigError for an unknown format."""
    shapes = params_shape(config)
    rules = recipe(format, config) if format else None
    formats = rules.assign(shapes) if rules else {}
    live = replace(config, dtype=(rules and rules.dtype) or config.dtype)
    drawn: dict[Any, np.ndarray | QTensor] = {}
    params, arena = {}, Arena()
    with progress("making weights", len(shapes)) as advance:
        for i, (path, shape) in enumerate(shapes.items()):
            params[path] = arena.put(_leaf(path, shape, formats.get(path), config, live, drawn, i))
            advance()
    return Model(live, nest(params), name=name, values=values or {})


def _leaf(path, shape, format: Format | None, stored: ModelConfig, live: ModelConfig, drawn: dict, turn: int):
    """One parameter: vectors as `load` leaves them, matrices in the live dtype, packed ones in their format."""
    if len(shape) < 2:
        near = 1.0 if path.split(".")[-1] == "w" else 0.0  # norms; biases
        return np.full(shape, near, _numpy(stored.dtype))
    plain = format is None or format.name in UNQUANTIZED
    kind = (format.levels if format else live.dtype) if plain else format
    key = (shape[-1], kind)
    if key not in drawn:
        drawn[key] = _draw(shape[-1], kind)
    block = drawn[key]
    if not isinstance(block, QTensor):
        return _repeat(block, shape, turn)
    parts = {n: _repeat(part, (*shape[:-1], *part.shape[1:]), turn) for n, part in block.parts().items()}
    return replace(block, **parts, dtype_name=live.dtype)


def _draw(columns: int, kind: Format | str) -> np.ndarray | QTensor:
    """ROWS rows of a matrix, of a size that keeps what passes through it."""
    rows = np.random.default_rng(columns).standard_normal((ROWS, columns), np.float32) * columns**-0.5
    return encode(rows, kind) if isinstance(kind, Format) else rows.astype(_numpy(kind))


def _repeat(rows: np.ndarray, shape: tuple[int, ...], turn: int) -> np.ndarray:
    """An array of `shape` [.., N, X] with the rows [ROWS, X] again and again, from row `turn` on."""
    out = aligned(int(np.prod(shape)) * rows.itemsize).view(rows.dtype).reshape(-1, shape[-1])
    rows = np.roll(rows, turn, axis=0)
    for start in range(0, len(out), ROWS):
        part = out[start : start + ROWS]
        part[:] = rows[: len(part)]
    return out.reshape(shape)


def _numpy(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
