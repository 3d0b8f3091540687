"""Racing: who goes on at a rung, cell by cell, and how the rule is wired into Tune."""

from __future__ import annotations

import io
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from rich.console import Console

from rlsearch.results.racing import racing_figures
from rlsearch.results.tables import read_run
from rlsearch.search.cluster import ray_cluster
from rlsearch.search.outcome import Outcome
from rlsearch.search.run import resume_search, start_search
from rlsearch.search.scheduler import Racing, is_best_in_one, losses_at_rung
from rlsearch.search.space import parse_space

OBJECTIVES = ("accuracy", "params", "memory", "train_flops")
GAIN = 0.3


def metrics(accuracy: float, params: float = 100.0, epoch: int = 1, **more: Any) -> dict[str, Any]:
    usual = {"memory_predicted": 10.0, "train_flops": 7.0 * epoch, "forward_flops": 2.0 * epoch, "params_total": params}
    return {"accuracy": accuracy, "params": params, "epoch": epoch, "epochs": 9, **usual, **more}


def epochs(first: float, final: float, params: float = 100.0, **more: Any) -> list[dict[str, Any]]:
    """A whole trial: nine epochs that end at ``final``."""
    return [metrics(final if e == 9 else first + 0.01 * (e - 1), params, e, **more) for e in range(1, 10)]


def test_what_is_compared_at_a_rung() -> None:
    at_third = metrics(0.5, params=40, epoch=3)
    assert losses_at_rung(at_third, OBJECTIVES) == (-0.5, 40.0, 10.0, 7.0)
    assert losses_at_rung(at_third, ("forward_flops", "accuracy", "train_seconds")) == (-0.5, 2.0, 7.0)
    # A mean over the images so far is compared as it is.
    means = metrics(0.5, epoch=3, forward_share=0.75, mean_learnable_params=60.5)
    assert losses_at_rung(means, ("mean_learnable_params", "forward_share", "accuracy")) == (-0.5, 60.5, 0.75)
    # One measure stands for several objectives, and is compared once.
    one = ("memory", "memory_predicted", "train_flops", "samples_per_second")
    assert losses_at_rung(at_third, one) == (-0.5, 10, 7)


@pytest.mark.parametrize(
    ("losses", "others", "expected"),
    [
        ((1, 9), [(2, 3), (3, 2)], True),  # the best in the first objective, the worst in the other
        ((9, 1), [(2, 3), (3, 2)], True),
        ((2, 9), [(2, 3), (3, 2)], True),  # a tie for the best
        ((2, 4), [(1, 3), (3, 2)], False),
        ((3, 3), [(1, 4), (4, 1), (2, 2)], False),
        ((2.5, 2.5), [(2, 3), (3, 2)], False),  # dominated by none, and no end: its chance decides
        ((5, 1), [(2, 1), (3, 1)], False),  # all are equal in the second objective: it has no end
        ((5, 1), [(5, 1), (5, 1)], True),  # equal in all
        ((5, 1), [], True),
    ],
)
def test_the_ends_of_the_front(losses: Any, others: Any, expected: bool) -> None:
    assert is_best_in_one(losses, others) is expected


def racing(protected: str = "", probes: str = "", min_epochs: int = 1, trained: int = 12, noise: float = 0.0) -> Racing:
    """Racing after ``trained`` trials that went from 0.50 to 0.80, 0.51 to 0.81 and so on, each larger than the last.

    Args:
        protected: ids, each a letter.
        probes: ids, each a letter.
        min_epochs: the first rung.
        trained: how many.
        noise: how far every other trial ends above that, and the others below.
    """
    scheduler = Racing(min_epochs, 3, 9, OBJECTIVES, protected.__contains__, probes.__contains__)
    for index in range(trained):
        first = 0.5 + 0.01 * index
        final = first + GAIN + noise * (-1) ** index
        scheduler.remember(f"trained {index}", epochs(first, final, 100.0 + index), "COMPLETE")
    return scheduler


