"""A model's drafts as pure functions: what it says next, chosen node by node into a chain or a tree.

B rows, n nodes at once, N nodes of a tree (node 0 is the newest token), V the target's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.sampling import Context, Sampler
from jaxllm.spec_verify import Draft, Tree, along, chain_of, processed, relations
from jaxllm.state import State, keep_path

Array = jax.Array
Choice = Literal["draw", "couple", "top"]
Place = tuple[Context | None, Array | None, Array]  # of the target: context, keys [B], tokens emitted i32 [B]
_DRAFT = (1 << 30) + 1  # what a step's key is folded with for drafts


# ---- the program ---------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("config", "choice", "vocab", "widths"), donate_argnames="state")
def draft(
    config: ModelConfig,
    params: dict,
    sampler: Sampler,
    state: State,
    tokens: Array,
    n_new: Array,
    place: Place,
    length: Array,
    *,
    choice: Choice,
    vocab: int,
    widths: tuple[int, ...],
) -> tuple[Draft, State]:
    """Feed tokens i32 [B, 2] (n_new i32 [B] of them real), then draft a tree of these widths.

    Widths of 1 are a chain, of which `length` i32 [] tokens are drafted; another tree is drafted whole."""
    x, state = newest(config, params, state, tokens, n_new)
    choose = from_keys(sampler, choice, vocab, place)
    if set(widths) == {1}:
        return grow_chain(config, params, choose, state, x, place[0], 1 + len(widths), length)
    return grow_tree(config, params, choose, state, x, place[0], widths)


def newest(config: ModelConfig, params: dict, state: State, tokens: Array, n_new: Array) -> tuple[Array, State]:
    """Feed tokens i32 [B, T], n_new i32 [B] of them real -> (x [B, 1, D] of the last real one, state)."""
    x, state, _ = layers.hidden(config, params, tokens, state, n_new=n_new)
    return jnp.take_along_axis(x, jnp.maximum(n_new - 1, 0)[:, None, None], 1), state


# ---- which tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chooser:
    """How the children of nodes are chosen. Noise is Gumbel's, or None for the most probable tokens."""

    sampler: Sampler
    vocab: int
    drawn: bool  # whether what tokens were drawn from is told, so that they can be weighed by it
    keys: Callable[[Array], Array | None]  # depth i32 [n] -> typed [B, n]: what the target draws with there
    noise: Callable[[Array, Array], Array | None]  # (nodes i32 [n], depth i32 [n]) -> f32 [B, n, V]

    def __call__(
        self, logits: Array, contexts: Context | None, nodes: Array, depth: Array, width: int
    ) -> tuple[Array, Array | None]:
        """(children i32 [B, n, width] of nodes at `depth` i32 [n], what each was drawn from f32 [B, n, width, V]).

        logits [B, n, V'] of the draft, contexts [B, n, ...]; -1 where no token is left."""
        logprobs = processed(self.sampler, fitted(logits, self.vocab), contexts, self.keys(depth))
        token = children(logprobs, self.noise(nodes, depth), width)
        return token, left_for(logprobs, token) if self.drawn else None


def from_keys(sampler: Sampler, choice: Choice, vocab: int, place: Place) -> Chooser:
    """The Chooser whose noise comes from each row's key and step, and each node's number."""
    _, keys, step = place
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))

    def own(depth):
        return None if keys is None else fold(keys, step[:, None] + depth)

    def noise(nodes, depth):
        if choice == "top":
            return None
        if choice == "couple":
            return jax.vmap(partial(sampling.noise, vocab=vocab))(own(depth))
        first = jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, n), _DRAFT))(keys, step)
        each = fold(first, jnp.broadcast_to(nodes, (len(step), len(nodes))))
        return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab,))))(each)

    return Chooser(sampler, vocab, choice == "draw", own, noise)


def children(logprobs: Array, noise: Array | None, width: int) -> Array:
    """`width` tokens behind each node i32 [B, n, width], -1 where none is left; logprobs, noise f32 [B, n, V].

    With noise the largest sums are draws without replacement, in their order (arXiv 1903.06059); without, the most
    probable tokens.
    """
    score = logprobs if noise is None else logprobs + noise
    best, token = lax.top_k(score, min(width, score.shape[-1]))
    token = jnp.where(best > -jnp.inf, token.astype(jnp.int32), -1)
    return jnp.pad(token, ((0, 0), (0, 0), (0, width - token.shape[-1])), constant_values=-1)


