"""The chance that a trial under way will improve the final front, from what it shows at a rung.

Reconstruction (METHODS section 5). Costs are known or nearly so, accuracy at the end is not: it is forecast from the
accuracy at the rung by what became of the trials that reached both (`rlsearch.search.forecast`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsearch.results.racing import LEAST_TRIALS, rank_correlation
from rlsearch.search.forecast import Line, fit_line

Floats = NDArray[np.float64]

# Sums of FLOPs differ in their last bits.
_SAME_COST = 1 + 1e-9
# More forecasts of the final costs than this tell nothing new, and take time.
_MOST_CHANGES = 64


@dataclass(frozen=True)
class Finished:
    """A trial that was trained to its end, as seen from a rung.

    Attributes:
        accuracy: at the rung.
        final_accuracy: at the end.
        costs: at the rung, minimised.
        final_costs: at the end, in the same order.
        is_candidate: whether it may be on the front (one that broke a constraint may not).
        drops: whether layers leave in it (Learn&Drop), so that its costs fall on the way.
    """

    accuracy: float
    final_accuracy: float
    costs: tuple[float, ...]
    final_costs: tuple[float, ...]
    is_candidate: bool
    drops: bool


class Odds:
    """What the finished trials tell about those that stand at a rung.

    Trials with and without Learn&Drop are forecast each by their own kind: where layers leave later, the accuracy goes
    another way, and the final FLOPs are no longer those of the rung.

    Args:
        finished: the trials that reached both the rung and the end.
    """

    def __init__(self, finished: Sequence[Finished]) -> None:
        accuracies = [trial.accuracy for trial in finished]
        self.correlation = rank_correlation(accuracies, [trial.final_accuracy for trial in finished])
        self.num_trials = len(finished)
        front = [trial for trial in finished if trial.is_candidate]
        self._front_accuracies = np.array([trial.final_accuracy for trial in front])
        self._front_costs = np.array([trial.final_costs for trial in front])
        self._lines: dict[bool, Line | None] = {}
        self._changes: dict[bool, Floats] = {}
        for drops in (False, True):
            kind = [trial for trial in finished if trial.drops == drops]
            self._lines[drops] = _line(kind)
            self._changes[drops] = _cost_changes(kind, drops)

    def improving(self, accuracy: float, costs: Sequence[float], drops: bool) -> float:
        """The chance that a trial will be more accurate in the end than every finished one that costs no more.

        Args:
            accuracy: of the trial at the rung.
            costs: of the trial at the rung.
            drops: whether layers leave in it.

        Returns:
            1 where nothing can be told: too few trials of its kind have finished, or none that costs no more.
        """
        line = self._lines[drops]
        if line is None or not len(self._front_accuracies):
            return 1.0
        final_costs = np.asarray(costs) * self._changes[drops]
        costs_no_more = (self._front_costs[None] <= final_costs[:, None] * _SAME_COST).all(axis=2)
        bars = np.where(costs_no_more, self._front_accuracies, -np.inf).max(axis=1)
        chances = [1.0 if bar == -math.inf else line.chance_above(float(bar), accuracy) for bar in bars]
        return sum(chances) / len(chances)


def _line(finished: Sequence[Finished]) -> Line | None:
    """None where there are too few trials, or where a better rung does not mean a better end."""
    if len(finished) < LEAST_TRIALS:
        return None
    line = fit_line([trial.accuracy for trial in finished], [trial.final_accuracy for trial in finished])
    return None if line is None or line.slope <= 0 else line


def _cost_changes(finished: Sequence[Finished], drops: bool) -> Floats:
    """By what factors the costs changed from the rung to the end: (k, costs), one row a possible change."""
    if not drops or not finished:
        return np.ones((1, 1))
    at_rung, at_end = (np.array([getattr(trial, name) for trial in finished]) for name in ("costs", "final_costs"))
    changes = np.divide(at_end, at_rung, out=np.ones_like(at_end), where=at_rung > 0)
    return np.unique(changes[:: math.ceil(len(changes) / _MOST_CHANGES)], axis=0)
