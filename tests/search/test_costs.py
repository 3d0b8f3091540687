"""Which constraints a policy's exact costs decide before it trains."""

from __future__ import annotations

import pytest

from rlsearch import LearnDrop, Policy, Replacement, TrainingSpec, build_model
from rlsearch.results.tables import METRICS
from rlsearch.search.constraints import EXACT_METRICS, parse_constraints
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.space import parse_space

MEASURED = ("forward_share", "mean_learnable_params")


def test_what_learn_drop_saves_is_only_known_after_training() -> None:
    assert set(MEASURED) <= set(METRICS) - set(EXACT_METRICS)
    bounds = {"forward_share": "<= 0.5", "mean_learnable_params": "<= 0.1x", "params": "<= 0.99x"}
    constraints = parse_constraints(bounds, "constraints", [])
    assert [constraint.metric for constraint in constraints] == list(bounds)
    costs, training = ExactCosts(build_model("resnet20"), (3, 8, 8)), TrainingSpec(batch_size=8)
    hard = HardConstraints(constraints, costs, Policy(), training)
    policy = Policy(replacements=(Replacement("layer1.1", "skip"),), learn_drop=LearnDrop())
    assert list(hard.violations(policy, training)) == ["params"]
    assert hard.met(policy, training)
    assert not hard.met(Policy(), training)


@pytest.mark.parametrize("metric", MEASURED)
def test_they_may_be_objectives_to_minimise(metric: str) -> None:
    content = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "objectives": {"accuracy": "maximize", metric: "minimize"},
        "space": {"replacement": {"blocks": ["skip"]}},
    }
    assert dict(parse_space(content).objectives) == {"accuracy": "maximize", metric: "minimize"}
