"""The linear model of accuracies: against effects that are known, and as sure of them as it may be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rlsearch.results.additive_model import LEAST_SPARE, additive_effects

Drawn = tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def drawn(seed: int, trials: int = 60, units: int = 12, spread: float = 0.01, noise: float = 0.005) -> Drawn:
    """Which trial makes which change, a setting that matters, accuracies, and the effects behind them."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(-0.5 * spread, spread, units)
    is_changed = rng.random((trials, units)) < rng.uniform(0.1, 0.6, (trials, 1))
    settings = np.column_stack([rng.random(trials) < 0.5, rng.normal(size=trials)]).astype(np.float64)
    accuracies = 0.9 + is_changed @ effects + settings @ [-0.1, 0.03] + rng.normal(0, noise, trials)
    return is_changed, settings, accuracies, effects


def test_it_finds_the_effects_whatever_the_settings_do() -> None:
    is_changed, settings, accuracies, effects = drawn(0, trials=200, noise=0.001)
    found = additive_effects(is_changed, settings, accuracies)
    assert found is not None
    np.testing.assert_allclose(found[0], effects, atol=0.001)
    assert found[1].max() < 0.0005
    # Any column among the settings is accounted for, however large its multiple and wherever accuracy starts.
    moved = additive_effects(is_changed, settings, 3 + accuracies + 5 * settings[:, 1])
    assert moved is not None
    np.testing.assert_allclose(moved[0], found[0], atol=1e-9)
    np.testing.assert_allclose(moved[1], found[1], atol=1e-9)


@pytest.mark.parametrize("trials", [25, 60])
def test_the_standard_deviations_hold(trials: int) -> None:
    scores = []
    for seed in range(60):
        is_changed, settings, accuracies, effects = drawn(seed, trials)
        found = additive_effects(is_changed, settings, accuracies)
        assert found is not None
        scores.append((found[0] - effects) / found[1])
    distances = np.abs(np.concatenate(scores))
    assert np.mean(distances < 1) == pytest.approx(0.68, abs=0.06)
    assert np.mean(distances < 2) == pytest.approx(0.95, abs=0.03)


def test_no_effects_are_neither_found_nor_ruled_out() -> None:
    is_changed, settings, accuracies, _ = drawn(3, trials=30, spread=0.0)
    found = additive_effects(is_changed, settings, accuracies)
    assert found is not None
    assert (np.abs(found[0]) < 2 * found[1]).all()
    assert found[1].min() > 1e-4


def test_what_few_trials_show_is_thought_to_be_like_the_rest() -> None:
    rng = np.random.default_rng(0)
    is_changed = rng.random((80, 10)) < 0.4
    is_changed[:, 0] = False  # never seen at all
    accuracies = 0.9 - 0.02 * is_changed.sum(1) + rng.normal(0, 0.002, 80)
    found = additive_effects(is_changed, np.zeros((80, 0)), accuracies)
    assert found is not None
    assert found[0][0] == pytest.approx(-0.02, abs=0.005)
    assert found[1][0] > 5 * found[1][1:].max()


def test_changes_that_are_always_made_together_share_their_effect_and_are_unsure() -> None:
    rng = np.random.default_rng(0)
    one = rng.random((60, 1)) < 0.5
    others = rng.random((60, 6)) < 0.3
    accuracies = 0.9 - 0.04 * one[:, 0] + rng.normal(0, 0.002, 60)
    found = additive_effects(np.hstack([one, one, others]), np.zeros((60, 0)), accuracies)
    assert found is not None
    np.testing.assert_allclose(found[0][:2], -0.02, atol=0.004)
    assert found[1][:2].min() > 3 * found[1][2:].max()


def test_too_few_trials_say_nothing() -> None:
    is_changed, settings, accuracies, _ = drawn(0)
    least = LEAST_SPARE + 3  # the constant and two settings
    assert additive_effects(is_changed[: least - 1], settings[: least - 1], accuracies[: least - 1]) is None
    assert additive_effects(is_changed[:least], settings[:least], accuracies[:least]) is not None
    # A setting that is there twice is accounted for once.
    twice = np.hstack([settings, settings])
    assert additive_effects(is_changed[:least], twice[:least], accuracies[:least]) is not None


def test_equal_accuracies_are_no_division_by_zero() -> None:
    is_changed, settings, accuracies, _ = drawn(0)
    found = additive_effects(is_changed, settings, np.zeros_like(accuracies))
    assert found is not None
    np.testing.assert_allclose(found[0], 0, atol=1e-9)
    assert found[1].min() > 1e-6
