"""A trial beside the baseline and beside its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsearch.results import control_verdicts, savings
from rlsearch.results.comparison import BEATEN, BEATS, EQUAL, MISSING, MIXED, SAME, difference
from rlsearch.results.tables import Run, TrialRecord

TWO = {"accuracy": "maximize", "params": "minimize"}


def run_of(*records: TrialRecord) -> Run:
    return Run(folder=Path("run"), objectives=TWO, records=records)


def test_accuracy_is_in_points_and_costs_in_per_cent() -> None:
    assert difference("accuracy", 0.95, 0.97) == pytest.approx(-2.0)
    assert difference("params", 80, 100) == pytest.approx(-20.0)
    assert difference("memory", 130, 100) == pytest.approx(30.0)
    for value, reference in [(None, 1), (1, None), (float("nan"), 1), (1, float("inf")), (1, 0)]:
        assert difference("params", value, reference) is None


def test_savings_cover_every_metric_that_both_have(make_record: Any) -> None:
    start = make_record(0, accuracy=0.9, params=100, memory=200, train_seconds=None)
    trial = make_record(1, accuracy=0.92, params=75, memory=220, train_seconds=4.0, params_total=None)
    found = savings(run_of(start, trial), trial)
    assert found["accuracy"] == pytest.approx(2.0)
    assert found["params"] == pytest.approx(-25.0)
    assert found["memory"] == pytest.approx(10.0)
    assert found["train_flops"] == 0
    assert not {"train_seconds", "params_total"} & found.keys()
    assert savings(run_of(trial), trial) == {}


@pytest.mark.parametrize(
    ("accuracy", "params", "verdict", "better_in"),
    [
        (0.90, 80, BEATS, ()),
        (0.91, 81, BEATS, ()),
        (0.91, 80, EQUAL, ()),
        (0.92, 90, MIXED, ("accuracy",)),
        (0.90, 70, MIXED, ("params",)),
        (0.92, 80, BEATEN, ("accuracy",)),
        (0.92, 70, BEATEN, ("accuracy", "params")),
    ],
)
def test_the_verdict_on_a_control(
    make_record: Any, accuracy: float, params: int, verdict: str, better_in: tuple[str, ...]
) -> None:
    control = make_record(1, origin="skip control", accuracy=accuracy, params=params)
    pick = make_record(3, accuracy=0.91, params=80)
    (found,) = control_verdicts(run_of(make_record(0), control, pick), pick)
    assert (found.control, found.verdict, found.better_in) == (control, verdict, better_in)


def test_a_method_that_does_not_beat_its_control_is_shown_as_not_beating_it(make_record: Any) -> None:
    skip = make_record(1, origin="skip control", accuracy=0.93, params=90)
    freeze = make_record(2, origin="freeze control", state="FAIL", accuracy=None)
    pick = make_record(3, accuracy=0.91, params=80)
    run = run_of(make_record(0), skip, freeze, pick)
    assert [verdict.sentence for verdict in control_verdicts(run, pick)] == [
        "skip control (trial 1): the pick does not beat it: the control is better in accuracy",
        "freeze control (trial 2): it did not complete (FAIL), so it says nothing",
    ]
    assert [verdict.verdict for verdict in control_verdicts(run, skip)] == [SAME, MISSING]
