"""Drafts of a model: a smaller one, or the target itself made cheaper.

B rows, N nodes of a tree (node 0 is the newest token), D drafts on its longest path, V the target's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import draft_grow
from jaxllm.decode import Plan
from jaxllm.draft_grow import Alone, Choice, Grown, Shape
from jaxllm.errors import ContextError, JaxllmError, TokenizerError
from jaxllm.model import Model
from jaxllm.prompts import new_state, padded
from jaxllm.reading import Read, prefill
from jaxllm.sampling import Sampler
from jaxllm.spec_decode import Asked, Verified
from jaxllm.spec_verify import Draft
from jaxllm.state import Recurrent, State, keep_path, select_rows
from jaxllm.tokenizer import Tokenizer

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """A model that is cheaper than the target and says much the same: a chain, or a tree.

    widths: children of each node at each depth, all 1 for a chain; or `Grown`, by confidence. choice, where the
    sampler is not greedy: "draw" from the draft's processed distribution, siblings without replacement, to be
    weighed by it; "couple": draw with the very noise that the target draws with, so that the two often agree and
    tokens are those of plain decoding with the same keys (arXiv 2408.07978); "top": take the most probable, with
    which tokens are those, too.
    """

    model: Model
    widths: Shape = (1,) * 6
    choice: Choice = "draw"
    features: ClassVar[tuple[str, ...]] = ()
    whole_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        draft_grow.check_shape(self.widths, self.choice)

    @property
    def nodes(self) -> int:
        return draft_grow.most_nodes(self.widths)

    @property
    def chain(self) -> bool:
        return draft_grow.is_chain(self.widths)

    @property
    def lengths(self) -> tuple[int, ...]:
        return draft_grow.lengths(self.widths)

    @property
    def catches_up(self) -> int:
        """Tokens that a step may begin with: the newest, and drafts kept that are not in the state.

        Of a tree grown by confidence all are read again: which ones were fed is not known any more."""
        return 1 + self.widths.depth if isinstance(self.widths, Grown) else 2

    def init(self, target: Model, plan: Plan, found: Read) -> Memory:
        """The prompts, which the draft model reads before its first draft.

        Raises TokenizerError for another vocabulary, ContextError where its context is too short, JaxllmError for
        recurrent layers.
        """
        check_vocabulary(target, self.model)
        state = self._state(plan, list(dict.fromkeys(map(tuple, plan.rows))))  # samples of one prompt share it
        if any(isinstance(c, Recurrent) for c in state.layers):
            raise JaxllmError(
                f"the draft model {self.model.name} has recurrent layers, which cannot take drafts back"
            )
        sampler, choice = draft_grow.chosen_by(plan.sampler, self.choice)
        held = np.zeros(len(plan.rows), int)
        return Memory(state, held, None, held, sampler, choice, target.config.vocab, plan.rows)

    def _read(self, memory: Memory) -> Memory:
        """The prompts in the state."""
        unique = list(dict.fromkeys(map(tuple, memory.prompts)))
        state, _ = prefill(self.model, unique, memory.state)
        if len(unique) < len(memory.prompts):
            state = select_rows(state, jnp.asarray([unique.index(tuple(row)) for row in memory.prompts]))
        held = np.array([len(row) for row in memory.prompts])
        return dataclasses.replace(memory, state=state, held=held, prompts=None)

    def _state(self, plan: Plan, unique: Sequence[Sequence[int]]) -> State:
        wanted = max(map(len, unique)) + plan.new_tokens - 1  # the last token is never fed
        config = self.model.config
        if plan.room["overflow"] == "error" and wanted > config.max_len:
            raise ContextError(
                f"the draft model {self.model.name} has a context of {config.max_len} tokens, and {wanted} are "
                "wanted; shorten them, or choose another drafter"
            )
        chunk = min(max(CHUNK, self.nodes, self._spare), config.max_len)
        return new_state(self.model, unique, plan.new_tokens, chunk, spare=self._spare, **plan.room)

    @property
    def _spare(self) -> int:
        """Slots for drafts in its own state."""
        return 1 + max(draft_grow.most_fed(self.widths), self.nodes - 1)

    def propose(self, memory: Memory, asked: Asked) -> tuple[Draft | None, Memory]:
        """Catch up with the target, then draft."""
        held = np.array([len(row) for row in asked.rows])
        room = memory.state.capacity
        if room is not None and held[asked.live].max() + self._spare > room:
            return None, memory
        memory = memory if memory.prompts is None else self._read(memory)
        state, tokens, n_new = self._catch_up(memory, asked.rows)
        carry, model = asked.carry, self.model
        args = (Alone(model.config), model.params, memory.sampler, state, tokens, None, n_new)
        place = (carry.context, carry.keys, carry.step)
        how = dict(choice=memory.choice, vocab=memory.vocab, shape=self.widths)
        draft, state = draft_grow.draft(*args, place, np.int32(asked.length), **how)
        fed = 0 if isinstance(self.widths, Grown) else asked.length - 1
        return draft, dataclasses.replace(memory, state=state, held=held, path=None, kept=0 * held, fed=fed)

    def _catch_up(self, memory: Memory, rows: Sequence[Sequence[int]]) -> tuple[State, np.ndarray, np.ndarray]:
        """(the state without rejected drafts, the last tokens it lacks i32 [B, n], how many they are i32 [B])."""
        state = settled(memory.state, memory.held, memory.path, memory.kept)
        known = memory.held + memory.kept
        lacking = [list(row[n:]) for row, n in zip(rows, known, strict=True)]
        if max(map(len, lacking)) > self.catches_up:  # after plain steps
            state, _ = prefill(self.model, [row[:-1] for row in lacking], state)
            lacking = [row[-1:] for row in lacking]
        return state, padded(lacking, self.catches_up), np.array([len(row) for row in lacking], np.int32)

    def accept(self, memory: Memory, seen: Verified) -> Memory:
        """Remember which drafts were kept; those on the last depth were never fed."""
        kept = np.clip(seen.kept, 0, memory.fed)
        return dataclasses.replace(memory, path=None if self.chain else seen.path[:, 1:] - 1, kept=kept)


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
    prompts: list[list[int]] | None  # while they have not been read
    fed: int = 0  # drafts of a path that are in the state


@partial(jax.jit, donate_argnums=0)
def settled(state: State, held: Array, path: Array | None, kept: Array) -> State:
    """The state with the kept drafts alone."""
    return keep_path(state, held, path, kept)


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
    if differ := _differing(ours, theirs):
        raise TokenizerError(
            f"the tokens of the draft model {draft.name} are others than the target's ({len(differ)} differ, "
            f"such as {differ[0][0]!r}, {differ[0][1]}); choose a draft model with the target's tokenizer"
        )


@lru_cache(maxsize=8)
def _differing(ours: Tokenizer, theirs: Tokenizer) -> list[tuple[str, int]]:
    """Tokens that one has and the other has not, or under another id."""
    return sorted(ours.vocabulary().items() ^ theirs.vocabulary().items(), key=lambda item: item[1])
