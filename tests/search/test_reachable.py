"""How near policies of a space come to a bound: against every policy, put into the model by the surgery itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_policy_space import chain_of, inside, space_of
from torch import nn

from rlsearch.errors import ConfigError
from rlsearch.policy import Policy
from rlsearch.replacement import apply_policy, learnable_params, total_params
from rlsearch.results.describe import describe_value
from rlsearch.search.check import build_unallocated
from rlsearch.search.costs import ExactCosts
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.reachable import Reach, least_found

SMALL = {"units": ["layer1.*", "layer2.*"], "blocks": ["skip", "scalar"], "max_fraction": 0.5}

replacements = st.fixed_dictionaries(
    {
        "units": st.sampled_from(["*", "[1-9]", ["0", "1", "2", "4"]]),
        "blocks": st.lists(
            st.sampled_from(["skip", "scalar", "channel", "lowrank", "project"]), min_size=1, max_size=2, unique=True
        ),
        "max_fraction": st.sampled_from([0.25, 0.5, 1.0]),
        "options": st.sampled_from(
            [
                {},
                {"sources": "nearest"},
                {"sources": "nearest", "boundary": "keep"},
                {"sources": ["adjacent", "nearest"], "boundary": "one_sided"},
            ]
        ),
    }
).filter(lambda replacement: not replacement["options"] or replacement["blocks"] != ["skip"])
widths = st.one_of(
    st.integers(3, 5).map(lambda length: [2] * (2 * length + 1)),
    st.lists(st.sampled_from([2, 3, 5]), min_size=3, max_size=5).map(inside),
)


def reach_of(replacement: dict[str, Any], constraints: Mapping[str, str], **sections: Any) -> Reach:
    """Of ResNet-20 on images of 8 by 8."""
    space = space_of(replacement, constraints=dict(constraints), **sections)
    model = build_unallocated(space)
    return Reach(PolicySpace(space, model, (3, 8, 8)), ExactCosts(model, (3, 8, 8)))


def surgery_sizes(model: nn.Module, policy: Policy) -> tuple[int, int]:
    """Learnable and all parameters of the model with the policy in it."""
    changed = copy.deepcopy(model)
    apply_policy(changed, policy)
    return learnable_params(changed), total_params(changed)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(replacements, widths)
def test_the_least_and_the_greatest_sizes_are_those_of_all_policies(
    replacement: dict[str, Any], widths: list[int]
) -> None:
    model = chain_of(widths)
    policies = PolicySpace(space_of(replacement), model, (widths[0], 4, 4))
    reach = Reach(policies, ExactCosts(model, (widths[0], 4, 4)))
    learnable, total = zip(*(surgery_sizes(model, one.policy) for one in policies.everything()), strict=True)
    assert reach.size_range("params") == (min(learnable), max(learnable))
    assert reach.size_range("params_total") == (min(total), max(total))


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_several_chains_share_what_may_be_replaced(fraction: float) -> None:
    reach = reach_of({**SMALL, "blocks": ["skip", "lowrank"], "max_fraction": fraction}, {})
    policies, costs = reach._policies, reach._costs
    params = [costs.cost(one.policy, one.training).params for one in policies.everything()]
    assert reach.size_range("params") == (min(params), max(params))


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        (
            {"params": "<= 0.1x"},
            "constraints.params: <= 0.1x = 27,247 cannot be met: the least that a policy of this space reaches is "
            "230,682 (0.847x); raise the bound, or allow more in space.replacement (units, blocks, max_fraction)",
        ),
        ({"params": "<= 20000"}, "constraints.params: <= 20000 cannot be met: the least that a policy of this space"),
        (
            {"params_total": ">= 1.01x"},
            "constraints.params_total: >= 1.01x = 275,199 cannot be met: the greatest that a policy of this space "
            "reaches is 272,474 (1x); lower the bound",
        ),
    ],
)
def test_a_bound_that_no_policy_meets_is_told_with_the_nearest_value(constraint: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reach_of(SMALL, constraint).check()
    (problem,) = caught.value.problems
    assert str(problem).startswith(told)


def test_the_value_that_is_told_can_be_asked_for() -> None:
    assert reach_of(SMALL, {"params": "<= 0.847x", "memory": "<= 1.0x"}).check() == []
    assert reach_of(SMALL, {"params": "<= 230682", "accuracy": ">= 0.99"}).check() == []
    with pytest.raises(ConfigError, match="the least that a policy of this space reaches is 230,682"):
        reach_of(SMALL, {"params": "<= 230681"}).check()


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6, 0.8])
def test_the_share_that_is_told_can_be_asked_for(fraction: float) -> None:
    searched = {**SMALL, "max_fraction": fraction}
    with pytest.raises(ConfigError) as caught:
        reach_of(searched, {"params": "<= 0.1x", "params_total": ">= 2x"}).check()
    shares = [re.findall(r"\(([0-9.]+x)\)", problem.message)[0] for problem in caught.value.problems]
    assert reach_of(searched, {"params": f"<= {shares[0]}", "params_total": f">= {shares[1]}"}).check() == []


def test_what_does_not_add_up_is_searched_from_where_it_would_be_least_if_it_did() -> None:
    policies = reach_of({**SMALL, "max_fraction": 1.0}, {})._policies
    asked: list[int] = []

    def value(blocks: Mapping[str, str]) -> float:
        """Least where three units are replaced, and each alone is for the better."""
        asked.append(len(blocks))
        return float(abs(len(blocks) - 3))

    assert least_found(policies, value, lambda found: False) == 0
    assert max(asked) > 4
    few = reach_of({**SMALL, "max_fraction": 0.4}, {})._policies
    assert least_found(few, lambda blocks: -float(len(blocks)), lambda found: False) == -few.max_replaced == -2
    asked.clear()
    assert least_found(policies, value, lambda found: found <= 1) == 1


def test_without_replacements_the_baseline_is_all_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        reach_of({}, {"params": "<= 0.5x"}, space={"learn_drop": {}}).check()
    (problem,) = caught.value.problems
    assert problem.message.endswith("reaches is 272,474 (1x); raise the bound")


def test_a_bound_on_memory_brings_a_warning_with_the_least_found_and_claims_no_more() -> None:
    reach = reach_of(SMALL, {"memory": "<= 0.1x"}, training={"batch_size": [16, 64], "optimizer": ["sgd", "adamw"]})
    policies, costs, training = reach._policies, reach._costs, reach._space.training
    (warning,) = reach.check()
    of_all = min(
        costs.cost(one.policy, one.training).memory
        for one in policies.everything()
        if (one.training.batch_size, one.training.optimizer) == (16, "sgd")
    )
    baseline = costs.cost(Policy(policies.space.model), training).memory
    assert warning.startswith(
        f"constraints.memory: <= 0.1x = {describe_value('memory', 0.1 * baseline)} may be out of reach: "
    )
    assert f"the least found is {describe_value('memory', of_all)} (" in warning
    assert "cannot" not in warning


def test_a_bound_on_memory_that_a_policy_meets_is_met() -> None:
    reach = reach_of(SMALL, {"memory": "<= 0.99x"})
    assert reach.check() == []


class Tied(nn.Sequential):
    """A chain of which two layers hold one weight."""

    def __init__(self, num_classes: int = 10) -> None:
        layers = [nn.Conv2d(4, 4, 1) for _ in range(4)]
        layers[3].weight = layers[1].weight
        super().__init__(nn.Conv2d(3, 4, 1), nn.Sequential(*layers), nn.Flatten(), nn.Linear(256, num_classes))


def test_where_parameters_are_shared_sizes_do_not_add_up_and_nothing_is_claimed() -> None:
    space = space_of({"blocks": ["skip"], "max_fraction": 1.0}, constraints={"params": "<= 0.1x"})
    model = Tied()
    reach = Reach(PolicySpace(space, model, (3, 8, 8)), ExactCosts(model, (3, 8, 8)))
    assert reach.size_range("params") is None
    (warning,) = reach.check()
    # Without any of the four: the stem and the head.
    assert "may be out of reach: the least found is 2,586 (" in warning
