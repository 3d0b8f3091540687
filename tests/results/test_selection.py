"""Which trials are on the front of a run, and which is the pick."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsearch.errors import RunFolderError, UserError
from rlsearch.results import baseline, candidates, front, normalised_hypervolume, read_run, record_of, select, summary
from rlsearch.results.selection import counts, policy_of
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.results.where import parse_where

TWO = {"accuracy": "maximize", "params": "minimize"}


def run_of(*records: TrialRecord, objectives: dict[str, str] | None = None) -> Run:
    return Run(folder=Path("run"), objectives=objectives or TWO, records=records)


@pytest.fixture
def four(make_record: Any) -> Run:
    """The baseline (100 parameters), a smaller one, a dominated one, and the smallest."""
    return run_of(
        make_record(0, accuracy=0.90, params=100),
        make_record(1, accuracy=0.89, params=60),
        make_record(2, accuracy=0.88, params=70),
        make_record(3, accuracy=0.70, params=50),
    )


def test_the_front_is_best_first(four: Run) -> None:
    assert [record.trial for record in front(four)] == [0, 1, 3]
    assert [record.trial for record in candidates(four)] == [0, 1, 2, 3]
    better = replace(four.records[3], trial=4, accuracy=0.95, params=200)
    assert [record.trial for record in front(replace(four, records=(*four.records, better)))] == [4, 0, 1, 3]


def test_only_complete_finite_trials_are_candidates(make_record: Any) -> None:
    run = run_of(
        make_record(0),
        make_record(1, state="INFEASIBLE", accuracy=0.99),
        make_record(2, state="PRUNED", accuracy=0.99),
        make_record(3, state="FAIL", accuracy=0.99),
        make_record(4, accuracy=float("nan")),
        make_record(5, accuracy=float("inf")),
        make_record(6, params=None),
        make_record(7, accuracy=0.5, memory=None, train_flops=float("nan"), params=1),
    )
    assert [record.trial for record in candidates(run)] == [0, 7]
    assert [record.trial for record in front(run)] == [0, 7]


def test_a_baseline_that_misses_a_constraint_is_still_the_baseline(make_record: Any) -> None:
    run = run_of(make_record(0, state="INFEASIBLE", reason="params above 0.8x"), make_record(1, params=5))
    assert baseline(run).trial == 0
    assert [record.trial for record in front(run)] == [1]
    assert baseline(run_of(make_record(0, state="INFEASIBLE", accuracy=None))) is None
    assert baseline(run_of(make_record(0, state="FAIL"))) is None
    assert baseline(run_of(make_record(0, origin="sampler"))) is None


def test_the_knee_and_its_reason(four: Run) -> None:
    selected = select(four)
    assert selected.trial == 1
    assert selected.why.startswith(
        "the knee: of the 3 trials on the front the nearest to the ideal point (distance 0.21"
    )
    assert select(four, "accuracy") == (0, "the best accuracy on the front")
    assert select(four, "params") == (3, "the best params on the front")


def test_equal_trials_go_to_the_lower_number(make_record: Any) -> None:
    same = {"accuracy": 0.95, "params": 10}
    run = run_of(make_record(0), make_record(1, **same), make_record(2, **same))
    assert [record.trial for record in front(run)] == [0, 1, 2]
    assert select(run, "params").trial == 1
    # With two objectives the two ends of a front of two are equally far from the ideal: the lower number again.
    assert select(run).trial == 0
    assert select(run_of(*run.records[1:])).trial == 1


def test_of_trials_equal_in_the_objective_the_nearest_to_the_ideal_wins(make_record: Any) -> None:
    three = TWO | {"memory": "minimize"}
    run = run_of(
        make_record(0, accuracy=0.9, params=100, memory=100),
        make_record(1, accuracy=0.5, params=50, memory=90),
        make_record(2, accuracy=0.8, params=50, memory=95),
        objectives=three,
    )
    selected = select(run, "params")
    assert selected.trial == 2
    assert selected.why == "the best params on the front; of 2 equal ones the nearest to the ideal point"


def test_one_complete_trial_is_its_own_front(make_record: Any) -> None:
    run = run_of(make_record(0))
    assert select(run) == (0, "the only trial on the front")
    assert select(run, "params").trial == 0


def test_where_takes_the_front_among_those_that_meet_it(four: Run) -> None:
    assert [record.trial for record in front(four, parse_where("params<=0.75x"))] == [1, 3]
    # Without trial 1, which is too small, trial 2 is no longer dominated.
    assert [record.trial for record in front(four, parse_where("params>60"))] == [0, 2]
    assert select(four, "accuracy", parse_where("params<0.6x")).trial == 3
    with pytest.raises(
        UserError, match=r"none of the 4 complete trials meets accuracy>=0\.95; they have accuracy from 0\.7"
    ):
        select(four, where=parse_where("accuracy>=0.95"))


def test_an_unknown_key_and_an_unknown_trial_are_named(four: Run) -> None:
    with pytest.raises(UserError, match=r"unknown objective 'acuracy'; did you mean 'accuracy'\?"):
        select(four, "acuracy")
    with pytest.raises(UserError, match="unknown objective 'memory'"):
        select(four, "memory")
    assert record_of(four, 2).accuracy == 0.88
    with pytest.raises(UserError, match="has no trial 9; it has 4 ended trials"):
        record_of(four, 9)


def test_a_run_without_a_complete_trial_says_so(make_record: Any) -> None:
    failed = make_record(0, state="FAIL", reason="diverged", accuracy=None)
    with pytest.raises(RunFolderError, match=r"no trial is complete.*: 2 FAIL \(reasons: diverged × 2\)"):
        select(run_of(failed, replace(failed, trial=1)))
    with pytest.raises(RunFolderError, match=r"no trial is complete, so there is no front: none has ended$"):
        summary(run_of())
    assert front(run_of(failed)) == []
    assert normalised_hypervolume(run_of(failed)) is None


def test_the_summary_is_the_contract(run_folder: Path) -> None:
    run = read_run(run_folder)
    content = json.loads(json.dumps(summary(run), allow_nan=False))
    names = ["objectives", "baseline", "front", "counts", "hypervolume", "selected", "racing", "noise", "unit_effects"]
    assert list(content) == names
    assert content["objectives"] == dict(run.objectives)
    assert content["baseline"] == {
        "trial": 0,
        "values": {"accuracy": 0.9741, "params": 466_906, "memory": 61_400_000, "train_flops": 1.113e12},
        "packed": None,
        "confirmed": None,
    }
    assert content["counts"] == counts(run) == {"COMPLETE": 21, "PRUNED": 1, "FAIL": 1, "INFEASIBLE": 1}
    assert [item["trial"] for item in content["front"]] == [record.trial for record in front(run)]
    for item in content["front"]:
        assert set(item) == {"trial", "policy", "values", "learn_drop", "packed", "confirmed"}
        assert set(item["values"]) == set(run.objectives)
        policy = policy_of(record_of(run, item["trial"]))
        assert item["policy"] == policy.to_dict()
        assert (item["learn_drop"] is None) == (policy.learn_drop is None)
    assert content["selected"] == dict(zip(("trial", "why"), select(run), strict=True))
    assert 0 < content["hypervolume"] < 1


def test_the_summary_without_a_baseline(make_record: Any) -> None:
    content = summary(run_of(make_record(1), make_record(2, params=5)))
    assert content["baseline"] is None
    assert content["hypervolume"] is None
    assert [item["trial"] for item in content["front"]] == [2]


def test_a_policy_that_cannot_be_read_names_its_trial(make_record: Any) -> None:
    for text in ("{", "[]", '{"schema": "rlsearch.policy/1", "replacement": []}'):
        with pytest.raises(RunFolderError, match="trial 3: its policy cannot be read"):
            policy_of(replace(make_record(3), policy=text))


def test_the_hypervolume_by_hand(make_record: Any) -> None:
    start = make_record(0, accuracy=0.9, params=100)
    # The baseline alone: 0.9 of the accuracy axis times what lies between 100 and the reference of 110.
    assert normalised_hypervolume(run_of(start)) == pytest.approx(0.9 * (1 - 100 / 110))
    half = make_record(1, accuracy=0.8, params=55)
    expected = 0.8 * (1 - 55 / 110) + 0.1 * (1 - 100 / 110)
    assert normalised_hypervolume(run_of(start, half)) == pytest.approx(expected)
    # What costs more than the reference adds nothing, however accurate it is.
    assert normalised_hypervolume(run_of(start, make_record(1, accuracy=1.0, params=111))) == pytest.approx(
        normalised_hypervolume(run_of(start))
    )


def test_the_hypervolume_of_a_speed(make_record: Any) -> None:
    speed = {"accuracy": "maximize", "samples_per_second": "maximize"}
    start = make_record(0, accuracy=0.8, samples_per_second=100.0)
    assert normalised_hypervolume(run_of(start, objectives=speed)) == pytest.approx(0.8 * 0.5)
    faster = make_record(1, accuracy=0.8, samples_per_second=300.0)
    assert normalised_hypervolume(run_of(start, faster, objectives=speed)) == pytest.approx(0.8 * 0.75)


VALUES = st.tuples(st.floats(0, 1), st.integers(0, 200), st.integers(0, 10**12))


@given(st.lists(VALUES, min_size=1, max_size=8))
def test_the_hypervolume_stays_in_its_range_and_only_grows(values: list[tuple[float, int, int]]) -> None:
    three = TWO | {"train_flops": "minimize"}
    records = [
        TrialRecord(
            trial=number,
            state="COMPLETE",
            policy="{}",
            policy_hash="",
            seed=0,
            origin="baseline" if number == 0 else "sampler",
            accuracy=accuracy,
            params=params,
            train_flops=flops,
        )
        for number, (accuracy, params, flops) in enumerate(values)
    ]
    volumes = [normalised_hypervolume(run_of(*records[:end], objectives=three)) for end in range(1, len(records) + 1)]
    assert all(0 <= volume <= 1 for volume in volumes)
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(volumes))
