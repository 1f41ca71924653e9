"""Training an EAGLE head (arXiv 2401.15077): behind every token it learns what the target says, and its feature.

As in EAGLE-3 (arXiv 2503.01840) it also learns from features of its own, as it has them when it drafts.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.draft_head import DraftHead
from jaxllm.errors import JaxllmError
from jaxllm.families import family
from jaxllm.feature_head import Head, HeadConfig, empty, head_shape
from jaxllm.head_files import describe_eagle, eagle_values, load_eagle, nested, save_eagle
from jaxllm.heads import Leaves, Seen, guess
from jaxllm.model import Model
from jaxllm.quant import QTensor, dequantize

Array = jax.Array
TARGETS = ("embed.w", "head.w", "head.b")  # which are not trained
FADES = 0.8  # what each round's loss weighs of the one's before
FEATURE = 0.1  # what the distance between features weighs beside that of distributions


@dataclasses.dataclass(frozen=True)
class EagleHead:
    """One layer like the target's, under the target's own embedding and projection; see `eagle_head`.

    rounds: how often the head reads the text; after the first, with its own features in place of the target's."""

    config: HeadConfig
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise JaxllmError(f"an EAGLE head is trained in at least one round, got {self.rounds}")

    @property
    def features(self) -> tuple[str, ...]:
        return self.config.features

    def start(self, target: Model, seed: int) -> Leaves:
        """A layer that hardly changes the feature it is given."""
        rng, leaves = np.random.default_rng(seed), {}
        for path, shape in head_shape(self.config).items():
            if path in TARGETS:
                continue
            small = 0.1 if path.endswith((".o.w", ".down.w")) or path == "join.w" else 1.0
            x = rng.standard_normal(shape) * shape[-1] ** -0.5 * small if len(shape) > 1 else np.zeros(shape)
            leaves[path] = jnp.asarray(x + (len(shape) == 1 and path.endswith("pre.w")), jnp.float32)
        D = self.config.model.width
        leaves["join.w"] = leaves["join.w"].at[:, D:].add(jnp.eye(D, self.config.feature_width))
        return leaves

    def loss(self, config: ModelConfig, params: dict, leaves: Leaves, seen: Seen) -> tuple[Array, Array]:
        """As of `heads.Kind`; a place is a round."""
        head = dataclasses.replace(self.config, model=dataclasses.replace(self.config.model, dtype="float32"))
        tree = jax.tree.map(_plain, nested(head, Model(config, params), leaves), is_leaf=_is_packed)
        features, total, hits = seen.features.astype(jnp.float32), 0.0, []
        before, tokens = head.take(tree, features[:, :-1]), seen.tokens[:, 1:]
        for i in range(self.rounds):
            x, _ = head.read(tree, tokens, before, empty(head, *tokens.shape))
            cost, right = guess(head.said(tree, x), seen.logprobs[:, 1:])
            apart = jnp.abs(x - features[:, 1:])
            apart = jnp.where(apart < 1, apart**2 / 2, apart - 0.5).mean()
            total, hits = total + FADES**i * (cost + FEATURE * apart), [*hits, right]
            before = jnp.concatenate([before[:, :1], x[:, :-1]], 1)
        return total, jnp.stack(hits)

    def write(self, target: Model, leaves: Leaves, held: np.ndarray, folder: pathlib.Path) -> None:
        """As of `heads.Kind`."""
        stored = {path: jnp.asarray(x, target.config.dtype) for path, x in leaves.items()}
        save_eagle(Head(self.config, nested(self.config, target, stored)), eagle_values(target), folder)

    def drafter(self, target: Model, folder: pathlib.Path) -> DraftHead:
        """As of `heads.Kind`."""
        return DraftHead(load_eagle(folder, target))


def eagle_head(target: Model, rounds: int = 3) -> EagleHead:
    """A new head for a target that was loaded; raises ConfigError as `describe_eagle` does."""
    values = eagle_values(target)
    return EagleHead(
        describe_eagle(values, family(values.get("model_type")), ("model.fc.weight",), target.config), rounds
    )


def _is_packed(x: Any) -> bool:
    return isinstance(x, QTensor)


def _plain(x: Any) -> Array:
    return dequantize(x).astype(jnp.float32) if _is_packed(x) else x.astype(jnp.float32)
