"""What a search shows: counts, the best, and an honest guess of the time left."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rlsearch import Policy, TrainingSpec
from rlsearch.search import progress as module
from rlsearch.search.progress import SearchProgress
from rlsearch.search.study import PlannedTrial

OBJECTIVES = {"accuracy": "maximize", "params": "minimize"}


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_time_left_is_the_pace_of_trials_that_run_side_by_side(clock: Clock, make_record: Any) -> None:
    """Two at once, each of 60 seconds: eight trials take 240 seconds."""
    shown = SearchProgress(Console(file=io.StringIO()), OBJECTIVES, total=8)
    planned = [PlannedTrial(number, Policy(), TrainingSpec(), 0, "sampler") for number in range(8)]
    records = []
    shown.trial_started(planned[0])
    shown.trial_started(planned[1])
    assert shown.seconds_left() is None
    clock.now += 60
    for number in (0, 1):
        records.append(make_record(number))
        shown.trial_ended(records[-1], records)
        shown.trial_started(planned[number + 2])
    assert shown.seconds_left() == pytest.approx(180)
    clock.now += 30
    assert shown.seconds_left() == pytest.approx(150)
    clock.now += 30
    for number in (2, 3, 4, 5, 6, 7):
        records.append(make_record(number))
        shown.trial_ended(records[-1], records)
    assert shown.seconds_left() == 0


def test_a_line_a_trial_where_there_is_no_terminal(make_record: Any) -> None:
    output = io.StringIO()
    with SearchProgress(Console(file=output, width=200), OBJECTIVES, total=3) as shown:
        records = [make_record(0, accuracy=0.9), make_record(1, accuracy=0.95)]
        shown.trial_ended(records[0], records[:1])
        shown.trial_ended(records[1], records)
        failed = make_record(2, state="FAIL", reason="diverged", accuracy=None)
        shown.trial_ended(failed, [*records, failed])
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("trial 0: COMPLETE 90.00 % end-to-end (1 of 3 trials done")
    assert "best accuracy 95.00 % (trial 1)" in lines[1]
    assert lines[2].startswith("trial 2: FAIL end-to-end: diverged (3 of 3 trials done, 1 failed")
