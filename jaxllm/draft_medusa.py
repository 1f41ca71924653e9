"""Drafts of Medusa heads (arXiv 2401.10774): what the target's newest hidden vector says of the tokens to come.

B rows, N nodes of a tree (node 0 is the newest token), K heads, D width, V vocabulary. Head k, from 0, guesses the
token at depth k + 1 behind node 0, whatever the drafts before it are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import layers, ops
from jaxllm.basics import F32, linear
from jaxllm.checkpoint.medusa import read_heads
from jaxllm.config import MLA, Attention, ModelConfig
from jaxllm.decode import Plan
from jaxllm.draft_grow import Choice, Chooser, Place, chosen_by, from_keys
from jaxllm.errors import CheckpointError, JaxllmError
from jaxllm.model import Model, find
from jaxllm.reading import Read
from jaxllm.sampling import Sampler
from jaxllm.spec_decode import Asked, Verified
from jaxllm.spec_verify import Draft, Tree, along

Array = jax.Array
Choices = tuple[tuple[int, ...], ...]


def paths(text: str) -> Choices:
    """Choices from their short form: "0 00 1" are the paths (0,), (0, 0) and (1,)."""
    return tuple(tuple(map(int, path)) for path in text.split())


# Medusa's own tree for its 7B models, "mc_sim_7b_63": 63 nodes, each a path of ranks from the root.
MC_SIM_7B_63 = paths(
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 "
    "0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)


# ---- the heads ------------------------------------------------------------------------------------------


def head_logits(config: ModelConfig, params: dict, heads: dict, x: Array) -> Array:
    """What each head says: f32 [..., K, V] of the target's hidden vectors x [..., D] after its final norm.

    heads: as of `checkpoint.medusa.read_heads`. params: the target's; its projection serves heads without one."""
    states = [_resblocks(head["blocks"], x) for head in heads["heads"]]
    if "out" in heads["heads"][0]:
        found = [ops.matmul(y, h["out"]["w"], out=F32) for y, h in zip(states, heads["heads"], strict=True)]
        logits = jnp.stack(found, -2)
    else:
        logits = layers.logits(config, params, jnp.stack(states, -2))
    if "tokens" not in heads:
        return logits
    every = jnp.full((*logits.shape[:-1], config.vocab), -jnp.inf, F32)
    return every.at[..., heads["tokens"]].set(logits)


def _resblocks(blocks: Sequence[dict], x: Array) -> Array:
    for block in blocks:
        x = x + jax.nn.silu(linear(block, x, out=F32)).astype(x.dtype)
    return x


# ---- trees ----------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A static tree, depth by depth: numpy i32 [N] each, of which node 0 is the newest token."""

    parent: np.ndarray
    depth: np.ndarray
    rank: np.ndarray  # which of its head's tokens a node is, the most probable 0
    turn: np.ndarray  # which of its siblings it is


@cache
def arranged(choices: Choices) -> Shape:
    """The tree of these paths."""
    nodes = sorted(choices, key=lambda path: (len(path), path))
    place = {(): 0, **{path: i for i, path in enumerate(nodes, 1)}}
    parent = [-1, *(place[path[:-1]] for path in nodes)]
    turn = [0, *(parent[:i].count(parent[i]) for i in range(1, len(parent)))]
    rank, depth = [0, *(path[-1] for path in nodes)], [0, *map(len, nodes)]
    return Shape(*(np.array(a, np.int32) for a in (parent, depth, rank, turn)))


@partial(jax.jit, static_argnames=("config", "choices", "choice"))
def draft(
    config: ModelConfig,
    params: dict,
    heads: dict,
    sampler: Sampler,
    x: Array,
    place: Place,
    length: Array,
    *,
    choices: Choices,
    choice: Choice,
) -> Draft:
    """The tree of `choices` behind the newest tokens, as far as depth `length` i32 [].

    x [B, D]: the hidden vectors of the tokens before the newest ones. params: the target's ends."""
    logits = head_logits(config, params, heads, x)
    choose = from_keys(sampler, choice, config.vocab, place)
    grow = drawn if choice == "draw" else ranked
    made = grow(choose, logits, place[0], arranged(choices))
    wanted = jnp.asarray(arranged(choices).depth) <= length
    return Draft(dataclasses.replace(made.tree, tokens=jnp.where(wanted, made.tree.tokens, -1)), made.probs)


