"""Proposals: always valid, never twice, and the same from the same study."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from torch import nn

from rlsearch.errors import ConfigError
from rlsearch.policy import LearnDrop, ModelSpec, Policy
from rlsearch.replacement import plan
from rlsearch.search import sampler as sampler_module
from rlsearch.search.check import build_unallocated
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.outcome import Outcome
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.sampler import PolicySampler, Proposal
from rlsearch.search.space import parse_space
from rlsearch.search.variations import random_choices

SHAPE = (3, 16, 16)
QUICK = {"sampler": {"name": "front", "candidates": 50}, "baseline_seeds": 1}
OBJECTIVES = ("accuracy", "params", "train_flops")
DIRECTIONS = ["maximize", "minimize", "minimize"]


@cache
def model_of(name: str) -> nn.Module:
    return build_unallocated(parse_space(content(model={"name": name})))


def content(**sections: Any) -> dict[str, Any]:
    usual = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "space": {"replacement": {"blocks": ["skip", "scalar", "channel"]}},
        "objectives": {"accuracy": "maximize", "params": "minimize", "train_flops": "minimize"},
        "search": {"startup_trials": 6, **QUICK},
    }
    return {**usual, **sections}


def policies_of(**sections: Any) -> PolicySpace:
    space = parse_space(content(**sections)).with_num_classes(10)
    return PolicySpace(space, model_of(space.model.name), SHAPE)


@cache
def costs_of(name: str) -> ExactCosts:
    return ExactCosts(model_of(name), SHAPE)


def sampler_of(policies: PolicySpace) -> PolicySampler:
    costs = costs_of(policies.space.model.name)
    baseline = Policy(policies.space.model)
    constraints = HardConstraints(policies.space.constraints, costs, baseline, policies.space.training)
    return PolicySampler(policies, constraints, costs)


def new_study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=DIRECTIONS)


def made_up_values(proposal: Proposal) -> list[float]:
    """A landscape: some units matter more than others, and every replacement saves something."""
    noise = random.Random(proposal.policy.hash).gauss(0, 0.01)
    harm = sum(0.01 * (len(item.unit) + int(item.unit[-1])) for item in proposal.policy.replacements)
    count = len(proposal.policy.replacements)
    dropped = proposal.policy.learn_drop is not None
    return [0.9 - harm - 0.02 * dropped + noise, 100.0 - count, 50.0 - 9 * dropped - count]


def search(
    sampler: PolicySampler,
    study: optuna.Study,
    trials: int,
    ends: Mapping[int, TrialState] | None = None,
    values: Callable[[Proposal], list[float]] = made_up_values,
) -> list[Proposal]:
    """Trains nothing: asks, and tells values that follow from the policy."""
    proposals = []
    for _ in range(trials):
        proposal = sampler.propose(study)
        if proposal is None:
            break
        number = len(study.trials)
        state = (ends or {}).get(number)
        told = values(proposal)
        study.add_trial(proposal.to_trial(attributes(proposal, told)))
        study.tell(number, None if state else told, state=state)
        proposals.append(proposal)
    return proposals


def attributes(proposal: Proposal, values: list[float] | None = None) -> dict[str, Any]:
    """What a run's study keeps of a trial; its accuracy after each of two epochs, where it has values."""
    epochs = (
        [dict(zip(OBJECTIVES, [share * values[0], *values[1:]], strict=True)) for share in (0.7, 1)] if values else []
    )
    return {
        "policy": proposal.policy.to_dict(),
        "training": asdict(proposal.training),
        "origin": proposal.origin,
        "outcome": Outcome("RUNNING" if values is None else "COMPLETE", tuple(epochs)).to_dict(),
    }


def points(proposals: list[Proposal]) -> list[tuple[str, Any]]:
    return [(proposal.policy.hash, proposal.training) for proposal in proposals]


