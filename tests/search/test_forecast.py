"""The line from an accuracy on the way to that at the end."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlsearch.search.forecast import fit_line


def test_a_line_without_noise_is_found() -> None:
    before = np.linspace(0.3, 0.6, 40)
    line = fit_line(before, 0.2 + 0.8 * before)
    assert line is not None
    assert line.at(0.45) == pytest.approx(0.56, abs=1e-6)
    assert line.slope == pytest.approx(0.8)
    assert line.chance_above(0.57, 0.45) < 1e-6


def test_few_noisy_trials_are_trusted_less_than_many() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0.3, 0.6, 200)
    after = before + 0.2 + rng.normal(0, 0.02, 200)
    few, many = fit_line(before[:6], after[:6]), fit_line(before, after)
    assert few is not None
    assert many is not None
    assert few.chance_above(0.70, 0.45) > many.chance_above(0.70, 0.45)
    assert many.deviation(0.45) == pytest.approx(0.02, rel=0.15)
    assert many.deviation(0.9) > many.deviation(0.45)


def test_the_chance_is_students() -> None:
    rng = np.random.default_rng(1)
    before = rng.uniform(0.3, 0.6, 7)
    line = fit_line(before, before + rng.normal(0, 0.02, 7))
    assert line is not None
    bar, accuracy = 0.5, 0.48
    expected = stats.t.sf((bar - line.at(accuracy)) / line.deviation(accuracy), 5)
    assert line.chance_above(bar, accuracy) == pytest.approx(expected)


@pytest.mark.parametrize("before", [[0.1, 0.2, 0.3, 0.4], [0.5] * 10])
def test_too_few_or_equal_accuracies_have_no_line(before: list[float]) -> None:
    assert fit_line(before, before) is None
