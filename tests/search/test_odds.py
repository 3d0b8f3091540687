"""The chance that a trial improves the front: against what statistics gives, and where nothing can be told."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from scipy import stats

from rlsearch.search.odds import Finished, Odds


def finished(count: int = 40, deviation: float = 0.01, seed: int = 0) -> list[Finished]:
    """Trials that end 0.3 above their rung, off by a standard deviation, and all cost the same."""
    source = random.Random(seed)
    found = []
    for index in range(count):
        first = 0.4 + 0.2 * index / count
        found.append(Finished(first, first + 0.3 + source.gauss(0, deviation), (5.0, 7.0), (5.0, 7.0), True, False))
    return found


@pytest.mark.parametrize("count", [8, 12, 40])
@pytest.mark.parametrize("accuracy", [0.45, 0.55, 0.58, 0.62])
def test_the_chance_is_that_of_a_prediction_interval(count: int, accuracy: float) -> None:
    """Where no residual is wild, the robust line is near the common one."""
    trials = finished(count)
    x, y = [trial.accuracy for trial in trials], [trial.final_accuracy for trial in trials]
    line = stats.linregress(x, y)
    residuals = [b - line.intercept - line.slope * a for a, b in zip(x, y, strict=True)]
    mean = sum(x) / count
    spread = (sum(r**2 for r in residuals) / (count - 2)) ** 0.5
    width = sum((a - mean) ** 2 for a in x)
    deviation = spread * (1 + 1 / count + (accuracy - mean) ** 2 / width) ** 0.5
    expected = stats.t.sf((max(y) - line.intercept - line.slope * accuracy) / deviation, count - 2)
    assert Odds(trials).improving(accuracy, (5.0, 7.0), False) == pytest.approx(expected, abs=0.06)


def test_wild_trials_bend_nothing() -> None:
    """Two that collapsed after the rung move an ordinary line, and make it say nothing."""
    trials = finished()
    wild = [replace(trials[index], final_accuracy=0.1) for index in (5, 30)]
    straight, bent = Odds(trials), Odds([*trials, *wild])
    for accuracy in (0.5, 0.57, 0.6):
        args = (accuracy, (5.0, 7.0), False)
        assert bent.improving(*args) == pytest.approx(straight.improving(*args), abs=0.1)
    assert bent.improving(0.5, (5.0, 7.0), False) < 0.01


def test_only_what_costs_no_more_is_in_the_way() -> None:
    odds = Odds(finished())
    assert odds.improving(0.45, (5.0, 7.0), False) < 0.001
    assert odds.improving(0.45, (5.0, 6.9), False) == 1
    assert odds.improving(0.45, (4.9, 7.0), False) == 1
    assert odds.improving(0.45, (5.0, 7.0 * (1 - 1e-12)), False) < 0.001  # the same, but for the order of a sum


@pytest.mark.parametrize(
    "trials",
    [
        [],
        finished(7),
        [replace(trial, accuracy=0.5) for trial in finished()],  # all equal at the rung
        [replace(trial, final_accuracy=1 - trial.final_accuracy) for trial in finished()],
        [replace(trial, is_candidate=False) for trial in finished()],
        [replace(trial, drops=True) for trial in finished()],  # none of its kind
    ],
)
def test_where_nothing_can_be_told_the_chance_is_one(trials: list[Finished]) -> None:
    assert Odds(trials).improving(0.1, (9.0, 9.0), False) == 1


def test_costs_that_fall_on_the_way_fall_for_a_newcomer_too() -> None:
    """Half of the trials end at 0.8 times their cost at the rung, half at 0.4 times."""
    trials = [
        replace(trial, drops=True, final_costs=(5.0, 7.0 * (0.8 if index % 2 else 0.4)))
        for index, trial in enumerate(finished())
    ]
    odds = Odds(trials)
    assert odds.improving(0.45, (5.0, 7.0), True) < 0.001
    # At 6.9 it may end at 2.76, below all others, or at 5.52, where the other half is in its way.
    assert odds.improving(0.45, (5.0, 6.9), True) == pytest.approx(0.5, abs=0.001)
