"""Which policies a space offers: exactly those that the surgery accepts, each once; and how many they are."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution
from torch import Tensor, nn

from rlsearch.errors import SurgeryError
from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.replacement import BLOCKS, plan
from rlsearch.results.describe import describe_policy
from rlsearch.search.check import build_unallocated
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.variations import random_choices

Chosen = frozenset[tuple[str, str]]
"""The replaced units, each with its variant's name."""


def space_of(replacement: dict[str, Any], **sections: Any) -> SearchSpace:
    usual = {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "space": {"replacement": replacement}}
    return parse_space({**usual, **sections})


@cache
def resnet(name: str = "resnet20") -> nn.Module:
    return build_unallocated(space_of({}, model={"name": name}))


def policies_of(replacement: dict[str, Any], **sections: Any) -> PolicySpace:
    return PolicySpace(space_of(replacement, **sections), resnet(), (3, 16, 16))


class Element(nn.Module):
    """Two layers, whose shapes fit those of a neighbour or not."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1)
        self.conv2 = nn.Conv2d(width, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x))
        return out


def chain_of(widths: list[int]) -> nn.Module:
    """Elements one behind the other: ``widths`` are those before, inside and behind each of them."""
    return nn.Sequential(*(Element(*widths[2 * index : 2 * index + 3]) for index in range(len(widths) // 2)))


def inside(widths: list[int]) -> list[int]:
    """The widths of a chain of which every element can be skipped: they differ only inside."""
    return [2, *(number for width in widths for number in (width, 2))]


def accepted(policies: PolicySpace, model: nn.Module) -> set[Chosen]:
    """Of every assignment of variants to units, those which the surgery itself finds no fault with."""
    choices = [None, *policies.variants]
    found = set()
    for assignment in itertools.product(choices, repeat=len(policies.matched)):
        chosen = [(unit, name) for unit, name in zip(policies.matched, assignment, strict=True) if name]
        variants = [(unit, policies.variants[name]) for unit, name in chosen]
        policy = Policy(replacements=tuple(Replacement(unit, one.block, one.options) for unit, one in variants))
        if len(chosen) <= policies.max_replaced and is_valid(policies, model, policy):
            found.add(frozenset(chosen))
    return found


def is_valid(policies: PolicySpace, model: nn.Module, policy: Policy) -> bool:
    try:
        plan(model, policy, policies.units)
    except SurgeryError:
        return False
    return True


def offered(policies: PolicySpace) -> set[Chosen]:
    """Every policy that the tree of decisions leads to: each once, and no parameter ever changes its choices."""
    name_of = {(one.block, tuple(sorted(one.options.items()))): name for name, one in policies.variants.items()}
    found: list[Chosen] = []
    known: dict[str, BaseDistribution] = {}
    for decided in policies.everything():
        items = [(item.unit, item.block, tuple(sorted(item.options.items()))) for item in decided.policy.replacements]
        found.append(frozenset((unit, name_of[block, options]) for unit, block, options in items))
        for name, distribution in decided.distributions.items():
            assert known.setdefault(name, distribution) == distribution
    assert len(set(found)) == len(found)
    return set(found)


def closed(valid: set[Chosen]) -> set[Chosen]:
    """Those that stay valid whichever of their replacements are taken back."""
    found: set[Chosen] = set()
    for chosen in sorted(valid, key=len):
        if all(chosen - {item} in found for item in chosen):
            found.add(chosen)
    return found


replacements = st.fixed_dictionaries(
    {
        "units": st.sampled_from(["*", "[1-9]", ["0", "1", "2", "4"]]),
        "blocks": st.lists(st.sampled_from(["skip", "scalar", "channel"]), min_size=1, max_size=2, unique=True),
        "max_fraction": st.sampled_from([0.5, 0.75, 1.0]),
        "options": st.sampled_from(
            [
                {},
                {"sources": "nearest"},
                {"sources": "nearest", "boundary": "keep"},
                {"sources": ["adjacent", "nearest"]},
                {"init": ["half", "previous"], "sources": "nearest"},
            ]
        ),
    }
).filter(lambda replacement: not replacement["options"] or replacement["blocks"] != ["skip"])
widths = st.one_of(
    st.integers(4, 5).map(lambda length: [2] * (2 * length + 1)),
    st.lists(st.sampled_from([2, 3]), min_size=4, max_size=5).map(inside),
    st.integers(3, 5).flatmap(
        lambda length: st.lists(st.sampled_from([2, 2, 3]), min_size=2 * length + 1, max_size=2 * length + 1)
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(replacements, widths)
def test_what_is_offered_is_what_the_surgery_accepts_and_its_number_is_exact(
    replacement: dict[str, Any], widths: list[int]
) -> None:
    model = chain_of(widths)
    policies = PolicySpace(space_of(replacement), model, (widths[0], 4, 4))
    valid = accepted(policies, model)
    found = offered(policies)
    assert found == closed(valid)
    assert policies.num_replacements() == len(found)
    if len(set(widths)) == 1:  # with units that are alike, nothing valid is left out
        assert found == valid


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"boundary": "keep"}, {"init": ["half", "fit"]}])
@pytest.mark.parametrize("units", ["layer1.*", ["layer1.2", "layer2.*", "layer3.0"]])
def test_the_number_of_replacements_is_exact_over_several_chains(
    fraction: float, options: dict[str, Any], units: Any
) -> None:
    replacement = {"blocks": ["skip", "scalar"], "max_fraction": fraction, "options": options, "units": units}
    policies = policies_of(replacement)
    valid = accepted(policies, resnet())
    assert offered(policies) == valid
    assert policies.num_replacements() == len(valid)


def test_parts_of_units_are_offered_for_themselves() -> None:
    replacement = {"units": "layer1.*", "roles": ["conv1", "conv2"], "blocks": ["skip", "scalar"], "max_fraction": 1.0}
    policies = policies_of(replacement)
    assert set(policies.matched) == {f"layer1.{index}.{role}" for index in range(3) for role in ("conv1", "conv2")}
    valid = accepted(policies, resnet())
    assert offered(policies) == valid
    # A role's three units: 2^3 ways to skip, and the middle one made from both others.
    assert policies.num_replacements() == len(valid) == 9**2


def test_patterns_mean_whole_units_where_no_role_is_named() -> None:
    assert policies_of({"units": "layer1.*", "blocks": ["skip"]}).matched == ("layer1.0", "layer1.1", "layer1.2")


def test_a_block_with_listed_options_is_offered_as_its_variants_and_policies_carry_their_options() -> None:
    options = {"operator": ["same", "single"], "init": "previous", "rank": [2, 4]}
    policies = policies_of({"units": "layer1.*", "blocks": ["skip", "scalar", "lowrank"], "options": options})
    names = ("skip", "scalar(operator=same)", "scalar(operator=single)")
    assert tuple(policies.variants)[:3] == names
    assert len(policies.variants) == 7
    assert set(policies.blocks["layer1.1"]) == set(policies.variants)
    (replaced,) = policies.point({"layer1.1": names[2]}, None, policies.space.training).policy.replacements
    assert (replaced.block, replaced.options) == ("scalar", {"operator": "single", "init": "previous"})


def test_what_a_source_may_not_be() -> None:
    policies = policies_of({"blocks": ["skip", "scalar"], "max_fraction": 1.0})
    assert policies.offered("layer1.1", {}) == ("skip", "scalar")
    assert policies.offered("layer1.1", {"layer1.0": "skip"}) == ("skip",)
    assert policies.offered("layer1.2", {"layer1.1": "skip"}) == ("skip",)
    assert policies.offered("layer1.2", {"layer1.1": "scalar"}) == ()


def test_with_nearest_sources_units_beside_each_other_may_be_replaced_while_an_owner_is_left_on_either_side() -> None:
    model = chain_of([2] * 9)
    policies = PolicySpace(
        space_of({"blocks": ["skip", "scalar"], "options": {"sources": "nearest"}, "max_fraction": 1.0}),
        model,
        (2, 4, 4),
    )
    assert policies.offered("2", {"1": "scalar"}) == ("skip", "scalar")
    assert policies.offered("3", {"1": "scalar", "2": "scalar"}) == ()
    assert policies.offered("3", {"1": "skip", "2": "skip"}) == ("skip",)
    # Its own sources would do, but those of the unit behind it would move to one that does not fit.
    model = chain_of([3, 3, 2, 2, 2, 2, 2, 2, 2])
    policies = PolicySpace(
        space_of({"blocks": ["skip", "scalar"], "options": {"sources": "nearest"}, "max_fraction": 1.0}),
        model,
        (3, 4, 4),
    )
    assert policies.offered("2", {}) == ("skip", "scalar")
    assert policies.offered("1", {}) == ("skip",)
    assert policies.offered("1", {"2": "scalar"}) == ()


@pytest.mark.parametrize(
    ("widths", "unit", "skipped"),
    [([2, 3, 2, 2], "2", ["1"]), ([2, 3, 2, 2, 2], "3", ["1", "2"]), ([2, 2, 2, 3, 2], "1", ["2", "3"])],
)
def test_what_would_not_stay_valid_with_a_replacement_taken_back_is_not_offered(
    widths: list[int], unit: str, skipped: list[str]
) -> None:
    model = chain_of(inside(widths))
    policies = PolicySpace(
        space_of({"blocks": ["skip", "scalar"], "options": {"sources": "nearest"}, "max_fraction": 1.0}),
        model,
        (2, 4, 4),
    )
    chosen = dict.fromkeys(skipped, "skip")
    assert frozenset({(unit, "scalar"), *chosen.items()}) in accepted(policies, model)
    assert "scalar" not in policies.offered(unit, chosen)
    assert offered(policies) == closed(accepted(policies, model))
    assert policies.num_replacements() == len(offered(policies))


def test_a_deep_model_is_counted_at_once() -> None:
    space = space_of({"blocks": ["skip", "scalar"], "options": {"sources": "nearest"}, "max_fraction": 1.0})
    policies = PolicySpace(space, chain_of([2] * 81), (2, 4, 4))
    # All skipped; one owner; or a first and a last one, and between them each unit kept, skipped, or made from others.
    assert policies.num_replacements() == 1 + 40 + sum((40 - gap) * 3 ** (gap - 1) for gap in range(1, 40))


def test_the_size_counts_what_is_searched_beside_and_names_what_is_continuous() -> None:
    space = parse_space(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "training": {"batch_size": [32, 64], "lr": {"low": 0.1, "high": 0.3, "step": 0.1}},
            "space": {
                "replacement": {"units": "layer1.*", "blocks": ["skip"], "max_fraction": 1.0},
                "learn_drop": {"patience": {"low": 1, "high": 3}, "threshold": {"low": 0.1, "high": 0.2}},
            },
        }
    )
    policies = PolicySpace(space, resnet(), (3, 16, 16))
    # 2^3 sets of skipped units; Learn&Drop off or on with 3 patiences; 2 batch sizes; 3 learning rates.
    assert policies.num_replacements() == 8
    assert policies.num_points() == 8 * (1 + 3) * 2 * 3
    assert policies.continuous() == ("learn_drop.threshold",)


def test_a_searched_score_decides_what_is_searched_beside_it() -> None:
    drop = {"patience": {"low": 1, "high": 3}, "score": ["param_change", "schedule"], "features": ["auto", "recompute"]}
    content = {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "space": {"learn_drop": drop}}
    policies = PolicySpace(parse_space(content), resnet(), (3, 16, 16))
    found = list(policies.everything())
    # Off; measured, with 3 patiences; by schedule, where patience plays no part.
    assert policies.num_points() == len(found) == 1 + 2 * (3 + 1)
    assert len({point.policy.hash for point in found}) == len(found)
    scheduled = [point for point in found if point.params.get("learn_drop.score") == "schedule"]
    assert all("learn_drop.patience" not in point.params for point in scheduled)
    assert {point.policy.learn_drop.patience for point in scheduled if point.policy.learn_drop} == {2}
    for point in found:
        assert policies.point({}, point.policy.learn_drop, point.training).params == point.params
    assert {describe_policy(point.policy) for point in scheduled} == {
        describe_policy(Policy(learn_drop=LearnDrop(score="schedule", features=features)))
        for features in ("auto", "recompute")
    }


@pytest.mark.parametrize("blocks", [["skip", "scalar", "channel"], ["skip", "bypass", "scalar"]])
def test_a_choice_among_some_variants_is_another_parameter_than_that_among_all(
    blocks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second block that needs no sources: what a unit between replaced neighbours can then choose from.
    monkeypatch.setitem(BLOCKS, "bypass", replace(BLOCKS["skip"], name="bypass"))
    policies = policies_of({"blocks": blocks, "max_fraction": 1.0})
    rng = random.Random(0)
    known: dict[str, Any] = {}
    for _ in range(300):
        decided = policies.decide(random_choices(policies, rng))
        assert decided.params.keys() == decided.distributions.keys()
        for name, distribution in decided.distributions.items():
            assert known.setdefault(name, distribution) == distribution
    assert known["block:layer1.1"].choices == tuple(blocks)
    assert {name: known[name].choices for name in known if name.startswith("block_") and name.endswith("layer1.1")} == (
        {"block_0_1:layer1.1": ("skip", "bypass")} if "bypass" in blocks else {}
    )
