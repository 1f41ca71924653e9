"""Drafts of a model: a smaller one, or the target itself made cheaper.

B rows, N nodes of a tree (node 0 is the newest token), D drafts on its longest path, V the target's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm import layers, sampling
from jaxllm.config import ModelConfig
from jaxllm.decode import Plan, prefill
from jaxllm.errors import ContextError, JaxllmError, TokenizerError
from jaxllm.model import Model
from jaxllm.prompts import new_state
from jaxllm.sampling import Context, Sampler
from jaxllm.spec_decode import DRAFT, Asked
from jaxllm.spec_verify import Draft, Tree, along, chain_of, processed, relations
from jaxllm.state import Recurrent, State, keep_path, select_rows

Array = jax.Array
Choice = Literal["draw", "top"]


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """A model that is cheaper than the target and says much the same: a chain, or a tree of fixed widths.

    widths: children of each node at each depth; all 1 is a chain. choice: "draw" from the draft's processed
    distribution, siblings without replacement (a greedy sampler takes the most probable instead); "top" takes the
    most probable for any sampler.
    """

    model: Model
    widths: tuple[int, ...] = (1,) * 6
    choice: Choice = "draw"

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise JaxllmError(f"widths are whole numbers of at least 1, one for each depth, got {self.widths}")
        if self.choice not in ("draw", "top"):
            raise JaxllmError(f"choice is 'draw' or 'top', got {self.choice!r}")

    @property
    def nodes(self) -> int:
        return 1 + int(np.cumprod(self.widths).sum())

    @property
    def lengths(self) -> tuple[int, ...]:
        deepest = len(self.widths)
        return tuple(range(1, deepest + 1)) if set(self.widths) == {1} else (deepest,)

    def init(self, target: Model, plan: Plan) -> Memory:
        """The prompts, read by the draft model.

        Raises TokenizerError for another vocabulary, ContextError where its context is too short, JaxllmError for
        recurrent layers.
        """
        check_vocabulary(target, self.model)
        state = self._state(plan)
        if any(isinstance(c, Recurrent) for c in state.layers):
            raise JaxllmError(
                f"the draft model {self.model.name} has recurrent layers, which cannot take drafts back"
            )
        unique = list(dict.fromkeys(map(tuple, plan.rows)))  # samples of one prompt share it
        state, _ = prefill(self.model, unique, state)
        if len(unique) < len(plan.rows):
            state = select_rows(state, jnp.asarray([unique.index(tuple(row)) for row in plan.rows]))
        sampler, choice = plan.sampler, self.choice
        if sampler.greedy:
            sampler, choice = Sampler(sampler.steps[:-1]), "top"
        held = np.array([len(row) for row in plan.rows])
        return Memory(state, held, None, np.zeros_like(held), sampler, choice, target.config.vocab)

    def _state(self, plan: Plan) -> State:
        unique = list(dict.fromkeys(map(tuple, plan.rows)))
        wanted = max(map(len, unique)) + plan.new_tokens
        config = self.model.config
        if plan.room["overflow"] == "error" and wanted > config.max_len:
            raise ContextError(
                f"the draft model {self.model.name} has a context of {config.max_len} tokens, and {wanted} are "
                "wanted; shorten them, or choose another drafter"
            )
        chunk = min(max(CHUNK, self.nodes), config.max_len)
        return new_state(self.model, unique, plan.new_tokens, chunk, spare=self.nodes, **plan.room)

    def propose(self, memory: Memory, asked: Asked) -> tuple[Draft | None, Memory]:
        """Catch up with the target, then draft."""
        state, tokens, n_new = self._catch_up(memory, asked.rows)
        held = np.array([len(row) for row in asked.rows])
        config, params, carry = self.model.config, self.model.params, asked.carry
        place = (carry.context, carry.keys, carry.step)
        options = (config, params, memory.sampler, memory.choice, memory.vocab)
        if len(self.lengths) > 1:
            length = np.int32(asked.length)
            draft, state = draft_chain(*options, self.nodes, state, tokens, n_new, place, length)
            fed = asked.length - 1
        else:
            draft, state = draft_tree(*options, self.widths, state, tokens, n_new, place)
            fed = len(self.widths) - 1
        return draft, dataclasses.replace(memory, state=state, held=held, path=None, kept=0 * held, fed=fed)

    def _catch_up(self, memory: Memory, rows: Sequence[Sequence[int]]) -> tuple[State, np.ndarray, np.ndarray]:
        """(the state without rejected drafts, the last tokens it lacks i32 [B, 2], how many they are i32 [B])."""
        state = settled(memory.state, memory.held, memory.path, memory.kept)
        known = memory.held + memory.kept
        lacking = [list(row[n:]) for row, n in zip(rows, known, strict=True)]
        if max(map(len, lacking)) > 2:  # after plain steps
            state, _ = prefill(self.model, [row[:-1] for row in lacking], state)
            lacking = [row[-1:] for row in lacking]
        tokens = np.zeros((len(rows), 2), np.int32)
        for line, row in zip(tokens, lacking, strict=True):
            line[: len(row)] = row
        return state, tokens, np.array([len(row) for row in lacking], np.int32)

    def accept(self, memory: Memory, path: Array, kept: np.ndarray) -> Memory:
        """Remember which drafts were kept; those on the last depth were never fed."""
        kept = np.clip(kept, 0, memory.fed)
        chain = len(self.lengths) > 1
        return dataclasses.replace(memory, path=None if chain else path[:, 1:] - 1, kept=kept)


CHUNK = 64  # tokens that the draft model reads at once


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a draft model remembers."""

    state: State  # drafts may still be in it
    held: np.ndarray  # i32 [B]  tokens of each row in the state, without drafts
    path: Array | None  # i32 [B, D]  where, after `held`, the drafts that were kept lie; None: one after the other
    kept: np.ndarray  # i32 [B]  how many of them were kept
    sampler: Sampler  # its distribution is what drafts are chosen by
    choice: Choice
    vocab: int  # of the target
    fed: int = 0  # drafts of a path that are in the state


