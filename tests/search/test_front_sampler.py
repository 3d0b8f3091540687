"""The search's own sampler, on a landscape of accuracies and the real costs of a model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from torch import nn

from rlsearch.policy import Policy
from rlsearch.results.pareto import hypervolume
from rlsearch.search.check import build_unallocated
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.front_sampler import FrontSampler
from rlsearch.search.outcome import Outcome
from rlsearch.search.policy_space import Decided, PolicySpace
from rlsearch.search.space import parse_space
from rlsearch.search.variations import random_choices, same_choices
from rlsearch.training.loop import TrainingSpec

SHAPE = (3, 16, 16)
OBJECTIVES = {"accuracy": "maximize", "params": "minimize", "train_flops": "minimize"}


def content(**sections: Any) -> dict[str, Any]:
    usual = {
        "model": {"name": "resnet32"},
        "data": {"name": "digits"},
        "objectives": OBJECTIVES,
        "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"]}},
    }
    return {**usual, **sections}


@cache
def model() -> nn.Module:
    return build_unallocated(parse_space(content()))


@cache
def costs() -> ExactCosts:
    return ExactCosts(model(), SHAPE)


def policies_of(**sections: Any) -> PolicySpace:
    return PolicySpace(parse_space(content(**sections)).with_num_classes(10), model(), SHAPE)


def sampler_of(policies: PolicySpace, seed: int = 0, candidates: int = 150) -> FrontSampler:
    space = policies.space
    constraints = HardConstraints(space.constraints, costs(), Policy(space.model), space.training)
    return FrontSampler(policies, costs(), constraints, seed, candidates)


def accuracy(policy: Policy) -> float:
    """Early layers bear replacing worse; a little noise, always the same for a policy."""
    harm = {"layer1": 0.02, "layer2": 0.012, "layer3": 0.003}
    noise = random.Random(policy.hash).gauss(0, 0.002)
    return 0.8 - sum(harm[item.unit.partition(".")[0]] for item in policy.replacements) + noise


def metrics(policy: Policy, training: TrainingSpec) -> dict[str, float]:
    """Of a training to its end; half of its operations are saved where layers are dropped."""
    cost = costs().cost(policy, training)
    spent = cost.step_flops * 1000 * (1 if policy.learn_drop is None else 0.5)
    known = costs().metrics(policy, training)
    return {**known, "accuracy": accuracy(policy), "train_flops": spent, "forward_flops": spent / 3}


def trained(decided: Decided, state: str = "COMPLETE") -> optuna.trial.FrozenTrial:
    """The trial as a run's study keeps it."""
    final = metrics(decided.policy, decided.training)
    epochs = ({**final, "accuracy": 0.8 * final["accuracy"]}, final)
    if state == "PRUNED":
        epochs = epochs[:1]
    kept: tuple[Mapping[str, Any], ...] = () if state in ("RUNNING", "FAIL") else epochs
    return create_trial(
        state=TrialState[state],
        values=[final[name] for name in OBJECTIVES] if state == "COMPLETE" else None,
        params=dict(decided.params),
        distributions=dict(decided.distributions),
        constraints={},
        user_attrs={
            "policy": decided.policy.to_dict(),
            "training": asdict(decided.training),
            "outcome": Outcome(state, kept).to_dict(),
        },
    )


def study_of(trials: list[optuna.trial.FrozenTrial]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=[*OBJECTIVES.values()])
    study.add_trials(trials)
    return study


def start(policies: PolicySpace, count: int = 10) -> list[Decided]:
    """The baseline and random policies."""
    rng = random.Random(1)
    drawn = [policies.decide(random_choices(policies, rng)) for _ in range(count - 1)]
    return [policies.point({}, None, policies.space.training), *drawn]


def dominated(points: list[Decided]) -> float:
    """The hypervolume of what was trained, relative to 1.1 times the baseline."""
    rows = [metrics(item.policy, item.training) for item in points]
    base = rows[0]
    losses = [[1 - r["accuracy"], *(r[n] / (1.1 * base[n]) for n in ("params", "train_flops"))] for r in rows]
    return hypervolume(np.clip(losses, 0, 1), np.ones(3))


def searched(policies: PolicySpace, count: int, seed: int = 0) -> list[Decided]:
    sampler, points = sampler_of(policies, seed), start(policies)
    while len(points) < count:
        params = sampler.choose(study_of([trained(item) for item in points]).get_trials(deepcopy=False))
        points.append(policies.decide(same_choices(params)))
    return points


def test_a_third_of_the_trials_find_more_than_random_ones() -> None:
    policies = policies_of()
    rng = random.Random(2)
    drawn = start(policies) + [policies.decide(random_choices(policies, rng)) for _ in range(65)]
    assert dominated(searched(policies, 25)) > dominated(drawn)