def ask(scheduler: Racing, trial_id: str, result: dict[str, Any]) -> str:
    return scheduler.on_trial_result(None, Trial("rule", trial_id=trial_id, stub=True), result)


def test_a_trial_without_a_chance_is_stopped_and_told_why() -> None:
    scheduler = racing()
    assert ask(scheduler, "bad", metrics(0.3, 200)) == "STOP"
    reason = "raced out after epoch 1: its chance to improve the front is 0.0%, below 5%"
    assert scheduler.raced_out == {"bad": reason}


@pytest.mark.parametrize(
    ("accuracy", "params", "expected"),
    [
        (0.3, 99, "CONTINUE"),  # the smallest of all, however inaccurate
        (0.3, 100, "CONTINUE"),  # as small as the smallest
        (0.7, 900, "CONTINUE"),  # the most accurate, however large
        (0.61, 900, "CONTINUE"),  # as accurate as the most accurate
        (0.7, 50, "CONTINUE"),  # it dominates all others
        (0.3, 200, "STOP"),  # all others dominate it
        (0.555, 105.5, "CONTINUE"),  # dominated by none: it ends above all that are smaller
        (0.52, 104, "STOP"),  # trials smaller than it end better
        (0.545, 104, "CONTINUE"),  # dominated by none
        # Dominated by none at its rung, but no finished trial of its size has ended so low.
        (0.5399, 103.9, "CONTINUE"),
    ],
)
def test_who_goes_on(accuracy: float, params: float, expected: str) -> None:
    assert ask(racing(), "newcomer", metrics(accuracy, params)) == expected


def test_noise_lets_go_on_what_would_be_stopped_without_it() -> None:
    behind = metrics(0.51, 104)
    assert ask(racing(noise=0.0), "behind", behind) == "STOP"
    assert ask(racing(noise=0.03), "behind", behind) == "CONTINUE"
    assert ask(racing(noise=0.03), "far behind", metrics(0.3, 200)) == "STOP"


values = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(0, 3).map(float)
histories = st.lists(
    st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(90, 110), st.booleans(), st.booleans()), max_size=40
)


def raced(history: list[tuple[int, int, int, bool, bool]]) -> Racing:
    """Racing after trials of (accuracy at first, at the end, parameters, trained in full, with Learn&Drop)."""
    scheduler = Racing(1, 2, 9, OBJECTIVES, lambda trial_id: False)
    for index, (first, final, params, ended, drops) in enumerate(history):
        rows = epochs(first / 10, final / 10, params, learning=["head"] if drops else [])
        state, rows = ("COMPLETE", rows) if ended else ("PRUNED", rows[:1])
        scheduler.remember(str(index), rows, state)
    return scheduler


@given(histories, st.booleans())
def test_a_newcomer_that_dominates_all_others_is_never_stopped(history: Any, drops: bool) -> None:
    best = metrics(
        max([first / 10 for first, *_ in history], default=0.5),
        min([params for _, _, params, *_ in history], default=100),
        learning=["head"] if drops else [],
    )
    assert ask(raced(history), "equal to the best", best) == "CONTINUE"
    better = best | {"accuracy": best["accuracy"] + 0.01, "params": best["params"] - 1}
    assert ask(raced(history), "better", better) == "CONTINUE"


@given(histories, st.integers(0, 10), st.integers(90, 110))
def test_equal_trials_are_treated_alike(history: Any, accuracy: int, params: int) -> None:
    scheduler = raced(history)
    first = ask(scheduler, "first", metrics(accuracy / 10, params))
    if len(history) > 1:  # where it is not among the first, whom nothing can be compared with
        assert ask(scheduler, "second", metrics(accuracy / 10, params)) == first


@given(histories, st.integers(0, 10), st.integers(90, 110))
def test_a_worse_trial_never_outlives_a_better_one(history: Any, accuracy: int, params: int) -> None:
    good, bad = metrics(accuracy / 10, params), metrics((accuracy - 1) / 10, params + 1)
    assert ask(raced(history), "good", good) == "CONTINUE" or ask(raced(history), "bad", bad) == "STOP"


