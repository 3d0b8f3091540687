"""What every search trains first, and how many trials that takes."""

from __future__ import annotations

from typing import Any

import pytest

from rlsearch.errors import ConfigError
from rlsearch.policy import Policy
from rlsearch.search.check import build_unallocated
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.space import parse_space
from rlsearch.search.start_design import check_trials, start_design


def space_of(search: dict[str, Any], **sections: Any) -> tuple[PolicySpace, HardConstraints]:
    usual = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"]}, "learn_drop": {}},
        "search": search,
    }
    space = parse_space(usual | sections).with_num_classes(10)
    model = build_unallocated(space)
    costs = ExactCosts(model, (3, 16, 16))
    return PolicySpace(space, model, (3, 16, 16)), HardConstraints(
        space.constraints, costs, Policy(space.model), space.training
    )


def test_the_baseline_the_controls_its_seeds_then_every_unit_alone() -> None:
    design = start_design(*space_of({"baseline_seeds": 3, "sensitivities": True, "min_epochs": 1}))
    repeats = ["baseline repeat"] * 2
    assert [item.origin for item in design[:5]] == ["baseline", "skip control", "freeze control", *repeats]
    assert [item.repeat for item in design[:5]] == [0, 0, 0, 1, 2]
    assert [len(item.decided.policy.replacements) for item in design[5:]] == [1] * 7
    assert len({item.decided.policy.replacements[0].unit for item in design[5:]}) == 7
    assert {item.origin for item in design[5:]} == {"sensitivity"}


def test_controls_that_break_a_constraint_are_left_out() -> None:
    """Skipping half of the units keeps this bound; Learn&Drop saves no parameters, so its control does not."""
    design = start_design(*space_of({}, constraints={"params_total": "<= 0.9x"}))
    assert [item.origin for item in design] == ["baseline", "skip control", "baseline repeat"]


@pytest.mark.parametrize(
    ("search", "told"),
    [
        (
            {},
            "search.trials: must be at least 4, got 3: a search starts with the baseline with 2 seeds, skip control "
            "and freeze control; give more trials, or set search.baseline_seeds: 1",
        ),
        (
            {"baseline_seeds": 1, "sensitivities": True, "min_epochs": 1},
            "search.trials: must be at least 10, got 9: a search starts with the baseline, skip control, freeze "
            "control and 7 sensitivities; give more trials, or set search.sensitivities: false",
        ),
        (
            {"baseline_seeds": 1},
            "search.trials: must be at least 3, got 2: a search starts with the baseline, skip control and freeze "
            "control; give more trials",
        ),
    ],
)
def test_too_few_trials_are_told_with_what_the_start_takes(search: dict[str, Any], told: str) -> None:
    least = int(told.partition("at least ")[2].partition(",")[0])
    check_trials(*space_of({**search, "trials": least}))
    with pytest.raises(ConfigError) as raised:
        check_trials(*space_of({**search, "trials": least - 1}))
    assert told in str(raised.value)
    assert str(raised.value).endswith(told)
