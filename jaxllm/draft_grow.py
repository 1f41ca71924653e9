"""Drafts as pure functions: what a model or a head says next, chosen node by node into a chain or a tree.

B rows, n nodes at once, N nodes of a tree (node 0 is the newest token), D width of what says them, V the target's
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.errors import JaxllmError
from jaxllm.sampling import Context, Sampler
from jaxllm.spec_verify import Draft, Tree, along, chain_of, processed, relations
from jaxllm.state import State, keep_path

Array = jax.Array
Choice = Literal["draw", "couple", "top"]
Place = tuple[Context | None, Array | None, Array]  # of the target: context, keys [B], tokens emitted i32 [B]
_DRAFT = (1 << 30) + 1  # what a step's key is folded with for drafts


# ---- who says it, and what shape it gets -----------------------------------------------------------------


class Speaker(Protocol):
    """What says which token may come next. It is part of a program, so it can be hashed."""

    def take(self, params: dict, features: Array | None) -> Array | None:
        """The target's features [B, T, W] as `read` takes them: [B, T, D]; None where it needs none."""

    def read(
        self, params: dict, tokens: Array, before: Array | None, state: State, **how: Array | None
    ) -> tuple[Array, State]:
        """Append tokens i32 [B, T], before [B, T, D] behind which they come -> (x [B, T, D], state).

        how: n_new, depth and tree, as of `layers.hidden`."""

    def said(self, params: dict, x: Array) -> Array:
        """Logits f32 [B, T, V'] of what follows."""


@dataclass(frozen=True)
class Alone:
    """A model: it reads tokens and nothing besides."""

    config: ModelConfig

    def take(self, params: dict, features: Array | None) -> None:
        """Nothing."""

    def read(
        self, params: dict, tokens: Array, before: Array | None, state: State, **how: Array | None
    ) -> tuple[Array, State]:
        """`layers.hidden`"""
        x, state, _ = layers.hidden(self.config, params, tokens, state, **how)
        return x, state

    def said(self, params: dict, x: Array) -> Array:
        """`layers.logits`"""
        return layers.logits(self.config, params, x)


@dataclass(frozen=True)
class Grown:
    """A tree grown by confidence (EAGLE-2, arXiv 2406.16858), of the most probable tokens.

    At each depth the `breadth` paths that are most probable so far get as many children each; of all nodes the
    `drafts` most probable ones are proposed. A node is never more probable than its parent, so that is a tree.
    """

    depth: int = 5
    breadth: int = 4
    drafts: int = 15

    def __post_init__(self) -> None:
        most = self.breadth + (self.depth - 1) * self.breadth**2
        if min(self.depth, self.breadth) < 1 or not self.depth <= self.drafts <= most:
            raise JaxllmError(
                "a tree of this depth and breadth, each at least 1, has from its depth to "
                f"breadth + (depth - 1) * breadth^2 drafts; got {self}"
            )


Shape = tuple[int, ...] | Grown  # children of each node at each depth; all 1 is a chain


def check_shape(shape: Shape, choice: Choice) -> None:
    """Raise JaxllmError for widths that are none, an unknown choice, and one that the shape cannot have."""
    if choice not in ("draw", "couple", "top"):
        raise JaxllmError(f"choice is 'draw', 'couple' or 'top', got {choice!r}")
    if isinstance(shape, Grown):
        if choice != "top":
            raise JaxllmError(
                f"a tree grown by confidence has the most probable drafts: choice='top', got {choice!r}"
            )
    elif not shape or min(shape) < 1:
        raise JaxllmError(f"widths are whole numbers of at least 1, one for each depth, got {shape}")


def deepest(shape: Shape) -> int:
    """Drafts on the longest path."""
    return shape.depth if isinstance(shape, Grown) else len(shape)


def is_chain(shape: Shape) -> bool:
    """Whether each node has one child, and any number of drafts can be asked for."""
    return not isinstance(shape, Grown) and set(shape) == {1}


def lengths(shape: Shape) -> tuple[int, ...]:
    """How many drafts on a path can be asked for, ascending."""
    most = deepest(shape)
    return tuple(range(1, most + 1)) if is_chain(shape) else (most,)


def most_nodes(shape: Shape) -> int:
    """Nodes of the tree that is proposed, node 0 included."""
    return 1 + (shape.drafts if isinstance(shape, Grown) else int(np.cumprod(shape).sum()))


def most_fed(shape: Shape) -> int:
    """Drafts that are in the state of the drafter at once."""
    if isinstance(shape, Grown):
        return shape.breadth * (shape.depth - 1)
    return int(np.cumprod(shape)[:-1].sum())


