"""What ends a search before it has all its trials: GPU time, and a front that no longer grows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from test_searcher import Search, content

from rlsearch.errors import ConfigError, UserError
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.search.prepare import Prepared, prepare
from rlsearch.search.settings import SearchSettings
from rlsearch.search.space import parse_space
from rlsearch.search.stopping import StoppingRules, check_gpu_hours, go_on, recent_gain, stopping_warning
from rlsearch.search.study import RunStudy

OBJECTIVES = {"accuracy": "maximize", "params": "minimize"}
RULES = {"trials": 20, "startup_trials": 2, "min_gain": 0.01, "gain_window": 3}
STARTED = datetime(2026, 11, 20, tzinfo=UTC)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(parse_space(content(search=RULES)))


@pytest.fixture
def study(tmp_path: Path) -> RunStudy:
    return RunStudy.create(tmp_path / "study.db", "study", {"objectives": OBJECTIVES}, 10)


def ended(
    trial: int, accuracy: float, state: str = "COMPLETE", params: int = 100, at: int | None = None
) -> TrialRecord:
    """A trial that ended at minute ``at``."""
    return TrialRecord(
        trial=trial,
        state=state,
        policy="{}",
        policy_hash="",
        seed=0,
        origin="sampler" if trial else "baseline",
        accuracy=accuracy,
        params=params,
        ended=STARTED + timedelta(minutes=trial if at is None else at),
    )


def gain(records: Sequence[TrialRecord], window: int) -> float | None:
    return recent_gain(Run(Path(), OBJECTIVES, records=tuple(records)), window)


def test_the_gain_is_the_share_of_the_hypervolume_that_the_last_trials_brought() -> None:
    # A baseline of 100 parameters: each trial as large dominates its accuracy times 1 - 1 / 1.1.
    records = [ended(0, 0.4), ended(1, 0.5), ended(2, 0.8)]
    assert gain(records, 1) == pytest.approx(1 - 0.5 / 0.8)
    assert gain(records, 2) == pytest.approx(1 - 0.4 / 0.8)
    # Without the last three nothing is left on the front, but the baseline still is the scale.
    assert gain(records, 3) == 1.0
    assert gain([*records, ended(3, 0.7)], 1) == 0.0


def test_the_last_trials_are_those_that_ended_last_and_count() -> None:
    records = [ended(0, 0.4), ended(1, 0.8, at=9), ended(2, 0.5)]
    assert gain(records, 1) == pytest.approx(1 - 0.5 / 0.8)
    others = [ended(3, 0.9, "FAIL", at=10), ended(4, 0.9, "INFEASIBLE", at=11)]
    assert gain([*records, *others], 1) == gain(records, 1)
    assert gain([*records, ended(3, 0.9, "PRUNED", at=10)], 1) == 0.0


def test_there_is_no_gain_to_speak_of_without_a_baseline_or_a_front() -> None:
    assert gain([ended(1, 0.5), ended(2, 0.6)], 1) is None
    assert gain([ended(0, 0.4, "INFEASIBLE")], 1) is None  # it missed a constraint, and nothing else is there


def test_a_thousand_trials_take_well_under_fifty_milliseconds() -> None:
    records = [ended(i, 0.3 + 0.0006 * i, params=40 + i % 97 + i // 20) for i in range(1000)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        gain(records, 20)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def run_until_it_ends(search: Search, accuracies: Sequence[float]) -> int:
    """Trains one after the other; how many trials were started before the search ended."""
    for count, accuracy in enumerate(accuracies):
        if search.searcher.suggest(f"trial {count}") == Searcher.FINISHED:
            return count
        search.end(f"trial {count}", accuracy=accuracy)
    pytest.fail(f"it did not end after {len(accuracies)} trials")


def test_a_front_that_no_longer_grows_ends_the_search(tmp_path: Path, prepared: Prepared) -> None:
    growing = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    search = Search(tmp_path / "run", prepared)
    # Never before the startup trials and a window; then once three trials in a row have brought less than 1 %.
    assert run_until_it_ends(search, [*growing, 0.801, 0.802, 0.803, 0.9]) == 9
    told = "the last 3 trials added less than 1 % to the front's hypervolume (search.min_gain)"
    assert (search.searcher.why_ended, search.searcher.resume_with) == (told, "--trials +50")
    flat = Search(tmp_path / "flat", prepared)
    assert run_until_it_ends(flat, [0.5] * 8) == 5


def test_what_runs_when_the_front_no_longer_grows_goes_on_to_its_end(tmp_path: Path, prepared: Prepared) -> None:
    search = Search(tmp_path / "run", prepared)
    for trial_id in "abcdef":
        search.start(trial_id)
    overs = [search.end(trial_id, accuracy=0.5) for trial_id in "abcde"]
    assert search.searcher.suggest("g") == Searcher.FINISHED
    assert overs == [False] * 5
    assert search.end("f", accuracy=0.95)  # the last one that ran: now it is over
    # What it brought does not set the search going again.
    again = Search(tmp_path / "run", prepared)
    assert again.searcher.suggest("h") == Searcher.FINISHED
    assert again.searcher.resume_with == "--trials +50"


def test_a_trial_cut_short_is_taken_up_again_before_the_search_counts_as_settled(
    tmp_path: Path, prepared: Prepared
) -> None:
    search = Search(tmp_path / "run", prepared)
    for trial_id in "abcdef":
        search.start(trial_id)
    for trial_id in "abcde":
        search.end(trial_id, accuracy=0.5)
    assert search.searcher.suggest("g") == Searcher.FINISHED
    search.searcher.release()
    again = Search(tmp_path / "run", prepared)
    assert again.start("f") == 5
    assert again.searcher.suggest("g") == Searcher.FINISHED


def test_a_resume_that_asks_for_more_goes_on_for_another_window(tmp_path: Path, prepared: Prepared) -> None:
    search = Search(tmp_path / "run", prepared)
    assert run_until_it_ends(search, [0.5] * 8) == 5
    assert go_on(search.study, False, None).settled  # one that does not finds it settled still
    search.study.stopping = asdict(go_on(search.study, True, None))
    again = Search(tmp_path / "run", prepared)
    assert again.start("f") == 5
    again.end("f", accuracy=0.5)
    # A resume after a Ctrl-C does not begin the window anew.
    last = Search(tmp_path / "run", prepared)
    assert run_until_it_ends(last, [0.5] * 4) == 2
    assert len(last.searcher.records) == 8


def test_gpu_time_ends_the_search_over_all_its_sessions(tmp_path: Path, prepared: Prepared) -> None:
    def limited(gpu_hours: float) -> Prepared:
        settings = SearchSettings(trials=20, gpu_hours=gpu_hours)
        return replace(prepared, space=replace(prepared.space, search=settings))

    search = Search(tmp_path / "run", limited(1.0), gpus=0.5)
    assert [search.start(trial_id) for trial_id in "ab"] == [0, 1]
    time.sleep(0.2)
    search.end("a")
    assert search.start("c") == 2
    assert search.searcher.release() == 2  # what they have spent counts all the same
    spent = search.rules.gpu_hours_spent
    assert spent > 0.2 / 3600  # two trials of at least 0.2 seconds on half a GPU each
    again = Search(tmp_path / "run", limited(spent + 0.1 / 3600), gpus=2.0)
    assert again.rules.gpu_hours_spent == pytest.approx(spent)
    assert again.start("b") == 1
    time.sleep(0.06)  # it runs still
    assert again.searcher.suggest("c") == Searcher.FINISHED  # not even what waits is taken up
    assert again.searcher.why_ended is not None
    assert " GPU hours are spent, the limit is 0.000" in again.searcher.why_ended
    assert again.searcher.why_ended.endswith(" (search.gpu_hours)")
    assert again.searcher.resume_with == "--gpu-hours +10"
    assert again.end("b")
    assert again.states() == ["COMPLETE", "COMPLETE", "WAITING"]

    kept = go_on(again.study, False, "+10")
    assert kept.gpu_hours == pytest.approx(10, abs=1e-3)
    again.study.stopping = asdict(kept)
    assert Search(tmp_path / "run", limited(kept.gpu_hours or 0.0), gpus=2.0).start("c") == 2


def test_without_a_gpu_no_gpu_time_is_spent(study: RunStudy) -> None:
    rules = StoppingRules(SearchSettings(gpu_hours=1e-9), study)
    rules.trial_started(0)
    time.sleep(0.01)
    rules.trial_ended(0)
    assert rules.gpu_hours_spent == 0.0
    assert study.stopping == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("many", "--gpu-hours: must be a number, or one with a plus for so many more, got 'many'"),
        ("-3", "--gpu-hours: must be a number, or one with a plus for so many more, got '-3'"),
        ("2", "--gpu-hours: must be above the 2 that the run has spent, got 2; [+]10 adds ten"),
        ("+0", "--gpu-hours: must be above the 2 that the run has spent, got [+]0"),
    ],
)
def test_a_limit_that_is_none_is_told(study: RunStudy, text: str, told: str) -> None:
    study.stopping = {"gpu_seconds": 7200.0}
    with pytest.raises(UserError, match=told):
        go_on(study, False, text)
    assert [go_on(study, False, good).gpu_hours for good in ("2.5", "+.5", "+10")] == [2.5, 2.5, 12.0]


def test_a_limit_on_gpu_time_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(ConfigError, match=r"search\.gpu_hours: limits GPU time, but trials take no GPU here"):
        check_gpu_hours(SearchSettings(gpu_hours=3.0), 0.0)
    check_gpu_hours(SearchSettings(gpu_hours=3.0), 0.125)
    check_gpu_hours(SearchSettings(), 0.0)


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [({"trials": 24}, True), ({"trials": 25}, False), ({"trials": 9, "min_gain": None}, False)],
)
def test_a_rule_that_cannot_act_is_warned_about(settings: dict[str, Any], is_warned: bool) -> None:
    told = stopping_warning(SearchSettings(**{"min_gain": 0.001, **settings}))
    assert (told is not None) == is_warned
    if told is not None:
        assert told.startswith("search.min_gain looks at the front after 24 trials at the earliest")
