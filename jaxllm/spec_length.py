"""How far to draft: what gives most tokens per second, by the acceptance and the times measured so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np

_MEMORY = 0.97  # what an earlier observation weighs after each verification
_SAMPLES = 9  # times of one length that are looked at
_FIRST_REST, _LONGEST_REST = 64, 512  # plain steps between two trials of a drafter that does not pay
_TRIED = 4  # the length that is measured first, where there are several
_PLAIN = 8  # plain steps measured together, as they overlap with the host's work


class Pace:
    """Chooses the next draft's length, 0 for none, and remembers what became of the drafts before."""

    def __init__(self, lengths: Sequence[int], length: int | Literal["auto"]):
        self.lengths, self.fixed = tuple(lengths), None if length == "auto" else length
        most = self.lengths[-1]
        self.looked_at = np.zeros(most, int)  # drafts at each place whose turn came
        self.kept = np.zeros(most, int)
        self.recent = np.zeros((2, most))  # the same, the latest counting most
        self.times: dict[int, deque[float]] = {}
        self.rest, self.resting, self.rested = _FIRST_REST, 0, False

    def choose(self) -> int:
        """Drafts on a path to ask for now."""
        if self.fixed is not None:
            return self.fixed
        if self.resting:
            return 0
        tried = min(self.lengths, key=lambda n: abs(n - _TRIED))
        if len(self.times.get(tried, ())) < 3:
            return tried
        if 0 not in self.times:
            self.resting = _PLAIN
            return 0
        if self.rested:  # one more trial
            self.rested = False
            return tried
        best = max((0, *self.lengths), key=self.rate)
        if best:
            self.rest = _FIRST_REST
            return best
        self.resting, self.rest, self.rested = self.rest, min(2 * self.rest, _LONGEST_REST), True
        return 0

    def plain(self, steps: int, seconds: float) -> None:
        """So many plain decoding steps took so long, all together."""
        self.took(0, seconds / steps)
        self.resting = max(self.resting - steps, 0)

    def verified(self, kept: np.ndarray, offered: np.ndarray) -> None:
        """A draft was verified: of each row, drafts kept and whether there was one more to look at."""
        place = np.arange(len(self.kept))[:, None]
        now = np.stack([(place < kept + offered).sum(1), (place < kept).sum(1)])
        self.looked_at += now[0]
        self.kept += now[1]
        self.recent = self.recent * _MEMORY + now

    def took(self, length: int, seconds: float) -> None:
        """A step with a draft of `length` took so long, from one to the next."""
        self.times.setdefault(length, deque(maxlen=_SAMPLES)).append(seconds)

    def rate(self, length: int) -> float:
        """Expected tokens a second of a row."""
        return self.expected(length) / self.seconds(length)

    def expected(self, length: int) -> float:
        """Expected tokens of one verification: those kept, and the one behind them."""
        looked_at, kept = self.recent[:, :length]
        # Where little was seen, a place is as good as all together.
        overall = (self.recent[1].sum() + 0.5) / (self.recent[0].sum() + 1)
        each = (kept + overall) / (looked_at + 1)
        return 1 + float(np.cumprod(each).sum())

    def seconds(self, length: int) -> float:
        """What a verification of this length takes: the median measured, or what the lengths around it suggest."""
        known = sorted(self.times)
        medians = [float(np.median(self.times[n])) for n in known]
        if len(known) < 2 or length <= known[-1]:
            return float(np.interp(length, known, medians))
        slope = (medians[-1] - medians[-2]) / (known[-1] - known[-2])
        return medians[-1] + max(slope, 0.0) * (length - known[-1])