# ---- the program ---------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("speaker", "choice", "vocab", "shape"), donate_argnames="state")
def draft(
    speaker: Speaker,
    params: dict,
    sampler: Sampler,
    state: State,
    tokens: Array,
    features: Array | None,
    n_new: Array,
    place: Place,
    length: Array,
    *,
    choice: Choice,
    vocab: int,
    shape: Shape,
) -> tuple[Draft, State]:
    """Feed tokens i32 [B, T], n_new i32 [B] of them real, and the target's features [B, T, W] of those before
    them; then draft a tree of this shape: `length` i32 [] tokens of a chain, any other tree whole."""
    x, state = newest(speaker, params, state, tokens, features, n_new)
    choose = from_keys(sampler, choice, vocab, place)
    if is_chain(shape):
        return grow_chain(speaker, params, choose, state, x, place[0], 1 + len(shape), length)
    grow = grow_by_confidence if isinstance(shape, Grown) else grow_tree
    return grow(speaker, params, choose, state, x, place[0], shape)


def newest(
    speaker: Speaker, params: dict, state: State, tokens: Array, features: Array | None, n_new: Array
) -> tuple[Array, State]:
    """Feed tokens i32 [B, T], n_new i32 [B] of them real -> (x [B, 1, D] of the last real one, state)."""
    x, state = speaker.read(params, tokens, speaker.take(params, features), state, n_new=n_new)
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
        logprobs = self.logprobs(logits, contexts, depth)
        token = children(logprobs, self.noise(nodes, depth), width)
        if not self.drawn:
            return token, None
        q = left_for(logprobs, token)
        chance = jnp.take_along_axis(q, jnp.maximum(token, 0)[..., None], -1)[..., 0]
        # What is too improbable for an f32 was not drawn: weighed by nothing it would be kept too often.
        return jnp.where(chance > 0, token, -1), q

    def logprobs(self, logits: Array, contexts: Context | None, depth: Array) -> Array:
        """The processed distribution behind nodes at `depth` i32 [n]: f32 [B, n, V]."""
        return processed(self.sampler, fitted(logits, self.vocab), contexts, self.keys(depth))


def chosen_by(sampler: Sampler, choice: Choice) -> tuple[Sampler, Choice]:
    """What drafts for a sampler are chosen by: where it is greedy, the most probable of its distribution."""
    return (Sampler(sampler.steps[:-1]), "top") if sampler.greedy else (sampler, choice)


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
    return likeliest(logprobs if noise is None else logprobs + noise, width)[1]


def likeliest(score: Array, width: int) -> tuple[Array, Array]:
    """(the `width` largest of score f32 [B, n, V], their tokens i32 [B, n, width], -1 where none is left)."""
    best, token = lax.top_k(score, min(width, score.shape[-1]))
    token = jnp.where(best > -jnp.inf, token.astype(jnp.int32), -1)
    missing = ((0, 0), (0, 0), (0, width - token.shape[-1]))
    return jnp.pad(best, missing, constant_values=-jnp.inf), jnp.pad(token, missing, constant_values=-1)


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
    speaker: Speaker,
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
        token, q = choose(speaker.said(params, x), contexts, i[None], i[None], 1)
        token = token[:, 0, 0]
        probs = None if q is None else probs.at[:, i].set(q[:, 0, 0])
        return x, token, sampling.observe(context, token, token >= 0), chain.at[:, i + 1].set(token), probs

    def longer(i, carry):
        state, x, token, *so_far = carry
        x, state = speaker.read(params, jnp.maximum(token, 0)[:, None], x, state)
        return state, *add(i, x, *so_far)

    chain = jnp.full((B, nodes), -1, jnp.int32)
    probs = jnp.zeros((B, nodes - 1, choose.vocab), jnp.float32)
    carry = (state, *add(jnp.int32(0), x, context, chain, probs))
    state, _, _, _, chain, probs = lax.fori_loop(1, length, longer, carry)
    return Draft(chain_of(chain), probs), state


def grow_tree(
    speaker: Speaker,
    params: dict,
    choose: Chooser,
    state: State,
    x: Array,
    context: Context | None,
    widths: tuple[int, ...],
) -> tuple[Draft, State]:
    """A tree, depth by depth, behind the token with hidden vector x [B, 1, D]; its last depth is not fed."""
    B, held, parent = x.shape[0], state.length, parents_of(widths)
    tree, probs = Tree(jnp.zeros((B, 1), jnp.int32), parent[:1], 0), []
    for depth, width in enumerate(widths):
        N, n = tree.tokens.shape[1], math.prod(widths[:depth])
        if depth:
            x, state = _fed_again(speaker, params, state, held, tree, x)
        contexts = jax.tree.map(lambda a, n=n: a[:, -n:], along(context, tree))
        nodes = jnp.arange(N - n, N)
        below, q = choose(speaker.said(params, x[:, -n:]), contexts, nodes, jnp.full(n, depth), width)
        probs.append(q)
        tokens = jnp.concatenate([tree.tokens, below.reshape(B, -1)], 1)
        tree = Tree(tokens, parent[: tokens.shape[1]], depth + 1)
    drawn = None if probs[0] is None else jnp.concatenate([q.reshape(B, -1, choose.vocab) for q in probs], 1)
    return Draft(tree, drawn), state


