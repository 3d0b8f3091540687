"""The accuracy at the end of a training, from that after one of its epochs: a robust line through what others became.

Reconstruction: Huber's regression (Huber, "Robust Estimation of a Location Parameter", 1964) by repeated weighting, and
Student's prediction interval about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

LEAST_PAIRS = 5
"""So many trainings to the end tell what an epoch's accuracy becomes."""

_ROUNDS = 20
# Huber's constant: residuals beyond so many spreads pull with the force of that many.
_BEND = 1.345
# A normal sample's spread is so many times the median of its absolute residuals.
_FROM_MEDIAN = 1.4826
# At least a thousandth of a point: accuracies that lie on a line by chance make nothing certain.
_LEAST_SPREAD = 1e-5


@dataclass(frozen=True)
class Line:
    """Final accuracy from the accuracy after an epoch, with the spread around it.

    Attributes:
        slope: what a point more there is worth at the end.
        centre: the mean accuracy there, weighted.
        level: the final accuracy there.
        spread: of the final accuracies around the line.
        weight: what the trials weigh in all.
        width: the sum of their squared distances from the centre, weighted.
        freedom: degrees of freedom of the spread.
    """

    slope: float
    centre: float
    level: float
    spread: float
    weight: float
    width: float
    freedom: int

    def at(self, accuracy: float) -> float:
        """What becomes of an accuracy."""
        return self.level + self.slope * (accuracy - self.centre)

    def deviation(self, accuracy: float) -> float:
        """The standard error of `at`: of what one training will show, the line's own uncertainty included."""
        return self.spread * math.sqrt(1 + 1 / self.weight + (accuracy - self.centre) ** 2 / self.width)

    def chance_above(self, bar: float, accuracy: float) -> float:
        """The chance that a training with this accuracy ends above ``bar``."""
        return float(stdtr(self.freedom, (self.at(accuracy) - bar) / self.deviation(accuracy)))


def fit_line(before: Sequence[float], after: Sequence[float]) -> Line | None:
    """The line through the accuracies after an epoch, (n,), and at the end, (n,).

    Returns:
        None for fewer than `LEAST_PAIRS` trials, or where all are equal at the epoch.
    """
    x, y = np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)
    if len(x) < LEAST_PAIRS or not np.ptp(x):
        return None
    weights, freedom = np.ones(len(x)), len(x) - 2
    for _ in range(_ROUNDS):
        centre, level = np.average(x, weights=weights), np.average(y, weights=weights)
        width = float(weights @ (x - centre) ** 2)
        if width <= 0:
            return None
        slope = float(weights @ ((x - centre) * (y - level))) / width
        residuals = np.abs(y - level - slope * (x - centre))
        spread = max(_LEAST_SPREAD, _FROM_MEDIAN * float(np.median(residuals)) * math.sqrt(len(x) / freedom))
        weights = np.minimum(1, _BEND * spread / np.maximum(residuals, 1e-12))
    # Where the residuals are no normal sample, their median says too little; single wild ones still count as mild.
    rms = math.sqrt(float((np.minimum(residuals, 2.5 * spread) ** 2).sum()) / freedom)
    return Line(slope, float(centre), float(level), max(spread, rms), float(weights.sum()), width, freedom)