def test_too_few_trials_stop_nothing() -> None:
    alone = Racing(1, 3, 9, OBJECTIVES, lambda trial_id: False)
    assert ask(alone, "alone", metrics(0.1)) == "CONTINUE"
    for trained in range(8):
        assert ask(racing(trained=trained), "bad", metrics(0.1, 900)) == "CONTINUE"
    assert ask(racing(trained=8), "bad", metrics(0.1, 900)) == "STOP"


def test_fewer_than_eta_at_a_rung_go_on() -> None:
    scheduler = Racing(1, 20, 9, OBJECTIVES, lambda trial_id: False)
    for index in range(18):
        scheduler.remember(str(index), epochs(0.5 + 0.01 * index, 0.8 + 0.01 * index, 100.0 + index), "COMPLETE")
    assert ask(scheduler, "the nineteenth", metrics(0.3, 200)) == "CONTINUE"
    assert ask(scheduler, "the twentieth", metrics(0.3, 200)) == "STOP"


def test_the_baseline_and_the_controls_are_never_stopped() -> None:
    scheduler = racing(protected="b")
    assert ask(scheduler, "b", metrics(0.1, 900)) == "CONTINUE"
    assert scheduler.raced_out == {}


def test_a_probe_stops_at_the_first_rung_whatever_it_shows() -> None:
    scheduler = racing(probes="p", protected="p", min_epochs=2)
    assert ask(scheduler, "p", metrics(0.99, 1)) == "CONTINUE"
    assert ask(scheduler, "p", metrics(0.99, 1, epoch=2)) == "STOP"
    reason = "probe: trained 2 of 9 epochs to learn which layers bear replacing"
    assert scheduler.raced_out == {"p": reason}
    # One that has diverged; one whose process was lost after the rung, so that its checkpoint is past it.
    assert ask(racing(probes="p"), "p", metrics(math.nan)) == "STOP"
    assert ask(racing(probes="p"), "p", metrics(0.9, epoch=2)) == "STOP"


def test_between_rungs_and_at_the_end_nothing_is_stopped() -> None:
    scheduler = racing(min_epochs=3)
    for epoch in (1, 2, 4, 8, 9):
        assert ask(scheduler, "bad", metrics(0.1, 900, epoch)) == "CONTINUE"
    assert ask(scheduler, "bad", metrics(0.1, 900, 3)) == "STOP"


def test_rungs_do_not_mix() -> None:
    """An accuracy after one epoch that would be hopeless after three is judged by those after one."""
    scheduler = Racing(1, 3, 9, OBJECTIVES, lambda trial_id: False)
    for index in range(12):
        rows = epochs(0.5 + 0.01 * index, 0.8 + 0.01 * index, 100.0 + index)
        rows[2] |= {"accuracy": rows[0]["accuracy"] + 0.25}
        scheduler.remember(str(index), rows, "COMPLETE")
    assert ask(scheduler, "newcomer", metrics(0.56, 105.5, epoch=1)) == "CONTINUE"
    assert ask(scheduler, "newcomer", metrics(0.56, 105.5, epoch=3)) == "STOP"


def noisy(deviation: float) -> Racing:
    """Racing after 30 trials whose final accuracy is off the line by ``deviation``, a standard one."""
    source = random.Random(0)
    scheduler = Racing(1, 3, 9, OBJECTIVES, lambda trial_id: False)
    for index in range(30):
        first = 0.5 + 0.01 * index
        final = 0.6 + 0.3 * first + source.gauss(0, deviation)
        scheduler.remember(str(index), epochs(first, final, 100.0 + index), "COMPLETE")
    return scheduler


def stopped(scheduler: Racing, accuracies: Sequence[float]) -> list[str]:
    """The reasons of the trials that were stopped, of trials with ``accuracies`` and more parameters than others."""
    for accuracy in accuracies:
        ask(scheduler, f"{accuracy}", metrics(accuracy, 200))
    return list(scheduler.raced_out.values())


