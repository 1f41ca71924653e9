"""Drafts without a model: what was said before.

B rows, N nodes of a tree (node 0 is the newest token), D drafts on its longest path, V the target's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxllm.decode import Plan
from jaxllm.errors import JaxllmError
from jaxllm.model import Model
from jaxllm.reading import Read
from jaxllm.spec_decode import Asked, Verified
from jaxllm.spec_verify import Draft, chain_of


@dataclasses.dataclass(frozen=True)
class NGram:
    """Prompt lookup: where the newest tokens stood before, what followed them then follows again. No model.

    longest, shortest: how many of the newest tokens are looked for; the longest match counts, of equal ones the
    last. What follows is repeated where it reaches the end, as in a loop. (arXiv 2304.04487 is the idea.)
    """

    length: int = 8
    longest: int = 5
    shortest: int = 2
    features: ClassVar[tuple[str, ...]] = ()
    whole_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.length < 1 or not 1 <= self.shortest <= self.longest:
            raise JaxllmError(
                "an n-gram drafter needs length >= 1 and 1 <= shortest <= longest, got "
                f"{self.length}, {self.shortest} and {self.longest}"
            )

    @property
    def nodes(self) -> int:
        return self.length + 1

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(range(1, self.length + 1))

    def init(self, target: Model, plan: Plan, found: Read) -> list[Seen]:
        """An index for each row."""
        return [Seen(self.shortest, self.longest) for _ in plan.rows]

    def propose(self, memory: list[Seen], asked: Asked) -> tuple[Draft | None, list[Seen]]:
        """A chain for each row that has said its newest tokens before."""
        tokens = np.full((len(memory), self.nodes), -1, np.int32)
        for line, seen, row in zip(tokens, memory, asked.rows, strict=True):
            guess = seen.following(row, asked.length)
            line[1 : 1 + len(guess)] = guess
        found = bool((tokens[asked.live] >= 0).any())
        return (Draft(chain_of(tokens), None) if found else None), memory

    def accept(self, memory: list[Seen], seen: Verified) -> list[Seen]:
        """Nothing to do: the tokens themselves say it."""
        return memory


class Seen:
    """Where each n-gram of one row was followed by something last."""

    def __init__(self, shortest: int, longest: int):
        self.sizes = range(longest, shortest - 1, -1)
        self.after: dict[tuple[int, ...], int] = {}
        self.read = 0

    def following(self, row: Sequence[int], length: int) -> list[int]:
        """The `length` tokens that followed the end of the row before; [] where it is new."""
        for end in range(self.read, len(row)):
            for n in self.sizes:
                if n <= end:
                    self.after[tuple(row[end - n : end])] = end
        self.read = len(row)
        at = next((a for n in self.sizes if (a := self.after.get(tuple(row[-n:]))) is not None), None)
        return [] if at is None else [row[at + i % (len(row) - at)] for i in range(length)]
