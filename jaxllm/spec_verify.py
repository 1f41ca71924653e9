"""Which drafts the target keeps: the mathematics of speculative decoding, as pure functions.

Every rule but `typical` leaves the target's processed distribution exactly as it was. What is random comes in as
uniforms or as tokens drawn, so that all outcomes can be summed.
B rows, N nodes of a tree, D drafts on its longest path, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm import sampling
from jaxllm.sampling import Context, Sampler

Array = jax.Array
Rule = Literal["exact", "typical"]


# ---- trees ----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """Drafts that continue the newest token, which is node 0. A chain is the tree in which each has one child."""

    tokens: Array  # i32 [B, N]; -1 where nothing was proposed
    parent: Array  # i32 [N] or [B, N]; before its children, which come in the order they were drawn; -1 for node 0
    deepest: int = field(metadata=dict(static=True))  # D

    @property
    def chain(self) -> bool:
        """Whether it can only be a chain: as deep as it has drafts."""
        return self.deepest == self.tokens.shape[1] - 1

    @property
    def parents(self) -> Array:
        """i32 [B, N]"""
        return jnp.broadcast_to(self.parent, self.tokens.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """What a drafter proposes."""

    tree: Tree
    # f32 [B, N - 1, V]: what node i + 1 was drawn from, once the siblings before it were known. None where
    # nothing was drawn: drafts that the drafter's state determines, such as n-grams and the most probable ones.
    probs: Array | None
    allowed: Array | None = None  # bool [B, N, V]: what a mask lets follow each node; None: anything


def chain_of(tokens: Array) -> Tree:
    """The chain of tokens i32 [B, N], the newest token first."""
    N = tokens.shape[1]
    return Tree(tokens, jnp.arange(N, dtype=jnp.int32) - 1, N - 1)


def relations(tree: Tree) -> tuple[Array, Array]:
    """(depth i32 [B, N] of each node, bool [B, N, N]: [n, m] where m is n or an ancestor of n)."""
    B, N = tree.tokens.shape
    up = jax.nn.one_hot(tree.parents, N, dtype=jnp.int32)
    itself = jnp.broadcast_to(jnp.eye(N, dtype=jnp.int32), (B, N, N))
    sees = itself
    for _ in range(tree.deepest):
        sees = itself + jnp.einsum("bnm,bmk->bnk", up, sees)
    return sees.sum(-1) - 1, sees > 0


def path_to(tree: Tree, at: Array) -> Array:
    """The nodes from 0 to `at` i32 [B]: i32 [B, D + 1], -1 behind the last."""
    depth, sees = relations(tree)
    B, N = tree.tokens.shape
    on_path = sees[jnp.arange(B), at][:, None] & (depth[:, None] == jnp.arange(tree.deepest + 1)[:, None])
    return jnp.where(on_path, jnp.arange(N), -1).max(-1)


def along(context: Context | None, tree: Tree) -> Context | None:
    """The context behind each node, leaves [B, N, ...]: node 0's own, and the drafts down to the node observed."""
    if context is None:
        return None
    B, N = tree.tokens.shape
    depth, sees = relations(tree)
    flat = jax.tree.map(lambda a: jnp.repeat(a, N, 0), context)
    for d in range(1, tree.deepest + 1):
        on_path = sees & (depth == d)[:, None]
        token = jnp.where(on_path, tree.tokens[:, None], -1).max(-1).reshape(-1)
        flat = sampling.observe(flat, token, token >= 0)
    return jax.tree.map(lambda a: a.reshape(B, N, *a.shape[1:]), flat)


def processed(sampler: Sampler, logits: Array, contexts: Context | None, keys: Array | None) -> Array:
    """`sampler.distribution` of every node: log-probabilities f32 [B, N, V] of logits [B, N, V].

    contexts: leaves [B, N, ...]; keys: typed [B, N]. A sampler's values for each row serve all nodes of the row.
    """
    return jax.vmap(sampler.distribution, in_axes=1, out_axes=1)(logits, contexts, keys)


# ---- rules ----------------------------------------------------------------------------------------------


