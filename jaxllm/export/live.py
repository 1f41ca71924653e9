"""The programs of an export, jitted where they were made: the runner of a model that jaxllm itself holds."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.canonical import flatten
from jaxllm.export.options import Options
from jaxllm.export.parameters import abstract, named
from jaxllm.export.program import programs
from jaxllm.model import Model


class Live:
    """A Runner of `target.Runner`'s kind. options: settled."""

    def __init__(self, model: Model, options: Options):
        made = programs(model.config, abstract(model.params), options)
        self._params = named(flatten(model.params))
        self._calls = {p.name: jax.jit(p.call, donate_argnums=1) for p in made}
        self._empty = {p.name: (p.shape, p.initial, p.dtype) for p in made[0].inputs if p.role == "state"}

    def start(self) -> dict[str, jax.Array]:
        """An empty state by name."""
        return {name: jax.numpy.full(*array) for name, array in self._empty.items()}

    def step(self, program: str, state: Any, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
        """See `jaxllm.export.target.Runner`."""
        results, state = self._calls[program](self._params, state, inputs)
        return {k: np.asarray(x) for k, x in results.items()}, state