@partial(jax.jit, donate_argnums=0)
def settled(state: State, held: Array, path: Array | None, kept: Array) -> State:
    """The state with the kept drafts alone."""
    return keep_path(state, held, path, kept)


Place = tuple[Context | None, Array | None, Array]  # of the target: context, keys [B], tokens emitted i32 [B]


@partial(jax.jit, static_argnums=(0, 3, 4, 5), donate_argnums=6)
def draft_chain(
    config: ModelConfig,
    params: dict,
    sampler: Sampler,
    choice: Choice,
    vocab: int,
    nodes: int,
    state: State,
    tokens: Array,
    n_new: Array,
    place: Place,
    length: Array,
) -> tuple[Draft, State]:
    """Feed tokens i32 [B, 2] (n_new i32 [B] of them real), then draft `length` i32 [] tokens one by one."""
    context, keys, step = place
    x, state, _ = layers.hidden(config, params, tokens, state, n_new=n_new)
    newest = jnp.take_along_axis(x, jnp.maximum(n_new - 1, 0)[:, None, None], 1)[:, 0]

    def draw(i, x, context, chain, probs):
        logits = fitted(layers.logits(config, params, x[:, None]), vocab)
        contexts = jax.tree.map(lambda a: a[:, None], context)
        own, noise = draft_keys(keys, step, i[None], i[None])
        logprobs = processed(sampler, logits, contexts, own)
        below, q = children(logprobs, gumbel(noise, vocab, choice), 1)
        token = below[:, 0, 0]
        probs = probs.at[:, i].set(q[:, 0, 0]) if choice == "draw" else probs
        return token, sampling.observe(context, token, token >= 0), chain.at[:, i + 1].set(token), probs

    def longer(i, carry):
        state, token, *drawn = carry
        x, state, _ = layers.hidden(config, params, jnp.maximum(token, 0)[:, None], state)
        return state, *draw(i, x[:, 0], *drawn)

    chain = jnp.full((len(n_new), nodes), -1, jnp.int32)
    probs = jnp.zeros((len(n_new), nodes - 1, vocab if choice == "draw" else 0), jnp.float32)
    carry = (state, *draw(jnp.int32(0), newest, context, chain, probs))
    state, _, _, chain, probs = lax.fori_loop(1, length, longer, carry)
    return Draft(chain_of(chain), probs if choice == "draw" else None), state


@partial(jax.jit, static_argnums=(0, 3, 4, 5), donate_argnums=6)
def draft_tree(
    config: ModelConfig,
    params: dict,
    sampler: Sampler,
    choice: Choice,
    vocab: int,
    widths: tuple[int, ...],
    state: State,
    tokens: Array,
    n_new: Array,
    place: Place,
) -> tuple[Draft, State]:
    """Feed tokens i32 [B, 2] (n_new i32 [B] of them real), then draft a tree, depth by depth.

    All nodes so far are fed again at each depth: a cache knows positions, not which branch a node is on.
    """
    context, keys, step = place
    x, state, _ = layers.hidden(config, params, tokens, state, n_new=n_new)
    x = jnp.take_along_axis(x, jnp.maximum(n_new - 1, 0)[:, None, None], 1)
    held, parent = state.length, parents_of(widths)
    tree, probs, first = Tree(jnp.zeros((len(n_new), 1), jnp.int32), parent[:1], 0), [], 0
    for depth, width in enumerate(widths):
        if depth:
            state = keep_path(state, held, None, jnp.zeros_like(held))
            at, sees = relations(tree)
            fed = jnp.maximum(tree.tokens[:, 1:], 0)
            x, state, _ = layers.hidden(config, params, fed, state, depth=at[:, 1:] - 1, tree=sees[:, 1:, 1:])
            x = x[:, first - 1 :]
        nodes = jnp.arange(first, tree.tokens.shape[1])
        logits = fitted(layers.logits(config, params, x), vocab)
        contexts = jax.tree.map(lambda a, first=first: a[:, first:], along(context, tree))
        own, noise = draft_keys(keys, step, nodes, jnp.full_like(nodes, depth))
        logprobs = processed(sampler, logits, contexts, own)
        below, q = children(logprobs, gumbel(noise, vocab, choice), width)
        probs.append(q.reshape(len(n_new), -1, vocab))
        first = tree.tokens.shape[1]
        tokens = jnp.concatenate([tree.tokens, below.reshape(len(n_new), -1)], 1)
        tree = Tree(tokens, parent[: tokens.shape[1]], depth + 1)
    return Draft(tree, jnp.concatenate(probs, 1) if choice == "draw" else None), state


