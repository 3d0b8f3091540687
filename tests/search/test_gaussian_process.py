"""What the process says of policies that it has not seen: near the truth, and honest about how near."""

from __future__ import annotations

import numpy as np
import pytest

from rlsearch.search.gaussian_process import GaussianProcess, Points

UNITS, KINDS = 12, 4
CHAINS = np.repeat([0, 1], UNITS // 2)


def drawn(count: int, seed: int) -> Points:
    """Policies that replace a random share of the units, and one setting."""
    rng = np.random.default_rng(seed)
    replaced = rng.random((count, UNITS)) < rng.uniform(0, 0.7, (count, 1))
    return Points(np.where(replaced, rng.integers(1, KINDS, (count, UNITS)), 0), rng.random((count, 1)))


def truth(points: Points) -> np.ndarray:
    """Effects that add up, one pair that does not, and a best setting."""
    effects = np.random.default_rng(7).gamma(1.0, 0.01, (UNITS, KINDS)) * np.array([0, 1.0, 0.5, 0.7])
    added = effects[np.arange(UNITS), points.units].sum(axis=1)
    together = 0.03 * ((points.units[:, 3] > 0) & (points.units[:, 4] > 0))
    return 0.8 - added - together - 0.1 * (points.settings[:, 0] - 0.6) ** 2


def fitted(count: int, noise: float = 0.005, seed: int = 0) -> GaussianProcess:
    points = drawn(count, seed)
    values = truth(points) + np.random.default_rng(seed + 1).normal(0, noise, count)
    return GaussianProcess(points, values, np.zeros(count), KINDS, CHAINS)


def test_it_orders_what_it_has_not_seen_better_the_more_it_has() -> None:
    others = drawn(300, seed=99)
    real = truth(others)
    errors = [np.sqrt(np.mean((fitted(count).predict(others)[0] - real) ** 2)) / real.std() for count in (15, 60, 240)]
    assert errors[0] < 0.75
    assert errors[1] < 0.45
    assert errors[2] < 0.25


@pytest.mark.parametrize("count", [20, 80, 240])
def test_its_deviations_are_those_of_its_errors(count: int) -> None:
    others = drawn(400, seed=98)
    mean, deviation = fitted(count).predict(others)
    scaled = (mean - truth(others)) / deviation
    assert 0.5 < scaled.std() < 1.6


def test_it_finds_the_noise() -> None:
    assert fitted(240, noise=0.02).noise == pytest.approx(0.02, rel=0.35)
    assert fitted(240, noise=0.004).noise < 0.01


def test_a_value_that_is_said_to_be_uncertain_tells_less() -> None:
    points = drawn(40, seed=3)
    values = truth(points)
    wrong = values.copy()
    wrong[5] -= 0.2
    variances = np.zeros(40)
    trusted = GaussianProcess(points, wrong, variances, KINDS, CHAINS).predict(points)[0][5]
    variances[5] = 0.3**2
    doubted = GaussianProcess(points, wrong, variances, KINDS, CHAINS).predict(points)[0][5]
    assert abs(doubted - values[5]) < 0.5 * abs(trusted - values[5])


def test_what_was_seen_is_less_uncertain() -> None:
    points, process = drawn(60, seed=0), fitted(60)
    far = Points(np.full((1, UNITS), 2), np.zeros((1, 1)))
    assert process.predict(points)[1].max() < process.predict(far)[1][0]


def test_equal_points_without_settings_and_equal_values_are_no_trouble() -> None:
    points = Points(np.zeros((5, UNITS), dtype=np.int64), np.zeros((5, 0)))
    mean, deviation = GaussianProcess(points, np.full(5, 0.7), np.zeros(5), KINDS, CHAINS).predict(points)
    assert mean == pytest.approx(0.7, abs=1e-3)
    assert np.isfinite(deviation).all()


def test_the_same_points_give_the_same() -> None:
    others = drawn(20, seed=5)
    first, second = fitted(50).predict(others), fitted(50).predict(others)
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()
