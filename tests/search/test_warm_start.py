"""An earlier run as what a new search knows, through real studies; accuracies come from a rule, not from trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlsearch.errors import RunFolderError, UserError
from rlsearch.policy import Policy
from rlsearch.search.check import build_unallocated
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.observations import Observed
from rlsearch.search.outcome import Outcome
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.study import PlannedTrial, RunStudy
from rlsearch.search.warm_start import from_content, read_warm_start, to_content

SHAPE = (3, 16, 16)


def space_of(**sections: Any) -> SearchSpace:
    usual = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "objectives": {"accuracy": "maximize", "params": "minimize"},
        "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.6}},
        "search": {"sampler": {"name": "front", "candidates": 60}, "baseline_seeds": 1},
    }
    return parse_space(usual | sections).with_num_classes(10)


@cache
def costs() -> ExactCosts:
    return ExactCosts(build_unallocated(space_of()), SHAPE)


def sampler_of(space: SearchSpace) -> PolicySampler:
    constraints = HardConstraints(space.constraints, costs(), Policy(space.model), space.training)
    return PolicySampler(PolicySpace(space, build_unallocated(space), SHAPE), constraints, costs())


def accuracy(policy: Policy) -> float:
    """The first stage bears no replacing at all, the others do."""
    return 0.9 - sum(0.3 if item.unit.startswith("layer1") else 0.001 for item in policy.replacements)


def harmful(policies: Sequence[Policy]) -> int:
    return sum(item.unit.startswith("layer1") for policy in policies for item in policy.replacements)


def ended(study: RunStudy, planned: PlannedTrial, state: str = "COMPLETE") -> None:
    metrics: Mapping[str, Any] = {
        "epoch": 1,
        "accuracy": accuracy(planned.policy),
        **costs().metrics(planned.policy, planned.training),
    }
    study.finish(planned.number, Outcome(state, (metrics,)), {})


def searched(
    folder: Path, space: SearchSpace, sampler: PolicySampler, trials: int, known: Sequence[Observed] = ()
) -> RunStudy:
    folder.mkdir()
    study = RunStudy.create(folder / "study.db", folder.name, space.to_dict(), trials, to_content(known))
    for _ in range(trials):
        proposal = sampler.propose(study.study)
        assert proposal is not None
        ended(study, study.add(proposal, 0))
    return study


def test_the_first_proposals_know_what_an_earlier_run_has_learned(tmp_path: Path) -> None:
    space = space_of()
    searched(tmp_path / "earlier", space, sampler_of(space), 16)
    known = read_warm_start(tmp_path / "earlier", space)
    assert len(known) == 16
    warm = sampler_of(space)
    warm.learn_from(known)
    study = searched(tmp_path / "warm", space, warm, 7)
    policies = [Policy.from_dict(trial.user_attrs["policy"]) for trial in study.study.trials][2:]
    assert [trial.user_attrs["origin"] for trial in study.study.trials[:2]] == ["baseline", "skip control"]
    cold = searched(tmp_path / "cold", space, sampler_of(space), 7)
    drawn = [Policy.from_dict(trial.user_attrs["policy"]) for trial in cold.study.trials][2:]
    assert all(policy.replacements for policy in policies)
    assert 3 * harmful(policies) <= harmful(drawn)


def test_the_study_keeps_what_was_known_and_hands_it_on(tmp_path: Path) -> None:
    space = space_of()
    first = searched(tmp_path / "first", space, sampler_of(space), 4)
    known = read_warm_start(tmp_path / "first", space)
    searched(tmp_path / "second", space, sampler_of(space), 3, known)
    assert from_content(RunStudy.open(tmp_path / "second" / "study.db").warm_start) == [
        type(item)(**{**vars(item), "final": {}}) for item in known
    ]
    assert len(read_warm_start(tmp_path / "second", space)) == 7
    assert first.warm_start == []


def test_another_model_or_space_is_refused_with_the_difference(tmp_path: Path) -> None:
    searched(tmp_path / "run", space_of(), sampler_of(space_of()), 2)
    other = space_of(
        model={"name": "resnet32"},
        training={"epochs": 7},
        space={"replacement": {"units": "layer*", "blocks": ["skip", "channel"], "max_fraction": 0.6}},
    )
    with pytest.raises(UserError) as raised:
        read_warm_start(tmp_path / "run", other)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"--warm-start {tmp_path / 'run'}: that run searched another model or space:"
    assert lines[1:] == [
        "  model.name: resnet20 there, resnet32 here",
        f"  training.epochs: {space_of().training.epochs} there, 7 here",
        "  space.replacement.blocks: ['skip', 'scalar'] there, ['skip', 'channel'] here",
    ]


def test_budgets_bounds_and_where_images_lie_may_differ(tmp_path: Path) -> None:
    searched(tmp_path / "run", space_of(), sampler_of(space_of()), 2)
    other = space_of(
        data={"name": "digits", "root": "/elsewhere", "workers": 3},
        search={"trials": 90, "seed": 5},
        constraints={"params": "<= 0.9x"},
        resources={"cpu": 2},
    )
    assert len(read_warm_start(tmp_path / "run", other)) == 2


def test_what_a_warm_start_cannot_be(tmp_path: Path) -> None:
    space = space_of()
    with pytest.raises(RunFolderError, match="there is no such folder"):
        read_warm_start(tmp_path / "nothing", space)
    for name in ("tpe", "random"):
        with pytest.raises(UserError, match=r"only search\.sampler: front learns from it"):
            read_warm_start(tmp_path / "nothing", space_of(search={"sampler": name}))
    (tmp_path / "run").mkdir()
    study = RunStudy.create(tmp_path / "run" / "study.db", "run", space.to_dict(), 5)
    proposal = sampler_of(space).propose(study.study)
    assert proposal is not None
    ended(study, study.add(proposal, 0), "FAIL")
    with pytest.raises(RunFolderError, match="none of its trials is complete, so there is nothing to learn"):
        read_warm_start(tmp_path / "run", space)
