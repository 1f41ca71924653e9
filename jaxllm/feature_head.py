"""A head that guesses tokens from a target's own hidden vectors, as pure functions over parameter dicts.

For every token it reads the embedding of that token and a feature of the one before: the target's hidden vector,
or its own where the target has not been. One description serves EAGLE (arXiv 2401.15077) and EAGLE-3 (2503.01840)
and the layers of checkpoints that predict further tokens (2404.19737, 2412.19437).

B batch, T new tokens, D width, W width of the target's features side by side, V vocabulary of the target, U of the
head (U <= V), n draft layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm import layers
from jaxllm.basics import linear, norm
from jaxllm.config import ModelConfig, Norm, params_shape
from jaxllm.state import State, init_state

Array = jax.Array
Join = Literal["project", "beside"]
Final = Literal["none", "said", "carried"]


@dataclass(frozen=True)
class HeadConfig:
    """What a head is. Its parameters are a nested dict of the paths in `head_shape`.

    join: "project": embedding and feature, side by side, become D wide by a matrix; "beside": the feature is what
    enters the layer, and its mixer reads the embedding beside it. final, the norm after the layers: there is none;
    it is applied to what logits are made of; or also to the feature that is carried on to the next token.
    """

    model: ModelConfig  # its layers, width and logits: vocab is U; embed_norm is the embedding's before the join
    vocab: int  # V
    features: tuple[str, ...]  # activations of the target (see `taps`), in the order they lie side by side
    feature_width: int  # W
    join: Join = "project"
    bias: bool = False  # of the join's matrix
    feature_norm: Norm | None = None  # of the feature, before it is joined by a matrix
    reduced: bool = False  # the target's features [W] are made D wide by a matrix; the head's own are already
    final: Final = "none"

    def read(
        self,
        params: dict,
        tokens: Array,
        before: Array,
        state: State,
        *,
        n_new: Array | None = None,
        depth: Array | None = None,
        tree: Array | None = None,
    ) -> tuple[Array, State]:
        """Append tokens i32 [B, T] whose features before them are [B, T, D] -> (their features [B, T, D], state).

        The other arguments are those of `layers.hidden`."""
        config, (B, T) = self.model, tokens.shape
        layers.check_call(config, tokens, state, n_new)
        n_new = jnp.full(B, T, jnp.int32) if n_new is None else jnp.asarray(n_new, jnp.int32)
        step = layers.placed(config, state, n_new, depth, tree, T)
        embedding = layers.embedded(config, params, tokens, step, state, n_new)
        before = jnp.where((step.pos >= 0)[..., None], before, 0).astype(config.dtype)
        x, beside = self._joined(params, embedding, before)
        x, state = layers.through(config, params, x, state, step, n_new, beside=beside)
        return norm(config.norm, params["norm"], x) if self.final == "carried" else x, state

    def _joined(self, params: dict, embedding: Array, before: Array) -> tuple[Array, Array | None]:
        """(what enters the layers [B, T, D], what the mixer reads beside it)."""
        if self.join == "beside":
            return before, embedding
        if self.feature_norm:
            before = norm(self.feature_norm, params["feature_norm"], before)
        return linear(params["join"], jnp.concatenate([embedding, before], -1)), None

    def take(self, params: dict, features: Array) -> Array:
        """The target's features [B, T, W] as this head reads them: [B, T, D]."""
        return linear(params["reduce"], features.astype(self.model.dtype)) if self.reduced else features

    def said(self, params: dict, x: Array) -> Array:
        """Logits f32 [..., V] of the token after each feature x [..., D]; -inf for tokens it never says."""
        if self.final == "said":
            x = norm(self.model.norm, params["norm"], x)
        logits = layers.logits(self.model, params, x)
        if self.model.vocab == self.vocab:
            return logits
        place = params[
            "vocabulary"
        ]  # i32 [V]: where a token lies in the head's own vocabulary, -1 where it does not
        return jnp.where(place >= 0, jnp.take(logits, jnp.maximum(place, 0), -1), -jnp.inf)


@dataclass(frozen=True)
class Head:
    """A head in hand: description and parameters, of which embedding and projection may be the target's own."""

    config: HeadConfig
    params: dict
    name: str = ""


def forward(head: HeadConfig, params: dict, tokens: Array, features: Array) -> tuple[Array, Array]:
    """Whole texts at once: tokens i32 [B, T + 1] and the target's features [B, T, W] of all but the last ->
    (the head's features [B, T, D], its logits f32 [B, T, V] of the tokens after tokens[:, 1:]).

    Pure and differentiable; for another round the first result takes the place of `head.take(params, features)`.
    """
    x, _ = head.read(params, tokens[:, 1:], head.take(params, features), empty(head, *features.shape[:2]))
    return x, head.said(params, x)


def empty(head: HeadConfig, batch: int, length: int, *, chunk: int | None = None) -> State:
    """A state of the head for `batch` rows of `length` tokens; raises ContextError as `init_state` does."""
    return init_state(head.model, batch, length, chunk=chunk)


def head_shape(head: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, the embedding and the vocabulary's projection included.

    `embed` and `head` may be the target's own. Matrices are [out, in]; see `config.params_shape`.
    """
    D, W = head.model.width, head.feature_width
    shapes = params_shape(head.model) | {"embed.w": (head.vocab, D)}
    if head.join == "beside":
        shapes |= {p: (n, m + D) for p in _READING for n, m in [shapes[p]]}
    else:
        shapes["join.w"] = (D, D + (D if head.reduced else W))
    if head.bias:
        shapes["join.b"] = (D,)
    if head.feature_norm:
        shapes["feature_norm.w"] = (D if head.reduced else W,)
    if head.reduced:
        shapes["reduce.w"] = (D, W)
    if head.final == "none":
        shapes = {path: shape for path, shape in shapes.items() if not path.startswith("norm.")}
    return shapes


_READING = tuple(f"layers.0.mixer.{name}.w" for name in "qkv")  # what reads the embedding beside the feature
