"""Conditions on trials, as ``--where`` takes them."""

from __future__ import annotations

from typing import Any

import pytest

from rlsearch.errors import ConfigError, UserError
from rlsearch.results.where import Condition, parse_where


def test_conditions_are_parted_by_and_or_commas() -> None:
    expected = (Condition("accuracy", ">=", 0.9), Condition("params", "<=", 0.8, relative=True))
    assert parse_where("accuracy>=0.9 and params<=0.8x") == expected
    assert parse_where(" accuracy >= .9 , params <= 8e-1x ") == expected
    assert parse_where("accuracy>=0.9 AND params<=0.8x") == expected
    assert [str(condition) for condition in expected] == ["accuracy>=0.9", "params<=0.8x"]


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("accuracy>0.9", 0.9, False),
        ("accuracy>=0.9", 0.9, True),
        ("accuracy<0.9", 0.9, False),
        ("accuracy<=0.9", 0.9, True),
        ("accuracy>0.9", None, False),
        ("accuracy<=1", float("nan"), False),
    ],
)
def test_a_condition_holds_or_not(make_record: Any, text: str, value: float | None, holds: bool) -> None:
    (condition,) = parse_where(text)
    assert condition.holds(make_record(1, accuracy=value), None) is holds


def test_x_counts_in_baselines(make_record: Any) -> None:
    (condition,) = parse_where("params<=0.5x")
    baseline = make_record(0, params=100)
    assert condition.holds(make_record(1, params=50), baseline)
    assert not condition.holds(make_record(1, params=51), baseline)
    with pytest.raises(UserError, match=r"params<=0\.5x: the run has no baseline with params"):
        condition.holds(make_record(1), None)


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy=0.9", "accuracy>=high", "0.9<=accuracy", "accuracy>=0.9;params<1", "params<1y", ","],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be METRIC, one of >= <= > <, and a number"):
        parse_where(text)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_where("acuracy>=0.9 and parms<=0.8x and memory!1")
    assert [problem.key for problem in caught.value.problems] == ["acuracy", "parms", ""]
    assert "did you mean 'accuracy'" in str(caught.value)
    assert "did you mean 'params'" in str(caught.value)
    assert "got 'memory!1'" in str(caught.value)


@pytest.mark.parametrize("metric", ["forward_share", "mean_learnable_params"])
def test_what_learn_drop_saves_can_be_asked_for(make_record: Any, metric: str) -> None:
    (absolute,), (relative,) = parse_where(f"{metric}<=0.75"), parse_where(f"{metric}<0.5x")
    baseline = make_record(0, **{metric: 2.0})
    assert absolute.holds(make_record(1, **{metric: 0.75}), baseline)
    assert not absolute.holds(make_record(1, **{metric: 0.76}), baseline)
    assert relative.holds(make_record(1, **{metric: 0.99}), baseline)
    assert not relative.holds(make_record(1, **{metric: 1.0}), baseline)
