"""The scores are what their formulas say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsearch.learn_drop.scores import relative_changes, settled_prefix, smoothed


def test_relative_change_is_of_the_layer_as_a_whole() -> None:
    before = [[torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.ones(4)], []]
    now = [[torch.tensor([3.0, 1.5]), torch.tensor([[6.0]])], [torch.ones(4)], []]
    # ||(0, 1.5, 2)|| / ||(3, 0, 4)|| = 2.5 / 5
    assert relative_changes(now, before) == pytest.approx([0.5, 0.0, 0.0])


def test_a_layer_that_was_zero_gives_a_finite_change() -> None:
    (change,) = relative_changes([[torch.ones(1)]], [[torch.zeros(1)]])
    assert change == pytest.approx(1e12)


@given(st.floats(0.01, 100), st.floats(-0.5, 0.5))
def test_the_change_does_not_depend_on_scale(scale: float, share: float) -> None:
    before = torch.linspace(1, 2, 7, dtype=torch.float64) * scale
    (change,) = relative_changes([[before * (1 + share)]], [[before]])
    assert change == pytest.approx(abs(share), abs=1e-6)


def test_smoothing() -> None:
    assert smoothed(None, 4.0) == 4.0
    assert smoothed(4.0, 2.0, decay=0.75) == 3.5


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 5))
def test_the_settled_prefix_is_the_longest(settled_for: list[int], patience: int) -> None:
    length = settled_prefix(settled_for, patience)
    assert all(count >= patience for count in settled_for[:length])
    assert length == len(settled_for) or settled_for[length] < patience
