"""How far to draft, in a world whose costs and acceptance are known."""

import numpy as np
import pytest

from jaxllm.spec_length import Pace


def live(pace: Pace, tokens: int, *, draft: float, chance: float, verify: float = 1.1) -> tuple[float, list[int]]:
    """(time a token, lengths chosen) over so many tokens; plain steps take 1, a draft `draft` a token."""
    rng, said, took, chosen = np.random.default_rng(0), 0, 0.0, []
    while said < tokens:
        length = pace.choose()
        chosen.append(length)
        if length == 0:
            steps = min(max(pace.resting, 1), tokens - said)
            pace.plain(steps, float(steps))
            said, took = said + steps, took + steps
            continue
        kept = int(np.cumprod(rng.random(length) < chance).sum())
        pace.verified(np.array([kept]), np.array([kept < length]))
        seconds = verify + draft * length
        pace.took(length, seconds)
        said, took = said + kept + 1, took + seconds
    return took / said, chosen


def test_a_fixed_length():
    _, chosen = live(Pace((1, 2, 3), 2), 50, draft=5, chance=0)
    assert set(chosen) == {2}


@pytest.mark.parametrize(
    ("chance", "draft", "low", "high"), [(0.95, 0.05, 7, 8), (0.6, 0.1, 2, 4), (0.4, 0.1, 1, 2)]
)
def test_the_best_length_is_found(chance, draft, low, high):
    """Of (1 - a^(n + 1)) / (1 - a) tokens for what n drafts and a verification cost."""
    took, chosen = live(Pace(range(1, 9), "auto"), 2000, draft=draft, chance=chance)
    assert low <= np.median(chosen) <= high
    assert took < 1


@pytest.mark.parametrize("lengths", [range(1, 9), (3,)], ids=["chain", "tree"])
@pytest.mark.parametrize(("chance", "draft"), [(0.0, 0.0), (0.1, 0.3), (0.3, 1.0)])
def test_a_drafter_that_does_not_pay_costs_little(lengths, chance, draft):
    took, chosen = live(Pace(lengths, "auto"), 2000, draft=draft, chance=chance)
    assert took < 1 / 0.95
    assert chosen.count(0) > 3


def test_what_was_learnt_serves_the_next_generation():
    """A drafter that never pays is tried in the first of several short generations, and hardly in the others."""
    pace = Pace(range(1, 9), "auto")
    tries = [sum(map(bool, live(pace, 100, draft=1, chance=0.2)[1])) for _ in range(12)]
    assert tries[0] > 2
    assert sum(tries[1:]) <= 4


def test_trials_take_their_share_of_the_time():
    """What a trial costs decides how long nothing is tried."""
    cheap, dear = (live(Pace((4,), "auto"), 20000, draft=draft, chance=0) for draft in (0.5, 1.5))
    assert cheap[1].count(4) > 1.5 * dear[1].count(4) > 10
    assert max(cheap[0], dear[0]) < 1.03