def follow(tree: Tree, drawn: Array) -> Array:
    """Down the tree as far as the target's own draws i32 [B, N] go: the last node kept, i32 [B].

    For drafts that nothing random chose. A draft is kept with the target's probability of it, and what follows
    the last one is the draw at its node, so tokens are those of plain decoding with the same keys: there is no
    residual to draw from, and no two siblings can be weighed wrongly.
    """

    def visit(at, i):
        expected = jnp.take_along_axis(drawn, at[:, None], 1)[:, 0]
        kept = (tree.parents[:, i] == at) & (tree.tokens[:, i] == expected) & (expected >= 0)
        return jnp.where(kept, i, at), None

    return lax.scan(visit, _root(tree), jnp.arange(1, tree.tokens.shape[1]))[0]


def reject(tree: Tree, p: Array, q: Array, uniform: Array) -> tuple[Array, Array, Array]:
    """Rejection sampling down the tree -> (the last node kept i32 [B], rest f32 [B, V], chance f32 [B, N - 1]).

    p f32 [B, N, V]: the target's distribution behind each node; q f32 [B, N - 1, V]: see `Draft`; uniform f32
    [B, N - 1] in [0, 1). The token that follows is to be drawn from `rest`. chance: with what probability each
    node was kept when it was looked at, -1 where it was not.

    A draft x is kept with probability min(1, p(x) / q(x)); otherwise the rest, max(p - q, 0), takes the place of p
    and the next sibling is looked at (arXiv 2211.17192 and 2302.01318; for siblings 2305.09781). As q is what each
    sibling was drawn from given those before, siblings drawn without replacement are unbiased (arXiv 2402.14160).
    """

    def visit(carry, i):
        at, rest = carry
        token, own = tree.tokens[:, i], q[:, i - 1]
        due = (tree.parents[:, i] == at) & (token >= 0)
        chance = acceptance(rest, own, token)
        kept = due & (uniform[:, i - 1] < chance)
        rest = jnp.where(due[:, None], residual(rest, own), rest)
        rest = jnp.where(kept[:, None], p[:, i], rest)
        return (jnp.where(kept, i, at), rest), jnp.where(due, chance, -1.0)

    (at, rest), chance = lax.scan(visit, (_root(tree), p[:, 0]), jnp.arange(1, tree.tokens.shape[1]))
    return at, rest, chance.T


def _root(tree: Tree) -> Array:
    return jnp.zeros(tree.tokens.shape[0], jnp.int32)


def acceptance(p: Array, q: Array, token: Array) -> Array:
    """min(1, p(x) / q(x)) of tokens i32 [B] under p and q f32 [B, V]: f32 [B]."""
    px, qx = (jnp.take_along_axis(a, jnp.maximum(token, 0)[:, None], 1)[:, 0] for a in (p, q))
    return jnp.where(qx > 0, jnp.minimum(px / jnp.where(qx > 0, qx, 1.0), 1.0), (px > 0).astype(p.dtype))


def residual(p: Array, q: Array) -> Array:
    """max(p - q, 0) as a distribution, f32 [B, V]; p itself where nothing is left (p = q: all is accepted)."""
    left = jnp.maximum(p - q, 0.0)
    mass = left.sum(-1, keepdims=True)
    return jnp.where(mass > 0, left / jnp.where(mass > 0, mass, 1.0), p)


def typical(tree: Tree, p: Array, *, epsilon: float = 0.09, delta: float = 0.3) -> Array:
    """Typical acceptance (Medusa, arXiv 2401.10774): the deepest node whose path is likely enough, i32 [B].

    A draft is kept where p exceeds min(epsilon, delta * exp(-entropy)). Lossy: p is no longer the output's
    distribution. p f32 [B, N, V]; of equally deep nodes the first.
    """
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1)
    floor = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
    above = jnp.maximum(tree.parents, 0)
    behind = jnp.take_along_axis(p, above[..., None], 1)  # [B, N, V]: what each draft was a guess at
    chance = jnp.take_along_axis(behind, jnp.maximum(tree.tokens, 0)[..., None], 2)[..., 0]
    likely = (chance > jnp.take_along_axis(floor, above, 1)) & (tree.tokens >= 0)
    depth, sees = relations(tree)
    kept = jnp.all(~sees | likely.at[:, 0].set(True)[:, None], -1)
    return jnp.argmax(jnp.where(kept, depth, -1), -1).astype(jnp.int32)


def offered(tree: Tree, at: Array) -> Array:
    """bool [B]: whether the node where a row stopped had any draft behind it."""
    return jnp.any((tree.parents == at[:, None]) & (tree.tokens >= 0), -1)
