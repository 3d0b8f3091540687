"""The scores are what their formulas say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlsearch.learn_drop.scores import (
    continuation,
    gradient_change,
    rate_ratio,
    relative_changes,
    scheduled_layers,
    settled_prefix,
    smoothed,
)

SIZES = st.floats(1e-6, 1e6)
SHARES = st.floats(0, 1)
LAYERS = st.integers(0, 60)


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


def test_the_change_of_the_gradients_by_hand() -> None:
    pairs = [(3.0, 2.0), (1.0, 2.0), (2.0, 2.0), (0.0, 0.0), (1.0, 0.0)]
    assert [gradient_change(now, before) for now, before in pairs] == pytest.approx([0.5, 0.5, 0.0, 0.0, 1e12])


@given(SIZES, SIZES, st.floats(0.01, 100))
def test_the_change_of_the_gradients_does_not_depend_on_scale(now: float, before: float, scale: float) -> None:
    change = gradient_change(now, before)
    assert change >= 0
    assert gradient_change(now * scale, before * scale) == pytest.approx(change, rel=1e-3, abs=1e-3)
    assert gradient_change(before, before) == 0.0


@given(SIZES, SHARES)
def test_the_ratio_of_rates_is_a_share(greatest: float, share: float) -> None:
    assert rate_ratio(greatest * share, greatest) == pytest.approx(share, abs=1e-9)
    assert rate_ratio(greatest, greatest) == 1.0
    assert rate_ratio(0.0, 0.0) == 0.0


def test_a_schedule_by_hand() -> None:
    # After a fifth one leaves, and then one more after every fifth.
    progress = [0.0, 0.19, 0.2, 0.39, 0.4, 0.6, 0.79, 0.8, 1.0]
    assert [scheduled_layers(p, 0.2, 4) for p in progress] == [0, 0, 1, 1, 2, 3, 3, 4, 4]


@given(SHARES, SHARES, SHARES, LAYERS)
def test_a_schedule_never_goes_back_and_stays_in_its_bounds(a: float, b: float, warmup: float, num: int) -> None:
    early, late = sorted((a, b))
    assert 0 <= scheduled_layers(early, warmup, num) <= scheduled_layers(late, warmup, num) <= num
    assert scheduled_layers(1.0, warmup, num) == num
    assert scheduled_layers(warmup, warmup, num) == (num if warmup == 1 else min(1, num))
    if early < warmup:
        assert scheduled_layers(early, warmup, num) == 0


@given(st.floats(0, 0.99), st.integers(1, 60), st.data())
def test_a_schedule_is_even(warmup: float, num: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, num - 1))
    due = warmup + (1 - warmup) * index / num
    assert scheduled_layers(due, warmup, num) == index + 1
    just_before = due - 0.01 * (1 - warmup) / num
    assert scheduled_layers(just_before, warmup, num) == index


def test_smoothing() -> None:
    assert smoothed(None, 4.0) == 4.0
    assert smoothed(4.0, 2.0, decay=0.75) == 3.5


@given(SIZES, SIZES, SHARES)
def test_an_average_lies_between_its_parts(average: float, value: float, decay: float) -> None:
    low, high = sorted((average, value))
    assert low * (1 - 1e-9) <= smoothed(average, value, decay) <= high * (1 + 1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_what_goes_on_is_a_share_that_no_scale_changes(averages: list[float], scale: float) -> None:
    greatest = max(averages)
    assume(greatest == 0 or greatest > 1e-100)
    share = continuation(averages[-1], greatest)
    assert 0 <= share <= 1
    assert continuation(greatest, greatest) == (1.0 if greatest else 0.0)
    assert continuation(averages[-1] * scale, greatest * scale) == pytest.approx(share)


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 5))
def test_the_settled_prefix_is_the_longest(settled_for: list[int], patience: int) -> None:
    length = settled_prefix(settled_for, patience)
    assert all(count >= patience for count in settled_for[:length])
    assert length == len(settled_for) or settled_for[length] < patience
