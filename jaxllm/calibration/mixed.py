"""Mixed precision: how much each weight suffers from few bits, and the formats that lose least at an average size.

The loss of rounding a weight by d is predicted as the sum of F d^2 / 2 per token, with F the diagonal of the
Fisher information: the second-order term of the KL divergence from the unrounded model, where rounding errors of
different weights do not depend on one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers
from jaxllm.calibration.text import check
from jaxllm.checkpoint.canonical import flatten, nest
from jaxllm.config import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.model import Model
from jaxllm.progress import progress
from jaxllm.quant import Format, Recipe, dequantize, encode, named, recipe

Array = jax.Array

CANDIDATES = tuple(f"int{bits}_g32" for bits in (2, 3, 4, 5, 6, 8))
FISHER_WINDOWS = 64  # windows of text whose gradients are taken


@dataclass(frozen=True)
class Choice:
    """What one weight costs in each format, and the format it got."""

    path: str
    size: int  # values
    losses: Mapping[Format, float]  # predicted, in nats per token
    format: Format

    @property
    def loss(self) -> float:
        """Predicted loss in nats per token with the chosen format."""
        return self.losses[self.format]


@dataclass(frozen=True)
class Mix:
    """The choices for all weights that can be packed, in the model's order."""

    choices: tuple[Choice, ...]

    @property
    def bits(self) -> float:
        """Average bits of a weight, scales included."""
        return sum(c.size * c.format.bits_per_weight for c in self.choices) / sum(c.size for c in self.choices)

    @property
    def loss(self) -> float:
        """Predicted loss in nats per token, all weights together."""
        return sum(c.loss for c in self.choices)

    def recipe(self) -> Recipe:
        """One rule for each weight."""
        return Recipe(tuple((c.path, c.format) for c in self.choices))

    def table(self) -> str:
        """Why: each weight, its bits, its predicted loss, and what one step less and one more would make of it."""
        head = f"{'weight':36}{'values':>12}{'bits':>6}{'loss':>11}{'one less':>11}{'one more':>11}"
        rows = [_row(c) for c in self.choices]
        size = sum(c.size for c in self.choices)
        return "\n".join([head, *rows, f"{'all':36}{size:12,}{self.bits:6.2f}{self.loss:11.6f}"])


def _row(c: Choice) -> str:
    formats = sorted(c.losses, key=lambda f: f.bits_per_weight)
    i = formats.index(c.format)
    around = [c.losses[formats[j]] if 0 <= j < len(formats) else None for j in (i - 1, i + 1)]
    texts = "".join(f"{'-' if x is None else format(x, '.6f'):>11}" for x in around)
    return f"{c.path:36}{c.size:12,}{c.format.bits_per_weight:6.2f}{c.loss:11.6f}{texts}"


def mix(model: Model, bits: float, tokens: np.ndarray, candidates: Sequence[str] = CANDIDATES) -> Mix:
    """The formats with the least predicted loss whose average size is at most `bits` a weight, scales included.

    tokens: i32 [W, T], windows of text; the first FISHER_WINDOWS are used. Takes memory for the weights in f32
    three times. Raises ConfigError where no format is small enough or weights are packed already, JaxllmError for
    tokens that are no windows of text.
    """
    check(model, tokens)
    formats = sorted(map(named, candidates), key=lambda f: f.bits_per_weight)
    if not formats or not bits >= formats[0].bits_per_weight:  # nor a NaN
        least = f"{formats[0].bits_per_weight:g}" if formats else "none given"
        raise ConfigError(
            f"the smallest candidate takes {least} bits a weight with its scales; {bits:g} were asked"
        )
    shapes = {path: leaf.shape for path, leaf in flatten(model.params).items()}
    packed = [path for path, f in recipe(formats[0], model.config).assign(shapes).items() if f is not None]
    information = fisher(model, packed, tokens[:FISHER_WINDOWS])
    losses = {}
    with progress("rounding errors", len(packed)) as advance:
        for path in packed:
            w = np.asarray(flatten(model.params)[path], np.float32)
            losses[path] = {f: _loss(w, f, information[path]) for f in formats}
            advance()
    return choose(losses, {path: int(np.prod(shapes[path])) for path in packed}, bits)


def _loss(w: np.ndarray, f: Format, information: np.ndarray) -> float:
    d = dequantize(encode(w, f), np.float32) - w
    return float((information * np.square(d)).sum(dtype=np.float64) / 2)


def fisher(model: Model, paths: Sequence[str], tokens: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The diagonal of the Fisher information per token of the weights at `paths`, each f32 of its weight's shape.

    Labels are drawn from the model itself, one text [T] of tokens [W, T] at a time, and squares of the gradient of
    all its labels' log-probability averaged: in expectation that is exact.
    """
    flat = {path: jnp.asarray(x, jnp.float32) for path, x in flatten(model.params).items()}
    asked = {path: flat.pop(path) for path in paths}
    total = jax.tree.map(jnp.zeros_like, asked)
    config = replace(model.config, dtype="float32")
    with progress("Fisher information", len(tokens)) as advance:
        for row, key in zip(tokens, jax.random.split(jax.random.key(seed), len(tokens)), strict=True):
            total = _squares(config, asked, flat, jnp.asarray(row)[None], key, total)
            jax.block_until_ready(total)
            advance()
    return {path: np.asarray(x) / tokens.size for path, x in total.items()}


@partial(jax.jit, static_argnames="config", donate_argnames="total")
def _squares(config: ModelConfig, asked: dict, rest: dict, tokens: Array, key: Array, total: dict) -> dict:
    def drawn(asked):
        out, _ = layers.forward(config, nest(asked | rest), tokens)
        logprobs = jax.nn.log_softmax(out, -1)
        label = jax.lax.stop_gradient(jax.random.categorical(key, out))
        return jnp.take_along_axis(logprobs, label[..., None], -1).sum()

    gradient = jax.grad(drawn)(asked)
    return jax.tree.map(lambda a, g: a + jnp.square(g), total, gradient)


def choose(losses: Mapping[str, Mapping[Format, float]], sizes: Mapping[str, int], bits: float) -> Mix:
    """The formats of least total loss at `bits` a weight: from the smallest ones, the step that saves most loss
    for its bits is taken as long as one fits.

    losses: path -> format -> loss. sizes: path -> values.
    """
    chosen = {path: min(of, key=lambda f: f.bits_per_weight) for path, of in losses.items()}
    room = bits * sum(sizes.values()) - sum(chosen[p].bits_per_weight * sizes[p] for p in losses)
    while True:
        steps = [
            ((of[chosen[path]] - of[f]) / cost, path, f, cost)
            for path, of in losses.items()
            for f in of
            if 0 < (cost := (f.bits_per_weight - chosen[path].bits_per_weight) * sizes[path]) <= room + 1e-6
            and of[f] < of[chosen[path]]
        ]
        if not steps:
            break
        _, path, f, cost = max(steps, key=lambda step: step[0])
        chosen[path], room = f, room - cost
    return Mix(tuple(Choice(path, sizes[path], losses[path], chosen[path]) for path in losses))
