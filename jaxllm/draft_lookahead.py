"""Drafts from the target's own guesses at what lies further ahead: lookahead decoding (arXiv 2402.02057).

Behind the newest token the tree holds a window of guesses. What the target says behind them, in the forward that
verifies them, refines them (a Jacobi iteration), and is remembered as n-grams, which are tried where their first
token comes up again. It needs no model; the text so far gives n-grams, too.
B rows, N nodes of a tree (node 0 is the newest token), W positions of the window, n tokens of an n-gram.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from jaxllm.decode import Plan
from jaxllm.errors import JaxllmError
from jaxllm.model import Model
from jaxllm.reading import Read
from jaxllm.spec_decode import Asked, Verified
from jaxllm.spec_verify import Draft, Tree


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """The target's guesses at the next tokens, and n-grams of what it guessed and said before.

    window: positions guessed at; ngram: tokens of an n-gram, so that a guess is refined ngram - 2 times before the
    n-gram it ends is remembered; candidates: n-grams tried at once behind the newest token, the latest ones.
    Guesses are drawn as the target draws: with the noise that will decide at their position.
    """

    window: int = 4
    ngram: int = 3
    candidates: int = 3
    features: ClassVar[tuple[str, ...]] = ()
    whole_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.ngram < 2 or self.candidates < 0:
            raise JaxllmError(
                "a lookahead drafter needs window >= 1, ngram >= 2 and candidates >= 0, got "
                f"{self.window}, {self.ngram} and {self.candidates}"
            )

    @property
    def nodes(self) -> int:
        return 1 + (self.window + self.candidates) * (self.ngram - 1)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.window + self.ngram - 2,)

    def init(self, target: Model, plan: Plan, found: Read) -> list[Ahead]:
        """Nothing is known of a row yet; its prompt is read with its first draft."""
        return [Ahead(self.window, self.ngram, self.candidates) for _ in plan.rows]

    def propose(self, memory: list[Ahead], asked: Asked) -> tuple[Draft | None, list[Ahead]]:
        """A tree for each row: the n-grams of its newest token, and its window."""
        tokens = np.full((len(memory), self.nodes), -1, np.int32)
        parent = np.zeros((len(memory), self.nodes), np.int32)
        parent[:, 0] = -1
        for i in np.flatnonzero(asked.live):
            trie = memory[i].tree(asked.rows[i])
            tokens[i, : len(trie)], parent[i, : len(trie)] = trie.columns()
        return Draft(Tree(tokens, parent, self.lengths[0]), None), memory

    def accept(self, memory: list[Ahead], seen: Verified) -> list[Ahead]:
        """The windows are refined, and move on with the text."""
        for ahead, said, kept in zip(memory, np.asarray(seen.said).tolist(), seen.kept.tolist(), strict=True):
            if kept >= 0:
                ahead.refine(said, kept)
        return memory


class Trie:
    """Lines of tokens behind a first one; those that begin alike share nodes."""

    def __init__(self, first: int):
        self.nodes = {(-1, first): 0}  # (parent, token): number

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, line: Iterable[int], at: int = 0) -> int:
        """The node at the end of a line behind node `at`."""
        for token in line:
            at = self.nodes.setdefault((at, token), len(self.nodes))
        return at

    def columns(self) -> tuple[list[int], list[int]]:
        """(tokens, parents), as a Tree has them."""
        return [token for _, token in self.nodes], [parent for parent, _ in self.nodes]


class Ahead:
    """What one row remembers: n-grams by their first token, and the window.

    The window is W lines of n - 1 guesses at successive positions. The first of line j stands j + 1 behind the
    newest token and is the oldest guess at that position; it follows the first of line j - 1.
    """

    def __init__(self, window: int, ngram: int, candidates: int):
        self.size, self.ngram, self.candidates = window, ngram, candidates
        self.known: dict[int, dict[tuple[int, ...], None]] = {}  # the latest last
        self.window: list[list[int]] = []
        self.ends: list[int] = []  # the node of each line's last guess
        self.read = 0

    def tree(self, row: Sequence[int]) -> Trie:
        """What is tried behind the row's newest token."""
        for end in range(max(self.read + 1, self.ngram), len(row) + 1):
            self._learn(row[end - self.ngram : end])
        self.read = len(row)
        trie = Trie(row[-1])
        for rest in [*reversed(self.known.get(row[-1], {}))][: self.candidates]:
            trie.add(rest)
        self._fill(row[-1])
        at, self.ends = 0, []
        for line in self.window:
            at = trie.add(line[:1], at)
            self.ends.append(trie.add(line[1:], at))
        return trie

    def refine(self, said: Sequence[int], kept: int) -> None:
        """After a verification: what the target said behind each node, and how many drafts were kept."""
        grams = [[*line, said[end]] for line, end in zip(self.window, self.ends, strict=True)]
        grams = list(itertools.takewhile(lambda gram: gram[-1] >= 0, grams))
        for gram in grams:
            self._learn(gram)
        self.window = [gram[1:] for gram in grams[kept:]]

    def _learn(self, gram: Sequence[int]) -> None:
        known, rest = self.known.setdefault(gram[0], {}), tuple(gram[1:])
        known.pop(rest, None)
        known[rest] = None
        if len(known) > max(self.candidates, 1):
            del known[next(iter(known))]

    def _fill(self, newest: int) -> None:
        """Lines where some are missing at the end: what is known to follow."""
        while len(self.window) < self.size:
            line = [self.window[-1][0] if self.window else newest]
            for _ in range(self.ngram - 1):
                known = self.known.get(line[-1])
                line.append(next(reversed(known))[0] if known else line[-1])
            self.window.append(line[1:])