def left_for(logprobs: Array, token: Array) -> Array:
    """What each of token i32 [B, n, width] was drawn from: the distribution without those before it."""
    left, probs = jnp.exp(logprobs), []
    for k in range(token.shape[-1]):
        mass = left.sum(-1, keepdims=True)
        probs.append(left / jnp.where(mass > 0, mass, 1.0))
        left = jnp.where(jnp.arange(left.shape[-1]) == token[..., k, None], 0.0, left)
    return jnp.stack(probs, 2)


def fitted(logits: Array, vocab: int) -> Array:
    """Logits [..., V'] of the draft for the target's V tokens; those it does not know get -inf."""
    missing = max(vocab - logits.shape[-1], 0)
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
    return jnp.pad(logits[..., :vocab], pad, constant_values=-jnp.inf)


# ---- how trees grow -------------------------------------------------------------------------------------


def grow_chain(
    config: ModelConfig,
    params: dict,
    choose: Chooser,
    state: State,
    x: Array,
    context: Context | None,
    nodes: int,
    length: Array,
) -> tuple[Draft, State]:
    """A chain of `length` i32 [] drafts in room for `nodes` - 1, behind the token with hidden vector x [B, 1, D].

    The last draft is not fed."""
    B = x.shape[0]

    def add(i, x, context, chain, probs):
        contexts = jax.tree.map(lambda a: a[:, None], context)
        token, q = choose(layers.logits(config, params, x), contexts, i[None], i[None], 1)
        token = token[:, 0, 0]
        probs = None if q is None else probs.at[:, i].set(q[:, 0, 0])
        return token, sampling.observe(context, token, token >= 0), chain.at[:, i + 1].set(token), probs

    def longer(i, carry):
        state, token, *so_far = carry
        x, state, _ = layers.hidden(config, params, jnp.maximum(token, 0)[:, None], state)
        return state, *add(i, x, *so_far)

    chain = jnp.full((B, nodes), -1, jnp.int32)
    probs = jnp.zeros((B, nodes - 1, choose.vocab), jnp.float32)
    carry = (state, *add(jnp.int32(0), x, context, chain, probs))
    state, _, _, chain, probs = lax.fori_loop(1, length, longer, carry)
    return Draft(chain_of(chain), probs), state


def grow_tree(
    config: ModelConfig,
    params: dict,
    choose: Chooser,
    state: State,
    x: Array,
    context: Context | None,
    widths: tuple[int, ...],
) -> tuple[Draft, State]:
    """A tree, depth by depth, behind the token with hidden vector x [B, 1, D]; its last depth is not fed.

    All nodes so far are fed again at each depth: a cache knows positions, not which branch a node is on.
    """
    B, held, parent = x.shape[0], state.length, parents_of(widths)
    tree, probs = Tree(jnp.zeros((B, 1), jnp.int32), parent[:1], 0), []
    for depth, width in enumerate(widths):
        N, n = tree.tokens.shape[1], math.prod(widths[:depth])
        if depth:
            x, state = _fed_again(config, params, state, held, tree)
            x = x[:, -n:]
        contexts = jax.tree.map(lambda a, n=n: a[:, -n:], along(context, tree))
        nodes = jnp.arange(N - n, N)
        below, q = choose(layers.logits(config, params, x), contexts, nodes, jnp.full(n, depth), width)
        probs.append(q)
        tokens = jnp.concatenate([tree.tokens, below.reshape(B, -1)], 1)
        tree = Tree(tokens, parent[: tokens.shape[1]], depth + 1)
    drawn = None if probs[0] is None else jnp.concatenate([q.reshape(B, -1, choose.vocab) for q in probs], 1)
    return Draft(tree, drawn), state


def _fed_again(config: ModelConfig, params: dict, state: State, held: Array, tree: Tree) -> tuple[Array, State]:
    """(x [B, N - 1, D], state): all drafts of the tree behind the `held` i32 [B] tokens of the state."""
    state = keep_path(state, held, None, jnp.zeros_like(held))
    depth, sees = relations(tree)
    tokens = jnp.maximum(tree.tokens[:, 1:], 0)
    x, state, _ = layers.hidden(config, params, tokens, state, depth=depth[:, 1:] - 1, tree=sees[:, 1:, 1:])
    return x, state


def parents_of(widths: Sequence[int]) -> np.ndarray:
    """i32 [N]: the parents of a tree, depth by depth, whose nodes at a depth have `widths[depth]` children."""
    parent, level = [-1], [0]
    for width in widths:
        below = range(len(parent), len(parent) + width * len(level))
        parent += [node for node in level for _ in range(width)]
        level = list(below)
    return np.array(parent, np.int32)
