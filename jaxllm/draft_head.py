"""Drafts of a head that reads the target's own hidden vectors: EAGLE's, and checkpoints' own predictors.

The head holds an entry for every token but the first: the token, and the target's feature of the one before.
Drafts go on from its own features; after each verification all of them are taken back, and the tokens that were
kept are read again with what the target made of them. So its cache is that of the tokens alone.

B rows, P prompts, T tokens read at once, W width of the target's features side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import draft_grow
from jaxllm.decode import Plan
from jaxllm.draft_grow import Choice, Grown, Shape
from jaxllm.errors import JaxllmError
from jaxllm.feature_head import Head, HeadConfig
from jaxllm.model import Model
from jaxllm.prompts import new_state, padded
from jaxllm.reading import Read
from jaxllm.sampling import Sampler
from jaxllm.spec_decode import Asked, Verified
from jaxllm.spec_verify import Draft
from jaxllm.state import State, keep_path, select_rows

Array = jax.Array
CHUNK = 64  # entries that are read at once after plain steps


@dataclasses.dataclass(frozen=True)
class DraftHead:
    """A head as a drafter: a chain, a tree of fixed widths, or one grown by confidence.

    shape and choice are `widths` and `choice` of `DraftModel`. For a target with recurrent layers the shape is a
    chain, such as (1, 1).
    """

    head: Head
    shape: Shape = dataclasses.field(default_factory=Grown)
    choice: Choice = "top"
    whole_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        draft_grow.check_shape(self.shape, self.choice)

    @property
    def features(self) -> tuple[str, ...]:
        return self.head.config.features

    @property
    def nodes(self) -> int:
        return draft_grow.most_nodes(self.shape)

    @property
    def lengths(self) -> tuple[int, ...]:
        return draft_grow.lengths(self.shape)

    def init(self, target: Model, plan: Plan, found: Read) -> Memory:
        """The prompts, read by the head with the target's features of them.

        Raises JaxllmError where the head was made for another width or vocabulary, ContextError as `new_state`."""
        self._check(target)
        P = len(found.features[0])
        times = len(plan.rows) // P
        state, last = self._read(plan, plan.rows[::times], found)
        if times > 1:
            state, last = select_rows(state, np.repeat(np.arange(P), times)), np.repeat(last, times, 0)
        held, one = _lengths(plan.rows) - 1, np.ones(len(plan.rows), np.int32)
        sampler, choice = draft_grow.chosen_by(plan.sampler, self.choice)
        return Memory(state, held, ((last[:, None], one),), sampler, choice)

    def _read(self, plan: Plan, prompts: Sequence[Sequence[int]], found: Read) -> tuple[State, np.ndarray]:
        """(a state with all of each prompt but the first token, the target's features [P, W] of the last)."""
        config, params = self.head.config, self.head.params
        spare = max(draft_grow.most_fed(self.shape), draft_grow.deepest(self.shape)) + 1
        chunk = min(max(found.features[0].shape[1], CHUNK, spare), config.model.max_len)
        alone = Model(config.model, params, name=self.head.name)
        state = new_state(alone, prompts, plan.new_tokens, chunk, spare=spare, **plan.room)
        for at, features in _pieces(found.features, state.chunk):
            tokens = [row[at + 1 : at + 1 + features.shape[1]] for row in prompts]
            args = (state, padded(tokens, features.shape[1]), features, _lengths(tokens))
            state = extend(config, params, *args)
        return state, _last(found.features, _lengths(prompts))

    def _check(self, target: Model) -> None:
        config, wide = self.head.config, len(self.features) * target.config.width
        if (config.vocab, config.feature_width) != (target.config.vocab, wide):
            raise JaxllmError(
                f"the head reads features {config.feature_width} wide and a vocabulary of {config.vocab} tokens; "
                f"the target has {wide} and {target.config.vocab}: load the head for this target"
            )

    def propose(self, memory: Memory, asked: Asked) -> tuple[Draft | None, Memory]:
        """Read what the target has kept, then draft."""
        held = np.array([len(row) - 1 for row in asked.rows])
        room, most = memory.state.capacity, draft_grow.most_fed(self.shape)
        if room is not None and held[asked.live].max() + most > room:
            return None, memory
        state, tokens, features, n_new = self._catch_up(memory, asked.rows)
        head, carry = self.head, asked.carry
        args = (head.config, head.params, memory.sampler, state, tokens, features, n_new)
        place = (carry.context, carry.keys, carry.step)
        how = dict(choice=memory.choice, vocab=head.config.vocab, shape=self.shape)
        draft, state = draft_grow.draft(*args, place, np.int32(asked.length), **how)
        return draft, dataclasses.replace(memory, state=state, held=held, waiting=())

    def _catch_up(
        self, memory: Memory, rows: Sequence[Sequence[int]]
    ) -> tuple[State, np.ndarray, Array | np.ndarray, np.ndarray]:
        """(the state without drafts; what it lacks: tokens i32 [B, T], features [B, T, W], how many i32 [B])."""
        state, T = taken_back(memory.state, memory.held), 1 + draft_grow.deepest(self.shape)
        lacking = [list(row[n + 1 :]) for row, n in zip(rows, memory.held, strict=True)]
        if len(memory.waiting) == 1 and memory.waiting[0][0].shape[1] == T:
            return state, padded(lacking, T), memory.waiting[0][0], _lengths(lacking)
        features = _in_order(memory.waiting)
        while max(map(len, lacking)) > T:  # after plain steps
            count = np.minimum(np.maximum(_lengths(lacking) - 1, 0), CHUNK)
            tokens = [row[:n] for row, n in zip(lacking, count, strict=True)]
            args = (
                state,
                padded(tokens, CHUNK),
                _padded([f[:n] for f, n in zip(features, count, strict=True)], CHUNK),
            )
            state = extend(self.head.config, self.head.params, *args, count)
            lacking = [row[n:] for row, n in zip(lacking, count, strict=True)]
            features = [f[n:] for f, n in zip(features, count, strict=True)]
        return state, padded(lacking, T), _padded(features, T), _lengths(lacking)

    def accept(self, memory: Memory, seen: Verified) -> Memory:
        """Remember the target's features of the tokens that entered its state."""
        count = np.asarray(seen.kept) + 1
        return dataclasses.replace(memory, waiting=(*memory.waiting, (seen.features, count)))


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a head remembers."""

    state: State  # drafts may still be in it
    held: np.ndarray  # i32 [B]  entries of each row in the state, without drafts
    # ([B, n, W], i32 [B]): of the tokens behind those entries, the target's features, and how many are real
    waiting: tuple[tuple[Array | np.ndarray, np.ndarray], ...]
    sampler: Sampler  # its distribution is what drafts are chosen by
    choice: Choice


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def extend(config: HeadConfig, params: dict, state: State, tokens: Array, features: Array, count: Array) -> State:
    """The state with count i32 [B] more: tokens i32 [B, T], and the target's features [B, T, W] before them."""
    return config.read(params, tokens, config.take(params, features), state, n_new=count)[1]


@partial(jax.jit, donate_argnums=0)
def taken_back(state: State, held: Array) -> State:
    """The state with its first `held` i32 [B] entries alone."""
    return keep_path(state, held, None, jnp.zeros_like(held))


def _lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.int32)


