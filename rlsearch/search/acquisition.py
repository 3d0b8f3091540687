"""What a policy would add to the front if it were trained: its expected hypervolume improvement, costs being known.

Where all objectives but one are exact, the improvement is an integral over the cost space. A candidate dominates every
point of it that costs at least as much in everything, down from its accuracy; what is gained at such a point is by how
much that accuracy exceeds the best that the front has there for no more. Its expectation under a normal distribution is
known in closed form, so that only the integral over the cost space is approximated, by the same quasi-random points for
all candidates. Reconstruction; the expected improvement in closed form is that of Jones, Schonlau and Welch, "Efficient
Global Optimization of Expensive Black-Box Functions", 1998, section 4.1.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf
from scipy.stats import qmc

from rlsearch.search.encoding import Floats

# A power of two, as Sobol's points want it.
_LOG_POINTS = 10


def expected_gains(mean: Floats, deviation: Floats, costs: Floats, front: Floats, front_costs: Floats) -> Floats:
    """The expected gain in hypervolume of each candidate by itself.

    Args:
        mean: of its accuracy, (N,).
        deviation: the standard deviation of that, (N,), positive.
        costs: what it costs, minimised, (N, M); costs of 1 and above are worth nothing.
        front: accuracies of what has been trained, (F,).
        front_costs: their costs, (F, M).

    Returns:
        (N,), with the accuracy's reference at 0 and that of the costs at 1.
    """
    lowest = np.minimum(costs.min(axis=0, initial=1.0), front_costs.min(axis=0, initial=1.0)).clip(0, 1)
    places = _places(costs.shape[1], lowest)
    volume = float(np.prod(1 - lowest))
    reached = np.zeros(len(places))
    for accuracy, cost in zip(front, front_costs, strict=True):
        np.maximum(reached, accuracy, out=reached, where=(cost <= places).all(axis=1))
    covered = (costs[:, None, :] <= places[None, :, :]).all(axis=2)
    gains = np.where(covered, _expected_excess(mean[:, None], deviation[:, None], reached[None, :]), 0.0)
    found: Floats = gains.mean(axis=1) * volume
    return found


def _places(dimensions: int, lowest: Floats) -> Floats:
    """Points of the cost space between the lowest costs and 1, (P, M)."""
    if dimensions == 0:
        return np.zeros((1, 0))
    unit = qmc.Sobol(dimensions, scramble=True, rng=0).random_base2(_LOG_POINTS)
    places: Floats = lowest + unit * (1 - lowest)
    return places


def _expected_excess(mean: Floats, deviation: Floats, bound: Floats) -> Floats:
    """The expectation of how far a normal variable exceeds a bound, where it does."""
    distance = (mean - bound) / deviation
    density = np.exp(-0.5 * distance**2) / math.sqrt(2 * math.pi)
    excess: Floats = deviation * (density + distance * 0.5 * (1 + erf(distance / math.sqrt(2))))
    return excess