def test_the_baseline_and_the_controls_come_first() -> None:
    space = {"replacement": {"blocks": ["scalar", "skip"]}, "learn_drop": {"threshold": {"low": 0.3, "high": 0.9}}}
    policies = policies_of(space=space)
    baseline, skip, freeze, first = search(sampler_of(policies), new_study(), 4)
    assert [item.origin for item in (baseline, skip, freeze, first)] == [
        "baseline",
        "skip control",
        "freeze control",
        "sampler",
    ]
    assert baseline.policy == Policy(ModelSpec("resnet20"))
    assert baseline.policy.is_baseline
    # Four of nine units, and seven that can be skipped: as far apart as they go.
    assert [(item.unit, item.block) for item in skip.policy.replacements] == [
        ("layer1.0", "skip"),
        ("layer1.2", "skip"),
        ("layer2.2", "skip"),
        ("layer3.2", "skip"),
    ]
    assert skip.policy.learn_drop is None
    assert freeze.policy.replacements == ()
    assert freeze.policy.learn_drop == LearnDrop()
    assert all(item.params for item in (baseline, skip, freeze, first))


def test_a_control_that_the_space_does_not_offer_is_trained_all_the_same() -> None:
    proposals = search(sampler_of(policies_of(space={"replacement": {"blocks": ["scalar"]}})), new_study(), 12)
    control = proposals[1]
    assert (control.origin, control.params) == ("skip control", {})
    assert {item.block for item in control.policy.replacements} == {"skip"}
    assert [proposal.origin for proposal in proposals].count("skip control") == 1
    assert {item.block for proposal in proposals[2:] for item in proposal.policy.replacements} == {"scalar"}


def test_parts_of_units_and_variants_are_proposed_and_the_control_skips_the_same_parts() -> None:
    replacement = {
        "units": "layer*",
        "roles": ["conv1", "conv2"],
        "blocks": ["scalar"],
        "options": {"init": ["half", "fit"], "boundary": "keep"},
    }
    policies = policies_of(space={"replacement": replacement})
    proposals = search(sampler_of(policies), new_study(), 30)
    assert [proposal.origin for proposal in proposals[:2]] == ["baseline", "skip control"]
    control = {item.unit for item in proposals[1].policy.replacements}
    assert {name.rpartition(".")[2] for name in control} == {"conv1", "conv2"}
    replaced = [item for proposal in proposals[2:] for item in proposal.policy.replacements]
    assert {item.block for item in replaced} == {"scalar"}
    assert {tuple(sorted(item.options.items())) for item in replaced} == {
        (("boundary", "keep"), ("init", "half")),
        (("boundary", "keep"), ("init", "fit")),
    }


def test_no_freeze_control_where_nothing_is_dropped_and_no_skip_control_where_nothing_is_replaced() -> None:
    replacing = search(sampler_of(policies_of()), new_study(), 3)
    assert [proposal.origin for proposal in replacing] == ["baseline", "skip control", "sampler"]
    dropping = policies_of(space={"learn_drop": {"patience": {"low": 1, "high": 9}}})
    assert [p.origin for p in search(sampler_of(dropping), new_study(), 3)] == ["baseline", "freeze control", "sampler"]


replacements = st.fixed_dictionaries(
    {
        "units": st.sampled_from(["*", "layer*", "layer1.*", ["layer2.*", "layer3.1"]]),
        "blocks": st.lists(st.sampled_from(["skip", "scalar", "channel", "lowrank"]), min_size=1, unique=True),
        "max_fraction": st.floats(0.01, 1),
        "options": st.sampled_from(
            [{}, {"boundary": "keep"}, {"init": ["half", "previous"]}, {"sources": "nearest", "init": ["half", "fit"]}]
        ),
    }
).filter(lambda replacement: not replacement["options"] or replacement["blocks"] != ["skip"])
learn_drops = st.one_of(st.none(), st.just({"patience": {"low": 1, "high": 3}, "features": ["recompute", "stored"]}))
trainings = st.sampled_from([{}, {"lr": {"low": 0.01, "high": 1.0, "log": True}, "batch_size": [32, 64]}])
limits = st.sampled_from([{}, {"params": "<= 0.9x"}, {"memory_predicted": "<= 0.95x", "params": ">= 0.6x"}])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(replacements, learn_drops, trainings, limits, st.integers(0, 99))
def test_every_proposal_of_every_space_is_valid(
    replacement: dict[str, Any], learn_drop: Any, training: Any, limit: Any, seed: int
) -> None:
    policies = policies_of(
        space={"replacement": replacement, "learn_drop": learn_drop},
        training=training,
        constraints=limit,
        search={"seed": seed, "startup_trials": 5, **QUICK},
    )
    proposals = search(sampler_of(policies), new_study(), 14)
    assert len(set(points(proposals))) == len(proposals)
    model, costs = model_of("resnet20"), costs_of("resnet20")
    reference = costs.metrics(Policy(), policies.space.training)
    for proposal in proposals:
        plan(model, proposal.policy, policies.units)
        assert len(proposal.policy.replacements) <= replacement["max_fraction"] * len(policies.matched) + 1e-9
        assert {item.unit for item in proposal.policy.replacements} <= set(policies.matched)
        assert proposal.training.problems() == []
        metrics = costs.metrics(proposal.policy, proposal.training)
        if proposal.origin != "baseline":
            for constraint in policies.space.constraints:
                assert constraint.violation(metrics[constraint.metric], reference[constraint.metric]) <= 0