def test_racing_widens_where_a_rung_says_little_about_the_end() -> None:
    asked = [0.2 + 0.01 * step for step in range(60)]
    counts = [len(stopped(noisy(deviation), asked)) for deviation in (0.0, 0.01, 0.03, 0.1)]
    assert counts[0] > counts[1] > counts[2] > counts[3]


def test_below_a_correlation_of_half_a_chance_of_one_per_cent_is_enough() -> None:
    asked = [-1 + 0.002 * step for step in range(895)]
    for deviation, limit in ((0.01, 5), (0.03, 1)):
        reasons = stopped(noisy(deviation), asked)
        told = [re.findall(r"[\d.]+%", reason) for reason in reasons]
        assert {least for _, least in told} == {f"{limit}%"}
        assert 0.8 * limit < max(float(chance.rstrip("%")) for chance, _ in told) <= limit


def test_a_rung_that_says_the_contrary_of_the_end_stops_nothing() -> None:
    scheduler = Racing(1, 3, 9, OBJECTIVES, lambda trial_id: False)
    for index in range(12):
        scheduler.remember(str(index), epochs(0.5 + 0.01 * index, 0.9 - 0.01 * index, 100.0 + index), "COMPLETE")
    assert stopped(scheduler, [0.1 * step for step in range(10)]) == []


def test_a_trial_whose_layers_leave_is_judged_by_what_it_may_cost_in_the_end() -> None:
    """At the rung nothing has left yet: a trial may still become the cheapest of its size."""
    scheduler = Racing(1, 3, 9, ("accuracy", "train_flops"), lambda trial_id: False)
    for index in range(16):
        first, drops = 0.5 + 0.01 * index, index % 2 == 1
        rows = epochs(first, first + GAIN, learning=["head"] if drops else [], train_flops=0.0)
        spent = 100.0 + index
        for row in rows:
            row["train_flops"] = spent * row["epoch"] * (0.5 if drops and row["epoch"] == 9 else 1)
        scheduler.remember(str(index), rows, "COMPLETE")
    late = metrics(0.495, train_flops=100.5)
    assert ask(scheduler, "whole", late | {"learning": []}) == "STOP"
    assert ask(scheduler, "leaving", late | {"learning": ["head"]}) == "CONTINUE"


@pytest.mark.parametrize("state", ["PRUNED", "FAIL", "INFEASIBLE"])
def test_what_is_not_complete_is_no_bar(state: str) -> None:
    """The rule's history tells how rungs and ends go together; only complete trials are the front."""
    scheduler = racing()
    odd = epochs(0.55, 0.99, 101.0)
    scheduler.remember("odd", odd if state == "INFEASIBLE" else odd[:3], state)
    assert ask(scheduler, "newcomer", metrics(0.555, 105.5)) == "CONTINUE"


@pytest.mark.parametrize(
    "result",
    [{"done": True}, metrics(math.nan), metrics(math.inf), metrics(-math.inf), metrics(0.5, params=math.inf)],
)
def test_a_result_that_says_nothing_stops_nothing(result: dict[str, Any]) -> None:
    scheduler = racing()
    assert ask(scheduler, "odd", result) == "CONTINUE"
    if "accuracy" in result:
        scheduler.learn([*epochs(0.5, 0.8)[:-1], result | {"epoch": 9}], "COMPLETE")
    assert ask(scheduler, "most accurate", metrics(0.62, 900)) == "CONTINUE"
    assert ask(scheduler, "bad", metrics(0.3, 200)) == "STOP"


def test_a_trial_that_reports_a_rung_again_is_not_compared_with_itself() -> None:
    """Its process was lost and started again from a checkpoint before the rung."""
    scheduler = racing()
    for _ in range(2):
        assert ask(scheduler, "again", metrics(0.62, 900)) == "CONTINUE"
    assert ask(scheduler, "again", metrics(0.3, 200)) == "STOP"