def ranked(choose: Chooser, logits: Array, context: Any, shape: Shape) -> Draft:
    """Each node is that token of its head's ranking, one ranking for all nodes of a depth. logits [B, K, V]."""
    B, K, _ = logits.shape
    contexts = jax.tree.map(lambda a: jnp.repeat(a[:, None], K, 1), context)
    below, _ = choose(logits, contexts, jnp.arange(K), jnp.arange(K), int(shape.rank.max()) + 1)
    tokens = below[:, shape.depth[1:] - 1, shape.rank[1:]]
    tokens = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), tokens], 1)
    return Draft(Tree(tokens, shape.parent, int(shape.depth[-1])), None)


def drawn(choose: Chooser, logits: Array, context: Any, shape: Shape) -> Draft:
    """Each node's children are drawn from its head's distribution, without replacement. logits [B, K, V]."""
    tree, probs = Tree(jnp.zeros((len(logits), 1), jnp.int32), shape.parent[:1], 0), []
    for depth in range(1, int(shape.depth[-1]) + 1):
        (above,), (below,) = np.nonzero(shape.depth == depth - 1), np.nonzero(shape.depth == depth)
        contexts = jax.tree.map(lambda a, at=above: a[:, at], along(context, tree))
        own = jnp.repeat(logits[:, depth - 1, None], len(above), 1)
        width = int(shape.turn[below].max()) + 1
        found, q = choose(own, contexts, jnp.asarray(above), jnp.full(len(above), depth - 1), width)
        at = shape.parent[below] - above[0], shape.turn[below]
        probs.append(q[:, *at])
        tokens = jnp.concatenate([tree.tokens, found[:, *at]], 1)
        tree = Tree(tokens, shape.parent[: tokens.shape[1]], depth)
    return Draft(tree, jnp.concatenate(probs, 1))


def best_choices(hits: np.ndarray, nodes: int) -> Choices:
    """The tree of so many drafts that keeps most, by how often each rank of each head was right: f64 [K, ranks].

    Ranks of different heads are taken to be right independently of each other, as Medusa does."""
    worth, chosen, open_ = {(): 1.0}, [], {(0,)}
    for _ in range(nodes):
        value = {path: worth[path[:-1]] * hits[len(path) - 1, path[-1]] for path in open_}
        best = max(sorted(open_), key=value.__getitem__, default=None)
        if best is None:
            break
        worth[best] = value[best]
        chosen.append(best)
        open_.discard(best)
        open_ |= {(*best[:-1], best[-1] + 1)} if best[-1] + 1 < hits.shape[1] else set()
        open_ |= {(*best, 0)} if len(best) < len(hits) else set()
    return tuple(chosen)


# ---- the drafter ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Medusa:
    """Medusa heads on the target, and the tree of what they are asked for.

    heads: see `load_medusa`. choices: paths of ranks, (0, 2) the third token of head 1 behind the first of head 0.
    choice: how, where the sampler is not greedy: "couple", the tokens that are first with the very noise that the
    target draws with; "top", the most probable; with both, tokens are those of plain decoding with the same keys.
    "draw": drawn without replacement from each head's processed distribution, and weighed by it.
    """

    heads: dict
    choices: Choices = MC_SIM_7B_63
    choice: Choice = "couple"
    features: ClassVar[tuple[str, ...]] = ("norm",)
    whole_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        known, count = {(), *self.choices}, len(self.heads["heads"])
        if len(known) != len(self.choices) + 1 or any(path[:-1] not in known for path in self.choices):
            raise JaxllmError("choices are different paths, each with its beginnings among them: (0,), (0, 0)")
        if not self.choices or self.lengths[-1] > count or min(map(min, self.choices)) < 0:
            raise JaxllmError(f"{count} heads can be asked for paths of 1 to {count} ranks from 0, got others")
        if self.choice not in ("draw", "couple", "top"):
            raise JaxllmError(f"choice is 'draw', 'couple' or 'top', got {self.choice!r}")

    @property
    def nodes(self) -> int:
        return 1 + len(self.choices)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(range(1, max(map(len, self.choices), default=0) + 1))

    def init(self, target: Model, plan: Plan, found: Read) -> Memory:
        """The newest hidden vectors. Raises CheckpointError for heads of another model."""
        check_heads(self.heads, target.config)
        sampler, choice = chosen_by(plan.sampler, self.choice)
        heads = {**self.heads, "heads": self.heads["heads"][: self.lengths[-1]]}
        ends = {name: target.params[name] for name in ("embed", "head") if name in target.params}
        ends = {} if "out" in heads["heads"][0] else ends
        return Memory(found.last, target.config, ends, heads, sampler, choice)

    def propose(self, memory: Memory, asked: Asked) -> tuple[Draft, Memory]:
        """What the heads say behind the newest tokens."""
        m, carry = memory, asked.carry
        place = (carry.context, carry.keys, carry.step)
        args = (m.config, m.ends, m.heads, m.sampler, m.x, place, np.int32(asked.length))
        return draft(*args, choices=self.choices, choice=m.choice), memory

    def accept(self, memory: Memory, seen: Verified) -> Memory:
        """The hidden vector of the last token kept."""
        return dataclasses.replace(memory, x=last_of(seen.features, seen.kept))