def test_it_is_one_of_optunas_samplers() -> None:
    """As whoever has a study of their own would use it."""
    policies = policies_of()
    study = study_of([trained(item) for item in start(policies)])
    study.sampler = sampler_of(policies)
    for _ in range(3):
        trial = study.ask()
        decided = policies.decide(lambda name, d, trial=trial: trial.suggest_categorical(name, d.choices))
        assert dict(decided.params) == trial.params
        assert all(params != trial.params for params in (item.params for item in study.trials[:-1]))
        final = metrics(decided.policy, decided.training)
        for name, value in trained(decided).user_attrs.items():
            trial.set_user_attr(name, value)
        study.tell(trial, [final[name] for name in OBJECTIVES])


def test_too_few_trials_are_nothing_to_choose_by() -> None:
    policies = policies_of()
    baseline = policies.point({}, None, policies.space.training)
    assert sampler_of(policies).choose([]) == {}
    assert sampler_of(policies).choose([trained(baseline)]) == {}


def test_trials_at_once_differ_in_more_than_a_unit_on_average() -> None:
    policies = policies_of()
    trials = study_of([trained(item) for item in start(policies)]).get_trials(deepcopy=False)
    sampler, chosen = sampler_of(policies), []
    for _ in range(4):
        chosen.append(policies.decide(same_choices(sampler.choose(trials))))
        trials = [*trials, trained(chosen[-1], "RUNNING")]
    replaced = [{item.unit for item in point.policy.replacements} for point in chosen]
    distances = [len(a ^ b) for index, a in enumerate(replaced) for b in replaced[:index]]
    assert len({point.key for point in chosen}) == 4
    assert np.mean(distances) > 1


def test_exact_constraints_are_never_broken() -> None:
    policies = policies_of(constraints={"params": "<= 0.8x"})
    base = metrics(Policy(policies.space.model), policies.space.training)["params"]
    chosen = searched(policies, 16)[10:]
    assert all(metrics(item.policy, item.training)["params"] <= 0.8 * base for item in chosen)


def test_a_bound_on_accuracy_is_kept_where_it_can_be() -> None:
    free = searched(policies_of(), 18)[10:]
    bound = searched(policies_of(constraints={"accuracy": ">= 0.985x"}), 18)[10:]
    least = 0.985 * accuracy(Policy(policies_of().space.model))
    assert sum(accuracy(item.policy) < least for item in free) >= 4
    assert sum(accuracy(item.policy) < least for item in bound) <= 2


def test_trials_that_all_break_a_constraint_are_learned_from() -> None:
    policies = policies_of(constraints={"accuracy": ">= 0.99"})
    trials = [trained(item) for item in start(policies)]
    for trial in trials:
        trial.constraints["accuracy"] = 0.2
    assert all(value > 0 for trial in trials for value in trial.constraints.values())
    assert sampler_of(policies).choose(study_of(trials).get_trials(deepcopy=False))


def test_stopped_and_failed_trials_are_not_proposed_again() -> None:
    policies = policies_of()
    points = start(policies, 16)
    states = ["COMPLETE"] * 10 + ["PRUNED"] * 4 + ["FAIL"] * 2
    trials = [trained(item, state) for item, state in zip(points, states, strict=True)]
    sampler = sampler_of(policies)
    for _ in range(4):
        decided = policies.decide(same_choices(sampler.choose(study_of(trials).get_trials(deepcopy=False))))
        assert decided.key not in {item.key for item in points}
        points.append(decided)
        trials.append(trained(decided))


def test_costs_that_depend_on_the_training_are_learned() -> None:
    """With Learn&Drop, which saves half of the operations here and harms nothing, nearly all that is proposed drops."""
    policies = policies_of(space={"replacement": {"blocks": ["skip"]}, "learn_drop": {"threshold": [0.01, 0.1]}})
    chosen = searched(policies, 24)[10:]
    assert sum(item.policy.learn_drop is not None for item in chosen) >= 12  # of 14; by chance once in 150 times


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_and_trials_give_the_same_choice(seed: int) -> None:
    policies = policies_of()
    trials = study_of([trained(item) for item in start(policies, 14)]).get_trials(deepcopy=False)
    grown = sampler_of(policies, seed)
    for count in (10, 12):
        grown.choose(trials[:count])  # what it has seen before plays no part
    assert grown.choose(trials) == sampler_of(policies, seed).choose(trials)


def test_trainings_that_collapsed_do_not_spoil_the_rest() -> None:
    policies = policies_of()
    points, rng = start(policies), random.Random(9)
    collapsed = [trained(policies.decide(random_choices(policies, rng))) for _ in range(3)]
    for trial in collapsed:
        trial.user_attrs["outcome"]["epochs"]["accuracy"] = [0.1, 0.1]
    before, sampler = dominated(points), sampler_of(policies)
    for _ in range(5):
        trials = study_of([*(trained(item) for item in points), *collapsed]).get_trials(deepcopy=False)
        points.append(policies.decide(same_choices(sampler.choose(trials))))
    assert dominated(points) > 1.2 * before