def test_a_resumed_search_races_against_the_trials_of_before() -> None:
    """What goes on in one process and what another one remembers lead to the same answers."""
    straight = Racing(1, 3, 9, OBJECTIVES, lambda trial_id: False)
    for index in range(12):
        rows = epochs(0.5 + 0.01 * index, 0.8 + 0.01 * index, 100.0 + index)
        for row in rows[:-1]:
            ask(straight, f"trained {index}", row)
        straight.learn(rows, "COMPLETE")
    for newcomer in (metrics(0.3, 200), metrics(0.545, 104), metrics(0.52, 104), metrics(0.62, 900)):
        assert ask(straight, "newcomer", newcomer) == ask(racing(), "newcomer", newcomer)


def test_a_trial_that_passed_a_rung_before_an_interruption_counts_there() -> None:
    scheduler = racing()
    scheduler.remember("far ahead in the end", epochs(0.55, 0.99, 101.0), "COMPLETE")
    most_accurate = metrics(0.62, 900)
    assert ask(scheduler, "one", most_accurate) == "CONTINUE"
    before = (metrics(0.9, 300, 1), metrics(0.91, 300, 2))
    assert ask(scheduler, "resumed", before[1] | {"outcome": Outcome("RUNNING", before)}) == "CONTINUE"
    assert ask(scheduler, "two", most_accurate) == "STOP"


def test_a_decision_among_a_thousand_trials_takes_less_than_50_ms() -> None:
    scheduler = racing(trained=0)
    for index in range(1000):
        drops = ["head"] if index % 2 else []
        rows = epochs(0.5 + 0.0003 * index, 0.8 + 0.0002 * (index * 7 % 1000), 100.0 + index * 13 % 1000)
        for row in rows:
            row |= {"learning": drops, "train_flops": row["epoch"] * (1000 - index * row["epoch"] / 20)}
        scheduler.remember(str(index), rows, "COMPLETE")
    started = time.process_time()  # other processes of the machine do not count
    ask(scheduler, "newcomer", metrics(0.55, 500.5, learning=["head"]))
    assert time.process_time() - started < 0.05


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_search_on_digits_prunes_and_a_resumed_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Learning rates from far too low to right: the former are hopeless after two epochs of three."""
    folder = request.path.parent.parent / "training"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)  # the workers import tiny_net from where the driver runs
    content = {
        "model": {"name": "tiny_net:make"},
        "data": {"name": "digits", "limit": 800, "validation_fraction": 0.5},
        "training": {"epochs": 3, "batch_size": 16, "lr": {"low": 1e-5, "high": 0.1, "log": True}},
        "objectives": {"accuracy": "maximize", "params": "minimize"},
        "space": {"replacement": {"units": "units.*", "blocks": ["scalar"], "max_fraction": 0.5}},
        "search": {"trials": 11, "seed": 1, "min_epochs": 2, "startup_trials": 40, "max_concurrent": 1},
        "resources": {"cpu": 1, "gpu": 0},
    }
    console = Console(file=io.StringIO(), width=300)
    with ray_cluster():
        start_search(parse_space(content), tmp_path / "run", console=console)
        before = read_run(tmp_path / "run").records
        resume_search(tmp_path / "run", trials="+2", model="tiny_net:make", console=console)
    run = read_run(tmp_path / "run")
    for records in (before, run.records[len(before) :]):
        pruned = [record for record in records if record.state == "PRUNED"]
        assert pruned
        for record in pruned:
            assert (record.reason or "").startswith("raced out after epoch 2: its chance to improve the front is")
            assert record.fidelity == 2
            assert record.accuracy is not None
            assert record.train_flops is not None
    assert {record.state for record in run.records} == {"COMPLETE", "PRUNED"}
    assert run.records[0].state == "COMPLETE"
    (figures,) = racing_figures(run) or ()
    assert figures.stopped == sum(record.state == "PRUNED" for record in run.records)
    assert figures.trials == sum(record.state == "COMPLETE" for record in run.records)