@dataclasses.dataclass(frozen=True)
class Memory:
    """What Medusa heads need."""

    x: Array  # [B, D]  the target's newest hidden vectors
    config: ModelConfig  # of the target
    ends: dict  # the target's embedding and projection, where heads share it
    heads: dict
    sampler: Sampler
    choice: Choice


@jax.jit
def last_of(features: Array, kept: Array) -> Array:
    """[B, width] of features [B, D + 1, width] behind kept i32 [B] drafts."""
    return jnp.take_along_axis(features, jnp.maximum(kept, 0)[:, None, None], 1)[:, 0]


def check_heads(heads: dict, config: ModelConfig) -> None:
    """Raise CheckpointError unless the heads are for a target of this config."""
    first, tokens = heads["heads"][0], heads.get("tokens")
    arrays = [b["w"] for b in first["blocks"]] + ([first["out"]["w"]] if "out" in first else [])
    width = arrays[0].shape[-1] if arrays else config.width
    rows = first["out"]["w"].shape[0] if "out" in first else config.vocab
    wanted = config.vocab if tokens is None else len(tokens)
    if width != config.width or rows != wanted:
        raise CheckpointError(
            f"the Medusa heads are for a width of {width} and {rows} tokens, and the target has {config.width} "
            f"and {wanted}; choose heads that were trained for this model"
        )
    if tokens is not None and not (tokens.min() >= 0 and tokens.max() < config.vocab):
        raise CheckpointError(f"the token map of the Medusa heads leaves the target's {config.vocab} tokens")


def load_medusa(
    path_or_hub_id: str | os.PathLike, target: Model, *, choices: Choices | None = None, choice: Choice = "couple"
) -> Medusa:
    """Published Medusa heads (see `checkpoint.medusa`) as a drafter for `target`, in its dtype.

    choices: the tree; "medusa_choices" of config.json if not given, or else Medusa's own, as far as there are
    heads; a chain where the target has recurrent layers.

    Raises CheckpointError for heads that cannot be read or are not for this target."""
    folder = find(path_or_hub_id)
    heads, values = read_heads(folder)
    check_heads(heads, target.config)
    if choices is None:
        given = values.get("medusa_choices", MC_SIM_7B_63)
        choices = _own_choices(folder, given, len(heads["heads"]))
        choices = choices if trees_fit(target.config) else tuple(path for path in choices if not any(path))
    place = lambda x: jax.device_put(x if x.dtype == np.int32 else x.astype(target.config.dtype))
    return Medusa(jax.tree.map(place, heads), choices, choice)


def trees_fit(config: ModelConfig) -> bool:
    """Whether a target can verify more than chains."""
    return all(isinstance(block.mixer, Attention | MLA) for block in config.blocks)


def _own_choices(folder: os.PathLike, given: Any, count: int) -> Choices:
    lists = isinstance(given, list | tuple) and all(isinstance(path, list | tuple) for path in given)
    if not lists or any(type(rank) is not int for path in given for rank in path):
        raise CheckpointError(f"{folder}: medusa_choices should be a list of lists of ranks; remove or mend it")
    return tuple(tuple(path) for path in given if len(path) <= count)
