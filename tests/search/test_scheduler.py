"""Racing: who goes on at a rung, and how the rule is wired into Tune."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial

from rlsearch.search.scheduler import Racing, goes_on, losses_at_rung, rungs

OBJECTIVES = ("accuracy", "params", "memory", "train_flops")


def metrics(accuracy: float, params: float = 100.0, epoch: int = 1, **more: Any) -> dict[str, Any]:
    usual = {"memory_predicted": 10.0, "train_flops": 7.0 * epoch, "forward_flops": 2.0 * epoch, "params_total": params}
    return {"accuracy": accuracy, "params": params, "epoch": epoch, "epochs": 9, **usual, **more}


@pytest.mark.parametrize(
    ("min_epochs", "eta", "epochs", "expected"),
    [
        (1, 3, 9, (1, 3)),
        (1, 3, 10, (1, 3, 9)),
        (3, 3, 30, (3, 9, 27)),
        (2, 2, 2, ()),
        (5, 2, 4, ()),
        (1, 2, 9, (1, 2, 4, 8)),
    ],
)
def test_rungs_lie_before_the_last_epoch(min_epochs: int, eta: int, epochs: int, expected: tuple[int, ...]) -> None:
    assert rungs(min_epochs, eta, epochs) == expected


def test_what_is_compared_at_a_rung() -> None:
    at_third = metrics(0.5, params=40, epoch=3)
    assert losses_at_rung(at_third, OBJECTIVES) == (-0.5, 40.0, 10.0, 7.0)
    assert losses_at_rung(at_third, ("forward_flops", "accuracy", "train_seconds")) == (-0.5, 2.0, 7.0)
    # A mean over the images so far is compared as it is.
    means = metrics(0.5, epoch=3, forward_share=0.75, mean_learnable_params=60.5)
    assert losses_at_rung(means, ("mean_learnable_params", "forward_share", "accuracy")) == (-0.5, 60.5, 0.75)
    # One measure stands for several objectives, and is compared once.
    assert losses_at_rung(at_third, ("memory", "memory_predicted", "train_flops", "samples_per_second")) == (
        -0.5,
        10,
        7,
    )


# (error, cost) of the trials that have reached the rung, drawn:
#
#   cost
#    4 |  A
#    3 |     B     D
#    2 |           C     E
#    1 |                 F
#      +--1--2--3--4--5--6-- error
A, B, C, D, E, F = (1, 4), (2, 3), (4, 2), (4, 3), (6, 2), (6, 1)


@pytest.mark.parametrize(
    ("others", "newcomer", "eta", "expected"),
    [
        # Ranks: A, B, C, F are on the front (0); D and E behind it (1).
        ((B, C, D, E, F), A, 3, True),
        ((A, B, C, D, E), F, 3, True),
        ((A, C, D, E, F), B, 3, True),
        ((A, B, C, E, F), D, 3, False),
        ((A, B, C, D, F), E, 3, False),
        # 6 / 2 = 3 places, and four are better; ceil(3 / 2) = 2 places, and two or one are better.
        ((A, B, C, E, F), D, 2, False),
        ((C, F), D, 2, False),
        ((C, E), D, 2, True),
        # A newcomer that dominates all, and one that all dominate.
        ((B, C, D, E, F), (0, 0), 3, True),
        ((A, B, C, D, E, F), (9, 9), 3, False),
        # Equals stand side by side.
        ((A, A, A), A, 3, True),
        ((D, D, D), D, 3, True),
        # The end of the front in one objective alone, however bad in the other.
        ((A, B, C, D, E, F), (0.5, 99), 3, True),
        ((A, B, C, D, E, F), (99, 0.5), 3, True),
        # Too few to tell.
        ((A,), (9, 9), 3, True),
        ((A, A), (9, 9), 3, False),
        ((), A, 2, True),
    ],
)
def test_the_dominance_table(others: tuple[Any, ...], newcomer: Any, eta: int, expected: bool) -> None:
    assert goes_on([*others, newcomer], eta) is expected


points = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=30)


@given(points, st.integers(2, 4))
def test_what_nothing_dominates_always_goes_on(losses: list[tuple[int, ...]], eta: int) -> None:
    newcomer = losses[-1]
    dominated = any(all(o <= n for o, n in zip(other, newcomer, strict=True)) and other != newcomer for other in losses)
    assert dominated or goes_on(losses, eta)
    # The ends of the front: the first by each objective, ties broken by the others.
    for column in range(3):
        order = sorted(losses, key=lambda row: (row[column], row))
        assert goes_on([*losses, order[0]], eta)


@given(points, st.integers(2, 4))
def test_a_worse_newcomer_never_outlives_a_better_one(losses: list[tuple[int, ...]], eta: int) -> None:
    *others, newcomer = losses
    worse = tuple(value + 1 for value in newcomer)
    assert goes_on([*others, newcomer], eta) or not goes_on([*others, worse], eta)


def racing(protected: tuple[str, ...] = (), min_epochs: int = 1) -> Racing:
    return Racing(min_epochs, 3, 9, OBJECTIVES, protected.__contains__)


def ask(scheduler: Racing, trial_id: str, result: dict[str, Any]) -> str:
    return scheduler.on_trial_result(None, Trial("rule", trial_id=trial_id, stub=True), result)


def test_a_trial_that_is_far_behind_is_stopped_and_told_why() -> None:
    scheduler = racing()
    for index in range(3):
        assert ask(scheduler, f"good{index}", metrics(0.9)) == "CONTINUE"
    assert ask(scheduler, "bad", metrics(0.1)) == "STOP"
    assert scheduler.raced_out == {"bad": "raced out after epoch 1: outside the better 1/3 of 4 trials"}


def test_the_baseline_and_the_controls_are_never_stopped() -> None:
    scheduler = racing(protected=("bad",))
    for index in range(3):
        ask(scheduler, f"good{index}", metrics(0.9))
    assert ask(scheduler, "bad", metrics(0.1)) == "CONTINUE"
    assert scheduler.raced_out == {}


def test_between_rungs_and_at_the_end_nothing_is_stopped() -> None:
    scheduler = racing(min_epochs=3)
    for epoch in (1, 2, 4, 9):
        for index in range(4):
            assert ask(scheduler, f"trial{index}", metrics(0.9 - 0.2 * index, epoch=epoch)) == "CONTINUE"


def test_rungs_do_not_mix() -> None:
    scheduler = racing()
    for index in range(3):
        ask(scheduler, f"trial{index}", metrics(0.9, epoch=3))
    # Accuracy after one epoch is compared with that of others after one epoch, of whom there are none.
    assert ask(scheduler, "newcomer", metrics(0.1, epoch=1)) == "CONTINUE"


def test_a_resumed_search_races_against_the_trials_of_before() -> None:
    scheduler = racing()
    for _ in range(3):
        scheduler.remember(metrics(0.9))
    assert ask(scheduler, "bad", metrics(0.1)) == "STOP"


@pytest.mark.parametrize("result", [{"done": True}, metrics(float("nan")), metrics(0.5, params=float("inf"))])
def test_a_result_that_says_nothing_stops_nothing(result: dict[str, Any]) -> None:
    scheduler = racing()
    for index in range(3):
        ask(scheduler, f"good{index}", metrics(0.9))
    assert ask(scheduler, "odd", result) == "CONTINUE"
    assert ask(scheduler, "bad", metrics(0.1)) == "STOP"