def parents_of(widths: Sequence[int]) -> np.ndarray:
    """i32 [N]: the parents of a tree, depth by depth, whose nodes at a depth have `widths[depth]` children."""
    parent, level = [-1], [0]
    for width in widths:
        below = range(len(parent), len(parent) + width * len(level))
        parent += [node for node in level for _ in range(width)]
        level = list(below)
    return np.array(parent, np.int32)


def children(logprobs: Array, noise: Array | None, width: int) -> tuple[Array, Array]:
    """(`width` tokens behind each node i32 [B, n, width], what each was drawn from f32 [B, n, width, V]).

    logprobs f32 [B, n, V]. noise: Gumbel's, of the same shape: the largest sums are draws without replacement, in
    their order (arXiv 1903.06059), and the k-th was drawn from what the k - 1 before left. Without noise the most
    probable tokens are taken. -1 where no token is left.
    """
    score = logprobs if noise is None else logprobs + noise
    best, token = lax.top_k(score, min(width, logprobs.shape[-1]))
    token = jnp.where(best > -jnp.inf, token.astype(jnp.int32), -1)
    token = jnp.pad(token, ((0, 0), (0, 0), (0, width - token.shape[-1])), constant_values=-1)
    left, probs = jnp.exp(logprobs), []
    for k in range(width):
        mass = left.sum(-1, keepdims=True)
        probs.append(left / jnp.where(mass > 0, mass, 1.0))
        left = jnp.where(jnp.arange(left.shape[-1]) == token[..., k, None], 0.0, left)
    return token, jnp.stack(probs, 2)


def draft_keys(keys: Array | None, step: Array, nodes: Array, depth: Array) -> tuple[Array | None, Array | None]:
    """Typed [B, n] each: the keys of the tokens behind `nodes` i32 [n] at `depth` i32 [n], and of their drafts."""
    if keys is None:
        return None, None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, 0))
    own = fold(keys, step[:, None] + depth)
    first = jax.vmap(jax.random.fold_in, (0, None))(jax.vmap(jax.random.fold_in)(keys, step), DRAFT)
    return own, fold(first, jnp.broadcast_to(nodes, (len(step), len(nodes))))


def gumbel(keys: Array | None, vocab: int, choice: Choice) -> Array | None:
    """Noise f32 [B, n, V] for draws; None where the most probable tokens are taken."""
    if choice == "top":
        return None
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab,))))(keys)


def fitted(logits: Array, vocab: int) -> Array:
    """Logits [..., V'] of the draft for the target's V tokens; those it does not know get -inf."""
    missing = max(vocab - logits.shape[-1], 0)
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
    return jnp.pad(logits[..., :vocab], pad, constant_values=-jnp.inf)


# ---- the target itself, made cheaper --------------------------------------------------------------------


def early_exit(model: Model, depth: int) -> Model:
    """The first `depth` layers of a model, under its own norm and head (as in LayerSkip, arXiv 2404.16710).

    Raises JaxllmError unless 1 <= depth < layers.
    """
    most = len(model.config.blocks) - 1
    if not 1 <= depth <= most:
        raise JaxllmError(f"an early exit comes after layer 1 to {most} of this model, got {depth}")
    config = dataclasses.replace(model.config, blocks=model.config.blocks[:depth])
    params = {**model.params, "layers": model.params["layers"][:depth]}
    return dataclasses.replace(model, config=config, params=params, name=f"{model.name}, {depth} layers")


def check_vocabulary(target: Model, draft: Model) -> None:
    """Raise TokenizerError unless every token of the target is the same token of the draft."""
    sizes = target.config.vocab, draft.config.vocab
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        if sizes[0] != sizes[1]:
            raise TokenizerError(
                f"the draft model has a vocabulary of {sizes[1]} tokens and the target {sizes[0]}; choose a draft "
                "model with the target's tokenizer"
            )
        return
    differ = sorted(ours.vocabulary().items() ^ theirs.vocabulary().items(), key=lambda item: item[1])
    if differ:
        raise TokenizerError(
            f"the tokens of the draft model {draft.name} are others than the target's ({len(differ)} differ, "
            f"such as {differ[0][0]!r}, {differ[0][1]}); choose a draft model with the target's tokenizer"
        )
