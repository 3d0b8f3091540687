"""The searcher, the study and the tables, driven as Tune drives them; no cluster, and no training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from driven_search import Search, content, rows
from optuna.trial import TrialState
from ray.tune.search import Searcher

from rlsearch.errors import RunFolderError, SearchError
from rlsearch.results.tables import epochs_path, read_epochs, read_trials
from rlsearch.search.outcome import Outcome
from rlsearch.search.prepare import Prepared, prepare
from rlsearch.search.scheduler import Racing
from rlsearch.search.searcher import StopSearch
from rlsearch.search.settings import SearchSettings
from rlsearch.search.space import parse_space
from rlsearch.search.study import RunStudy


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(parse_space(content()))


@pytest.fixture
def search(tmp_path: Path, prepared: Prepared) -> Search:
    return Search(tmp_path / "run", prepared)


def test_the_baseline_and_the_controls_come_first_and_the_target_ends_the_search(search: Search) -> None:
    assert [search.start(str(number)) for number in range(8)] == list(range(8))
    origins = [trial.user_attrs["origin"] for trial in search.study.study.trials]
    assert origins == ["baseline", "skip control", "freeze control", *["sampler"] * 5]
    assert search.states() == ["RUNNING"] * 8
    assert search.searcher.suggest("one too many") == Searcher.FINISHED
    assert search.searcher.why_ended is None
    hashes = [trial.user_attrs["policy_hash"] for trial in search.study.study.trials]
    assert len(set(hashes)) == 8


def test_a_complete_trial_is_in_the_study_the_tables_and_tensorboard(search: Search) -> None:
    number = search.start("a")
    search.folder.checkpoints(number).mkdir(parents=True)
    (search.folder.checkpoints(number) / "last.pt").write_bytes(b"state")
    search.end("a", accuracy=0.91)
    trial = search.study.study.trials[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [0.91, 272_474, 1e10]
    (record,) = read_trials(search.folder.trials_path)
    assert (record.trial, record.state, record.origin, record.fidelity) == (0, "COMPLETE", "baseline", 2)
    assert (record.accuracy, record.params, record.memory, record.device) == (0.91, 272_474, 9_000_000, "cpu")
    assert record.policy_hash == trial.user_attrs["policy_hash"]
    assert json.loads(record.training)["epochs"] == 2
    assert record.started is not None
    assert record.ended is not None
    assert record.started <= record.ended
    assert [row["accuracy"] for row in read_epochs(epochs_path(search.folder.path, 0))] == [0.91, 0.91]
    assert search.study.records() == [record]
    assert sorted(path.name for path in (search.folder.path / "tensorboard").iterdir()) == ["trial-00000"]
    assert not (search.folder.checkpoints(number) / "last.pt").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_the_trial_and_never_reaches_the_study(search: Search, value: float) -> None:
    search.start("a")
    search.end("a", accuracy=value)
    assert search.states() == ["FAIL"]
    assert search.study.study.trials[0].values is None
    (record,) = read_trials(search.folder.trials_path)
    assert record.state == "FAIL"
    assert record.reason == f"no_result: every objective must be a finite number, but accuracy is {value}"


def test_failures_keep_their_reason_and_the_search_goes_on(search: Search) -> None:
    for trial_id in "abc":
        search.start(trial_id)
    search.end("a", state="FAIL", reason="diverged: the training loss became nan")
    search.end("b", state="INFEASIBLE", reason="out_of_memory: tried to allocate 80 GiB")
    search.searcher.on_trial_complete("c", None, error=True)
    records = read_trials(search.folder.trials_path)
    assert [record.state for record in records] == ["FAIL", "INFEASIBLE", "FAIL"]
    assert [record.reason.split(":")[0] for record in records if record.reason] == [
        "diverged",
        "out_of_memory",
        "worker_lost",
    ]
    assert records[2].fidelity == 1  # what it had reported before its process was lost
    # Running out of memory after the last epoch still is no result.
    assert search.states() == ["FAIL", "FAIL", "FAIL"]
    assert search.start("d") == 3


def test_a_trial_that_hung_says_so_with_where_it_stood(search: Search) -> None:
    number = search.start("a")
    folder = search.folder.checkpoints(number)
    folder.mkdir(parents=True)
    (folder / "hung.1.txt").write_text("")  # of a process that was killed
    (folder / "hung.2.txt").write_text("Thread 0x1 (most recent call first):\n  File model.py, line 3 in forward\n")
    search.searcher.on_trial_complete("a", None, error=True)
    (record,) = read_trials(search.folder.trials_path)
    assert (record.state, record.fidelity) == ("FAIL", 1)
    assert record.reason == "timeout: an epoch took longer than 21600 s (search.epoch_timeout)"
    assert "line 3 in forward" in search.study.study.trials[0].user_attrs["outcome"]["detail"]
    assert not folder.exists()


def test_too_many_failures_end_the_search_with_the_reason(tmp_path: Path) -> None:
    few = content(search={"trials": 8, "max_failures": 1})
    search = Search(tmp_path / "run", prepare(parse_space(few)))
    search.start("a")
    search.start("b")
    search.end("a", state="FAIL", reason="diverged: early")
    with pytest.raises(StopSearch) as stopped:
        search.end("b", state="FAIL", reason="diverged: again")
    assert isinstance(stopped.value.cause, SearchError)
    assert "more than 1 trials have failed (search.max_failures); the last one: diverged: again" in str(stopped.value)
    assert search.states() == ["FAIL", "FAIL"]


def test_a_measured_constraint_makes_a_trial_infeasible_and_steers_the_sampler(tmp_path: Path) -> None:
    bounded = prepare(parse_space(content(constraints={"accuracy": ">= 0.8", "train_flops": "<= 0.9x"})))
    search = Search(tmp_path / "run", bounded)
    for trial_id in "abc":
        search.start(trial_id)
    search.end("b", accuracy=0.95, train_flops=0.5e10)
    assert search.states() == ["RUNNING"] * 3  # 0.9x of what? The baseline has not ended yet
    search.end("a", accuracy=0.95)
    search.end("c", accuracy=0.79, train_flops=0.5e10)
    baseline, kept, broken = read_trials(search.folder.trials_path)
    assert baseline.state == "INFEASIBLE"
    assert baseline.reason == "constraint: train_flops must be <= 0.9x, is 1e+10"
    assert (kept.state, kept.reason) == ("COMPLETE", None)
    assert broken.state == "INFEASIBLE"
    assert broken.reason == "constraint: accuracy must be >= 0.8, is 0.79"
    assert search.states() == ["COMPLETE"] * 3
    trials = search.study.study.trials
    assert trials[0].constraints == pytest.approx({"accuracy": -0.15, "train_flops": 0.1e10})
    assert trials[1].constraints == pytest.approx({"accuracy": -0.15, "train_flops": -0.4e10})
    assert [trial.number for trial in search.study.study.best_trials] == [1]


def test_a_raced_out_trial_is_pruned_and_never_complete(search: Search) -> None:
    racing = _racing(search, num_known=8)
    for trial_id in "abcde":
        search.start(trial_id)
        accuracy = 0.5 if trial_id == "e" else 0.9
        assert _ask(racing, trial_id, accuracy) == ("STOP" if trial_id == "e" else "CONTINUE")
    outcome = Outcome("RUNNING", rows(1, accuracy=0.5))
    search.searcher.on_trial_complete("e", {**outcome.final, "outcome": outcome, "done": True})
    (record,) = read_trials(search.folder.trials_path)
    assert (record.trial, record.state, record.fidelity, record.accuracy) == (4, "PRUNED", 1, 0.5)
    assert record.reason is not None
    assert record.reason.startswith("raced out after epoch 1")
    assert search.states()[4] == "PRUNED"
    assert search.study.study.trials[4].values is None


def test_racing_learns_from_a_trial_that_ends(search: Search) -> None:
    racing = _racing(search, num_known=7)
    for trial_id in "abcd":  # the first three are protected
        search.start(trial_id)
    assert _ask(racing, "d", 0.5) == "CONTINUE"  # seven are too few to judge by
    search.end("a", accuracy=0.8)
    assert _ask(racing, "d", 0.5) == "STOP"


def test_a_trial_of_the_sensitivities_is_a_probe_and_no_other_is(search: Search) -> None:
    for trial_id in "abcd":
        search.start(trial_id)
    assert [search.searcher.is_probe(trial_id) for trial_id in "abcd"] == [False] * 4
    search.searcher._running["d"] = replace(search.searcher._running["d"], origin="sensitivity")
    assert search.searcher.is_probe("d")
    outcome = Outcome("RUNNING", rows(1))
    racing = _racing(search, num_known=0)
    assert _ask(racing, "d", 0.9) == "STOP"
    search.searcher.on_trial_complete("d", {**outcome.final, "outcome": outcome, "done": True})
    search.end("a")
    assert search.states() == ["COMPLETE", "RUNNING", "RUNNING", "PRUNED"]


def test_no_trial_starts_after_the_time_budget(tmp_path: Path, prepared: Prepared) -> None:
    def within(seconds: float) -> Prepared:
        return replace(prepared, space=replace(prepared.space, search=SearchSettings(time_budget=seconds)))

    in_time = Search(tmp_path / "in time", within(600.0))
    assert in_time.start("a") == 0
    late = Search(tmp_path / "late", within(1e-9))
    assert late.searcher.suggest("a") == Searcher.FINISHED
    assert late.searcher.why_ended == "the time budget is spent"
    assert late.searcher.resume_with == "--time-budget 2h"
    assert late.states() == []


def test_an_exhausted_space_ends_the_search_and_says_so(tmp_path: Path) -> None:
    tiny = content(space={"replacement": {"units": "layer1.1", "blocks": ["skip"], "max_fraction": 1.0}})
    search = Search(tmp_path / "run", prepare(parse_space(tiny)))
    assert [search.start(trial_id) for trial_id in "ab"] == [0, 1]
    assert search.searcher.suggest("c") == Searcher.FINISHED
    assert search.searcher.why_ended is not None
    assert "no further policy" in search.searcher.why_ended


def test_an_interrupted_search_proposes_what_a_straight_one_does(tmp_path: Path, prepared: Prepared) -> None:
    straight = Search(tmp_path / "straight", prepared)
    for number in range(8):
        straight.start(str(number))
        assert straight.end(str(number), accuracy=0.5 + 0.05 * number) == (number == 7)
    expected = [(r.trial, r.policy_hash, r.accuracy) for r in read_trials(straight.folder.trials_path)]
    for number in range(8):  # every trial is cut short once, by a kill or by a Ctrl-C
        search = Search(tmp_path / "interrupted", prepared)
        assert search.start("cut short") == number
        if number % 2:
            assert search.searcher.release() == 1
            assert search.states()[-1] == "WAITING"
        search = Search(tmp_path / "interrupted", prepared)
        assert search.start("again") == number
        assert search.states()[-1] == "RUNNING"
        search.end("again", accuracy=0.5 + 0.05 * number)
    records = read_trials(search.folder.trials_path)
    assert [(r.trial, r.policy_hash, r.accuracy) for r in records] == expected
    assert search.states() == ["COMPLETE"] * 8
    assert search.searcher.suggest("one too many") == Searcher.FINISHED


def test_a_kill_between_the_outcome_and_the_state_is_settled(search: Search, prepared: Prepared) -> None:
    search.start("a")
    search.study._keep(search.study.study.trials[0]._trial_id, Outcome("COMPLETE", rows(2)))
    again = Search(search.folder.path, prepared)
    assert again.states() == ["COMPLETE"]
    assert again.study.study.trials[0].values == [0.9, 272_474, 1e10]
    assert [record.state for record in read_trials(again.folder.trials_path)] == ["COMPLETE"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another run"])
def test_tables_are_rebuilt_from_the_study(search: Search, prepared: Prepared, damage: str) -> None:
    for trial_id in "ab":
        search.start(trial_id)
        search.end(trial_id, accuracy=0.8)
    trials, epochs = search.folder.trials_path, epochs_path(search.folder.path, 1)
    before = (read_trials(trials), read_epochs(epochs))
    stray = epochs_path(search.folder.path, 7)
    for file in (trials, epochs):
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(file.read_bytes()[:-20])
    if damage == "of another run":
        stray.write_bytes(epochs.read_bytes())
    Search(search.folder.path, prepared)
    assert (read_trials(trials), read_epochs(epochs)) == before
    assert not stray.exists()


def test_a_file_that_cannot_be_written_ends_the_search_and_loses_nothing(search: Search, prepared: Prepared) -> None:
    search.start("a")
    (search.folder.path / "epochs").write_text("in the way")
    with pytest.raises(StopSearch) as stopped:
        search.end("a")
    assert isinstance(stopped.value.cause, OSError)
    (search.folder.path / "epochs").unlink()
    again = Search(search.folder.path, prepared)
    assert [record.accuracy for record in read_trials(again.folder.trials_path)] == [0.9]


def test_a_worker_that_finds_no_room_ends_the_search_and_its_trial_waits(search: Search, prepared: Prepared) -> None:
    search.start("a")
    with pytest.raises(StopSearch) as stopped:
        search.end("a", state="FAIL", reason="storage: last.pt: cannot be written (No space left on device)")
    assert isinstance(stopped.value.cause, SearchError)
    assert str(stopped.value).startswith("last.pt: cannot be written (No space left on device); nothing that ended is")
    assert "rlsearch resume" in str(stopped.value)
    assert search.searcher.release() == 1
    assert search.states() == ["WAITING"]
    again = Search(search.folder.path, prepared)
    assert again.start("again") == 0


def test_a_damaged_study_is_named(search: Search) -> None:
    path = search.folder.study_path
    search.start("a")
    whole = path.read_bytes()
    for damaged in (b"", b"not a database" * 100, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError, match=r"study\.db: "):
            RunStudy.open(path)
    path.write_bytes(whole)
    optuna.create_study(storage=f"sqlite:///{path}", study_name="another")
    with pytest.raises(RunFolderError, match="must hold one study, has 2"):
        RunStudy.open(path)


def test_an_outcome_survives_the_way_into_the_study_and_back() -> None:
    for outcome in (Outcome("COMPLETE", rows(2), "a note", "detail"), Outcome("FAIL", (), "no epochs")):
        assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome


def _racing(search: Search, num_known: int) -> Racing:
    """Racing of the search, which has seen trials of the baseline's costs gain 0.1 from epoch to epoch."""
    is_protected, is_probe = search.searcher.is_protected, search.searcher.is_probe
    racing = Racing(1, 2, 2, search.space.objectives, is_protected, is_probe)
    for index in range(num_known):
        first, last = rows(2, accuracy=0.6 + 0.01 * index)
        racing.remember(f"known {index}", (first, {**last, "accuracy": 0.7 + 0.01 * index}), "COMPLETE")
    search.searcher.racing = racing
    return racing


def _ask(racing: Racing, trial_id: str, accuracy: float) -> str:
    """Racing's answer after a trial's first epoch; the trial has more parameters than all others."""
    return racing.on_trial_result(
        None, _tune_trial(trial_id), {**rows(1, accuracy=accuracy, params=900_000, train_flops=9e10)[0]}
    )


def _tune_trial(trial_id: str) -> Any:
    """Tune's own record of a trial."""
    from ray.tune.experiment import Trial

    return Trial("a trainable that is never looked up", trial_id=trial_id, stub=True)
