"""How far to draft: what gives most tokens per second, by the acceptance and the times measured so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np

_MEMORY = 0.97  # what an earlier observation weighs after each verification
_SAMPLES = 9  # times of one length that are looked at
_TRIED = 4  # the length that is measured first, where there are several
_TRIALS = 3  # times of it, before anything is decided
_PLAIN = 8  # plain steps measured together, as they overlap with the host's work
_SHARE = 0.02  # of the time of plain steps is what trying again may take
_REST = (64, 16384)  # at least and at most so many plain steps lie between two trials


class Pace:
    """Chooses the next draft's length, 0 for none, and remembers what became of the drafts before.

    It may serve one generation after the other: what a step takes, and whether drafts are kept, mostly stays."""

    def __init__(self, lengths: Sequence[int], length: int | Literal["auto"]):
        self.lengths, self.fixed = tuple(lengths), None if length == "auto" else length
        self.tried = min(self.lengths, key=lambda n: abs(n - _TRIED))
        self.recent = np.zeros((2, self.lengths[-1]))  # drafts looked at at each place and kept, the latest most
        self.times: dict[int, deque[float]] = {}
        # Of first drafts after a rest, with what they catch up on.
        self.first: deque[float] = deque(maxlen=_SAMPLES)
        self.trials, self.resting = _TRIALS, 0
        self.cold, self.plain_before = True, False

    def choose(self) -> int:
        """Drafts on a path to ask for now."""
        if self.fixed is not None:
            return self.fixed
        if self.resting:
            return 0
        if self.trials:
            return self.tried
        if 0 not in self.times:
            self.resting = _PLAIN
            return 0
        if best := max((0, *self.lengths), key=self.rate):
            return best
        self._rest()
        return 0

    def _rest(self) -> None:
        """For as long as makes the next trial, of a first step and one behind it, cheap."""
        trial = (min(self.first) + self.seconds(self.tried)) / self.seconds(0)
        self.resting = int(np.clip(trial / _SHARE, *_REST))
        self.trials, self.cold = 1, True

    def plain(self, steps: int, seconds: float) -> None:
        """So many plain decoding steps took so long, all together."""
        if steps and self.resting and self.plain_before:
            self._timed(0, seconds / steps)
        self.plain_before = self.plain_before or self.resting > 0  # what comes first may compile
        self.resting = max(self.resting - steps, 0)

    def verified(self, kept: np.ndarray, offered: np.ndarray) -> np.ndarray:
        """A draft was verified: of each row, drafts kept and whether there was one more to look at
        -> [2, D] drafts looked at at each place, and kept."""
        place = np.arange(self.recent.shape[1])[:, None]
        now = np.stack([(place < kept + offered).sum(1), (place < kept).sum(1)])
        self.recent = self.recent * _MEMORY + now
        return now

    def took(self, length: int, seconds: float) -> None:
        """A step with a draft of `length` took so long, from one to the next."""
        if self.cold:
            self.first.append(seconds)
            self.cold = False
            return
        self._timed(length, seconds)
        self.trials = max(self.trials - 1, 0)

    def _timed(self, length: int, seconds: float) -> None:
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