def _pieces(chunks: Sequence[Array], most: int) -> Iterator[tuple[int, Array]]:
    """(where it begins, features [P, n, W]) of chunks [P, C, W] one after the other, n at most `most`."""
    at = 0
    for chunk in chunks:
        for start in range(0, chunk.shape[1], most):
            piece = chunk if chunk.shape[1] <= most else chunk[:, start : start + most]
            yield at + start, piece
        at += chunk.shape[1]


def _last(chunks: Sequence[Array], lengths: np.ndarray) -> np.ndarray:
    """[P, W]: the features of each prompt's last token, which are in one of the chunks [P, C, W]."""
    size = chunks[0].shape[1]
    hosted = {c: np.asarray(chunks[c]) for c in set(((lengths - 1) // size).tolist())}
    return np.stack([hosted[(n - 1) // size][i, (n - 1) % size] for i, n in enumerate(lengths.tolist())])


def _in_order(waiting: Sequence[tuple[Array | np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The real features of each row, [n, W]."""
    parts = [(np.asarray(features), count) for features, count in waiting]
    rows = range(len(parts[0][1]))
    return [np.concatenate([features[b, : count[b]] for features, count in parts]) for b in rows]


def _padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Rows [n, W] as one array [B, length, W], zeros behind each."""
    out = np.zeros((len(rows), length, rows[0].shape[-1]), rows[0].dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
