"""Training Medusa heads (arXiv 2401.10774): head k learns what the target says k + 1 tokens further on."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.checkpoint.medusa import write_heads
from jaxllm.config import ModelConfig
from jaxllm.draft_medusa import Medusa, best_choices, head_logits, load_medusa
from jaxllm.errors import JaxllmError
from jaxllm.heads import Leaves, Seen, guess, look
from jaxllm.model import Model
from jaxllm.quant import QTensor, dequantize

Array = jax.Array
RANKS = 10  # of a head's tokens that a tree may ask for
FADES = 0.8  # what each head's loss weighs of the one's before, as in Medusa


@dataclass(frozen=True)
class MedusaHeads:
    """heads of `layers` blocks each. own: projections of their own, which begin as the target's, or the target's
    itself. nodes: drafts in the tree that config.json gets, which keeps most by held-out text."""

    heads: int = 4
    layers: int = 1
    own: bool = False
    nodes: int = 24
    features: ClassVar[tuple[str, ...]] = ("norm",)

    def __post_init__(self) -> None:
        if min(self.heads, self.layers, self.nodes) < 1:
            raise JaxllmError(
                f"heads, layers and nodes are at least 1, got {self.heads}, {self.layers}, {self.nodes}"
            )

    def start(self, target: Model, seed: int) -> Leaves:
        """Blocks that change nothing, as Medusa begins with: guesses are then the target's own next token."""
        D, leaves = target.config.width, {}
        for i in range(self.heads):
            for j in range(self.layers):
                leaves |= {f"{i}.{j}.w": jnp.zeros((D, D)), f"{i}.{j}.b": jnp.zeros(D)}
            if self.own:
                leaves[f"{i}.out"] = _projection(target.config, target.params)
        return leaves

    def loss(self, config: ModelConfig, params: dict, leaves: Leaves, seen: Seen) -> tuple[Array, Array]:
        """As of `heads.Kind`."""
        T, x = seen.tokens.shape[1], seen.features.astype(jnp.float32)
        ends = {"embed": {"w": _projection(config, params)}, "head": {"w": _projection(config, params)}}
        ends["head"] |= {"b": params["head"]["b"]} if config.head_bias else {}
        total, hits = 0.0, []
        for i, head in enumerate(self.nested(leaves)["heads"]):
            logits = head_logits(config, ends, {"heads": [head]}, x[:, : T - 1 - i])[..., 0, :]
            cost, right = guess(logits, seen.logprobs[:, 1 + i :])
            total, hits = total + FADES**i * cost, [*hits, right]
        return total, jnp.stack(hits)

    def nested(self, leaves: Leaves) -> dict:
        """The tree that `checkpoint.medusa.read_heads` gives."""
        blocks = lambda i: [{k: leaves[f"{i}.{j}.{k}"] for k in "wb"} for j in range(self.layers)]
        out = lambda i: {"out": {"w": leaves[f"{i}.out"]}} if self.own else {}
        return {"heads": [{"blocks": blocks(i), **out(i)} for i in range(self.heads)]}

    def write(self, target: Model, leaves: Leaves, held: np.ndarray, folder: pathlib.Path) -> None:
        """As of `heads.Kind`; with the tree that keeps most of the held-out text."""
        heads = jax.tree.map(lambda x: jnp.asarray(x, target.config.dtype), self.nested(leaves))
        ranks = min(RANKS, target.config.vocab)
        seen = [_hits(target.config, target.params, heads, row[None], ranks) for row in held[:16]]
        choices = best_choices(np.mean(seen, 0, dtype=np.float64), self.nodes)
        values = dict(base_model_name_or_path=target.name, hidden_size=target.config.width)
        values |= dict(vocab_size=target.config.vocab, medusa_choices=[list(path) for path in choices])
        write_heads(folder, jax.tree.map(np.asarray, heads), values)

    def drafter(self, target: Model, folder: pathlib.Path) -> Medusa:
        """As of `heads.Kind`."""
        return load_medusa(folder, target)


def _projection(config: ModelConfig, params: dict) -> Array:
    """The target's projection, f32 [V, D]."""
    w = params["embed"]["w"] if config.tied else params["head"]["w"]
    return dequantize(w) if isinstance(w, QTensor) else w.astype(jnp.float32)


@partial(jax.jit, static_argnames=("config", "ranks"))
def _hits(config: ModelConfig, params: dict, heads: dict, tokens: Array, ranks: int) -> Array:
    """How often each rank of each head was what the target says first: f32 [K, ranks], of tokens i32 [1, T]."""
    seen = look(config, params, tokens, MedusaHeads.features)
    best = lax.top_k(head_logits(config, params, heads, seen.features), ranks)[1]  # [1, T, K, ranks]
    first, T = seen.logprobs.argmax(-1), tokens.shape[1]
    right = [best[:, : T - 1 - k, k] == first[:, 1 + k :, None] for k in range(len(heads["heads"]))]
    return jnp.stack([r.mean((0, 1)) for r in right])