def test_two_hundred_proposals_are_all_different() -> None:
    policies = policies_of(
        space={"replacement": {"blocks": ["skip", "scalar"]}, "learn_drop": {}},
        search={"startup_trials": 150, **QUICK, "sampler": "tpe"},
    )
    proposals = search(sampler_of(policies), new_study(), 200)
    assert len(proposals) == 200
    assert len(set(points(proposals))) == 200


def test_what_the_model_proposes_differs_in_more_than_a_digit_of_a_threshold() -> None:
    space = {"replacement": {"blocks": ["skip"]}, "learn_drop": {"threshold": {"low": 1e-3, "high": 0.1, "log": True}}}
    proposals = search(sampler_of(policies_of(space=space)), new_study(), 60)
    tenths = [
        (
            frozenset(item.unit for item in proposal.policy.replacements),
            proposal.policy.learn_drop and int(10 * (math.log10(proposal.policy.learn_drop.threshold) + 3) / 2),
        )
        for proposal in proposals
    ]
    assert len(set(tenths)) == len(proposals) == 60


def test_a_space_of_one_range_is_never_exhausted() -> None:
    policies = policies_of(space=None, training={"lr": {"low": 0.01, "high": 1.0, "log": True}})
    proposals = search(sampler_of(policies), new_study(), 40)
    assert len({proposal.training.lr for proposal in proposals}) == 40


def test_the_baseline_trains_with_as_many_seeds_as_asked_for() -> None:
    proposals = search(sampler_of(policies_of(search={"baseline_seeds": 3})), new_study(), 6)
    assert [item.origin for item in proposals[:4]] == ["baseline", "skip control", "baseline repeat", "baseline repeat"]
    assert [item.repeat for item in proposals[:5]] == [0, 0, 1, 2, 0]
    assert proposals[0].policy == proposals[2].policy == proposals[3].policy


def test_sensitivities_replace_each_unit_alone() -> None:
    policies = policies_of(search={"sensitivities": True, "min_epochs": 1, "baseline_seeds": 1})
    proposals = search(sampler_of(policies), new_study(), 2 + len(policies.blocks) + 1)
    alone = proposals[2:-1]
    assert {item.origin for item in alone} == {"sensitivity"}
    assert [[r.unit for r in item.policy.replacements] for item in alone] == [[unit] for unit in policies.blocks]
    assert proposals[-1].origin == "sampler"
    with pytest.raises(ConfigError, match=r"search\.sensitivities: needs search\.min_epochs"):
        policies_of(search={"sensitivities": True})


@pytest.mark.parametrize(("name", "trials"), [("front", 45), ("tpe", 70)])
def test_the_sampler_learns_which_unit_to_leave_alone(name: str, trials: int) -> None:
    def replaces_it(policy: Policy) -> bool:
        return "layer2.2" in {item.unit for item in policy.replacements}

    def values(proposal: Proposal) -> list[float]:
        harmful = replaces_it(proposal.policy)
        return [0.9 - 0.3 * harmful, 100.0 - len(proposal.policy.replacements) + harmful, 50.0]

    policies = policies_of(model={"name": "resnet32"}, search={"startup_trials": 20, **QUICK, "sampler": name})
    learned = search(sampler_of(policies), new_study(), trials, values=values)[20:]
    rng = random.Random(0)
    drawn = [policies.decide(random_choices(policies, rng)).policy for _ in range(500)]
    share_learned = sum(replaces_it(proposal.policy) for proposal in learned) / len(learned)
    assert share_learned < 0.5 * sum(map(replaces_it, drawn)) / len(drawn)


