"""When stored features pay off, in plain numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsearch.learn_drop.payoff import CacheTimes, pays_off


@pytest.mark.parametrize(
    ("prefix", "build", "read", "remaining", "pays"),
    [
        (10.0, 20.0, 1.0, 3, True),  # 30 > 23
        (10.0, 20.0, 1.0, 2, False),  # 20 < 22
        (10.0, 18.0, 1.0, 2, False),  # 20 = 20: nothing is gained
        (10.0, 0.0, 0.0, 0, False),  # nothing is left to save
        (1.0, 0.0, 1.1, 1000, False),  # reading is slower than running
        (1.0, 2.0, 0.0, 3, True),
    ],
)
def test_the_rule(prefix: float, build: float, read: float, remaining: int, pays: bool) -> None:
    assert pays_off(CacheTimes(prefix, build, read), remaining) is pays


TIME = st.integers(0, 10**6).map(float)


@given(prefix=TIME, build=TIME, read=TIME, remaining=st.integers(0, 1000))
def test_what_pays_off_still_does_with_more_to_come(prefix: float, build: float, read: float, remaining: int) -> None:
    times = CacheTimes(prefix, build, read)
    if pays_off(times, remaining):
        assert pays_off(times, remaining + 1)
        assert not pays_off(CacheTimes(prefix, prefix * remaining, read), remaining)


@pytest.mark.parametrize("name", ["prefix_seconds", "build_seconds", "read_seconds"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_wrong_times_are_refused(name: str, value: float) -> None:
    times = {"prefix_seconds": 1.0, "build_seconds": 1.0, "read_seconds": 1.0} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} must be a finite number of at least 0, got"):
        pays_off(CacheTimes(**times), 1)


def test_fewer_epochs_than_none_are_refused() -> None:
    with pytest.raises(ValueError, match="remaining_epochs must be at least 0, got -1"):
        pays_off(CacheTimes(1.0, 1.0, 1.0), -1)
