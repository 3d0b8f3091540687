"""The expected gain is the mean of real hypervolumes, less what the front has already."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsearch.results.pareto import hypervolume
from rlsearch.search.acquisition import expected_gains

numbers = st.floats(0.05, 0.95)


def simulated(mean: float, deviation: float, cost: np.ndarray, front: np.ndarray, costs: np.ndarray) -> float:
    """By drawing accuracies, and measuring each hypervolume."""
    corner = np.ones(1 + costs.shape[1])
    before = np.column_stack([1 - front, costs])
    base = hypervolume(before, corner)
    draws = np.random.default_rng(0).normal(mean, deviation, 400)
    gains = [hypervolume(np.vstack([before, [1 - max(a, 0.0), *cost]]), corner) - base for a in draws]
    return float(np.mean(gains))


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
def test_it_is_the_mean_gain_in_hypervolume(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    front, costs = rng.uniform(0.4, 0.8, 6), rng.uniform(0.3, 0.95, (6, dimensions))
    candidates = rng.uniform(0.3, 0.9, (20, dimensions))
    mean, deviation = rng.uniform(0.5, 0.85, 20), rng.uniform(0.005, 0.1, 20)
    found = expected_gains(mean, deviation, candidates, front, costs)
    expected = [simulated(m, d, c, front, costs) for m, d, c in zip(mean, deviation, candidates, strict=True)]
    assert found == pytest.approx(expected, rel=0.15, abs=0.06 * max(expected))
    assert np.argmax(found) == np.argmax(expected)


def test_a_sure_loser_and_what_costs_too_much_gain_nothing() -> None:
    front, costs = np.array([0.8]), np.array([[0.5, 0.5]])
    candidates = np.array([[0.6, 0.6], [0.1, 1.0], [0.4, 0.4]])
    gains = expected_gains(np.array([0.7, 0.99, 0.8]), np.full(3, 1e-4), candidates, front, costs)
    assert gains[0] == pytest.approx(0, abs=1e-9)
    assert gains[1] == 0
    assert gains[2] > 0.05


@settings(max_examples=40, deadline=None)
@given(
    numbers, st.floats(0.001, 0.2), st.floats(0.01, 0.1), st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5)
)
def test_more_accuracy_less_cost_and_more_doubt_never_gain_less(
    mean: float, deviation: float, step: float, members: list[tuple[float, float]]
) -> None:
    front, costs = np.array([a for a, _ in members]), np.array([[c] for _, c in members])
    cost = 0.5
    gains = expected_gains(
        np.array([mean, mean + step, mean, mean]),
        np.array([deviation, deviation, deviation, deviation + step]),
        np.array([[cost], [cost], [cost - step], [cost]]),
        front,
        costs,
    )
    assert (gains[1:] >= gains[0] - 1e-12).all()
    assert (gains >= 0).all()