@pytest.mark.parametrize("blocks", [["skip"], ["scalar"], ["scalar", "channel"], ["channel", "skip"]])
def test_an_exhausted_space_is_proposed_whole_and_then_nothing(
    blocks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_RANDOM_ATTEMPTS", 0)  # luck alone finds the last point of so small a space
    policies = policies_of(
        space={"replacement": {"units": ["layer1.*", "layer2.*"], "blocks": blocks}, "learn_drop": {}},
        search={"sampler": "random", "baseline_seeds": 1},
    )
    size = policies.num_points()
    study = new_study()
    sampler = sampler_of(policies)
    proposals = search(sampler, study, 1000)
    of_the_space = [proposal for proposal in proposals if proposal.params]
    assert len(of_the_space) == len(set(points(of_the_space))) == size
    assert sampler.propose(study) is None


def test_a_space_whose_limits_leave_nothing_is_exhausted_after_the_baseline() -> None:
    policies = policies_of(constraints={"params": "<= 0.01x"})
    (baseline,) = search(sampler_of(policies), new_study(), 5)
    assert baseline.origin == "baseline"
    assert baseline.violations["params"] > 0
    trial = baseline.to_trial({})
    assert trial.constraints == baseline.violations
    assert trial.state == TrialState.RUNNING


def test_failed_and_pruned_trials_are_not_proposed_again_and_pruned_ones_do_not_stop_the_sampler() -> None:
    ends = {4: TrialState.FAIL, 7: TrialState.PRUNED, 9: TrialState.PRUNED}
    proposals = search(sampler_of(policies_of()), new_study(), 30, ends)
    assert len(set(points(proposals))) == 30


@pytest.mark.parametrize("name", ["front", "tpe", "nsga2", "random"])
def test_running_trials_are_not_proposed_again(name: str) -> None:
    study, sampler = new_study(), sampler_of(policies_of(search={"startup_trials": 6, **QUICK, "sampler": name}))
    search(sampler, study, 12)
    proposals = []
    for _ in range(6):
        proposal = sampler.propose(study)
        assert proposal is not None
        study.add_trial(proposal.to_trial(attributes(proposal)))
        proposals.append(proposal)
    assert len(set(points(proposals))) == 6


@pytest.mark.parametrize("name", ["front", "tpe", "nsga2"])
def test_the_same_seed_proposes_the_same_straight_or_interrupted(name: str) -> None:
    settings = {"startup_trials": 6, "baseline_seeds": 2, "sampler": name}
    space = {"replacement": {"blocks": ["skip", "scalar"]}, "learn_drop": {"threshold": {"low": 1e-3, "high": 0.1}}}
    straight = search(sampler_of(policies_of(space=space, search=settings)), new_study(), 20)
    study = new_study()
    interrupted = []
    for length in (1, 1, 5, 4, 9):
        interrupted += search(sampler_of(policies_of(space=space, search=settings)), study, length)
    assert points(interrupted) == points(straight)
    other = search(sampler_of(policies_of(space=space, search={**settings, "seed": 1})), new_study(), 20)
    assert points(other) != points(straight)


def test_proposing_writes_nothing_and_a_study_on_disk_gives_the_same(tmp_path: Any) -> None:
    on_disk = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="run", directions=DIRECTIONS)
    training = {"lr": {"low": 0.01, "high": 1.0, "log": True}}
    sampler = sampler_of(policies_of(training=training))
    from_disk = search(sampler, on_disk, 12)
    assert points(from_disk) == points(search(sampler_of(policies_of(training=training)), new_study(), 12))
    before = on_disk.get_trials()
    assert sampler.propose(on_disk) is not None
    assert on_disk.get_trials() == before
    reopened = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="run")
    again = sampler.propose(reopened)
    assert again is not None
    assert again.params == sampler.propose(on_disk).params


def test_random_policies_reach_from_the_baseline_to_the_most() -> None:
    policies = policies_of(space={"replacement": {"max_fraction": 0.5}})
    rng = random.Random(0)
    counts = [len(policies.decide(random_choices(policies, rng)).policy.replacements) for _ in range(400)]
    assert set(counts) == {0, 1, 2, 3, 4}
    assert max(map(counts.count, range(5))) < 200