def _fed_again(
    speaker: Speaker, params: dict, state: State, held: Array, tree: Tree, x: Array
) -> tuple[Array, State]:
    """(x [B, N, D], state): all drafts of the tree behind the `held` i32 [B] tokens of the state.

    x [B, n, D]: of node 0 and all nodes that have children. All are fed again at each depth, for a cache knows
    positions, not which branch a node is on.
    """
    state = keep_path(state, held, None, jnp.zeros_like(held))
    depth, sees = relations(tree)
    before = jnp.take_along_axis(x, tree.parents[:, 1:, None], 1)
    tokens, how = jnp.maximum(tree.tokens[:, 1:], 0), dict(depth=depth[:, 1:] - 1, tree=sees[:, 1:, 1:])
    again, state = speaker.read(params, tokens, before, state, **how)
    return jnp.concatenate([x[:, :1], again], 1), state


def grow_by_confidence(
    speaker: Speaker,
    params: dict,
    choose: Chooser,
    state: State,
    x: Array,
    context: Context | None,
    shape: Grown,
) -> tuple[Draft, State]:
    """A tree as `Grown` says, behind the token with hidden vector x [B, 1, D]; nodes with children are fed."""
    B, held, k = x.shape[0], state.length, shape.breadth
    root = jnp.zeros((B, 1), jnp.int32)
    fed, every = Tree(root, root - 1, 0), Candidates(root[:, :0], root[:, :0], jnp.zeros((B, 0)))
    number, score = root, jnp.zeros((B, 1))  # of the newest nodes that are fed: their numbers among all
    for depth in range(shape.depth):
        if depth:
            x, state = _fed_again(speaker, params, state, held, fed, x)
        n, first = number.shape[1], fed.tokens.shape[1] - number.shape[1]
        contexts = jax.tree.map(lambda a, n=n: a[:, -n:], along(context, fed))
        logprobs = choose.logprobs(speaker.said(params, x[:, -n:]), contexts, jnp.full(n, depth))
        best, token = likeliest(jnp.minimum(logprobs, 0.0), k)
        found = Candidates(
            token.reshape(B, -1), jnp.repeat(number, k, 1), (score[..., None] + best).reshape(B, -1)
        )
        score, at = lax.top_k(found.score, k)
        number = 1 + every.token.shape[1] + at
        tokens = jnp.concatenate([fed.tokens, jnp.take_along_axis(found.token, at, 1)], 1)
        fed = Tree(tokens, jnp.concatenate([fed.parent, first + at // k], 1), depth + 1)
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), every, found)
    return Draft(every.most_probable(shape.drafts, shape.depth), None), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Nodes that a tree may get, each behind its parent. They are numbered from 1; 0 is the root."""

    token: Array  # i32 [B, M]; -1 where none is left
    parent: Array  # i32 [B, M]
    score: Array  # f32 [B, M]  log-probability of the path to it, at most its parent's

    def most_probable(self, count: int, deepest: int) -> Tree:
        """The tree of the `count` best. Of equals the first is taken, so a node never without its parent."""
        _, kept = lax.top_k(self.score, count)
        kept = jnp.sort(kept, -1)
        token, parent, score = (jnp.take_along_axis(a, kept, 1) for a in (self.token, self.parent, self.score))
        above = jnp.sum(kept[:, None] + 1 < parent[..., None], -1) + 1  # kept nodes before it, and the root
        parent = jnp.where(parent > 0, above, 0)
        pad = lambda a, value: jnp.pad(a, ((0, 0), (1, 0)), constant_values=value)
        token = jnp.where(score > -jnp.inf, token, -1)
        return Tree(pad(token, 0), pad(parent, -1), deepest)


def parents_of(widths: Sequence[int]) -> np.ndarray:
    """i32 [N]: the parents of a tree, depth by depth, whose nodes at a depth have `widths[depth]` children."""
    parent, level = [-1], [0]
    for width in widths:
        below = range(len(parent), len(parent) + width * len(level))
        parent += [node for node in level for _ in range(width)]
        level = list(below)
    return np.array(parent, np.int32)
