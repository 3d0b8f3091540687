"""Proposes what to train next: the baseline, the controls, then valid policies that nobody has trained yet.

Optuna's multivariate, grouped TPE on a conditional space does the choosing. It works on a copy of the study in memory:
one `suggest` is one write to the study's database, and a policy takes some thirty of them.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from rlsearch.policy import LearnDrop, Policy
from rlsearch.search.costs import HardConstraints
from rlsearch.search.policy_space import Decided, PolicySpace, Suggest, params_key
from rlsearch.search.ranges import Distribution, draw, size_of
from rlsearch.training.loop import TrainingSpec

BASELINE, SKIP_CONTROL, FREEZE_CONTROL, SAMPLER = "baseline", "skip control", "freeze control", "sampler"

# Attempts at a policy that is new and keeps the constraints. TPE's cost more, and repeat themselves when it is sure.
_MODELLED_ATTEMPTS = 8
_MUTATED_ATTEMPTS = 50
_RANDOM_ATTEMPTS = 500
_MOST_ENUMERATED = 20_000
"""Up to this size a space is searched to its last point before it counts as exhausted; above, after the attempts."""

_LEARNED_FROM = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Proposal:
    """What to train next.

    Attributes:
        policy: a valid policy, bound to the space's model.
        training: how to train it.
        origin: ``baseline``, ``skip control``, ``freeze control`` or ``sampler``.
        params: for the study; empty for a control that the space itself does not offer.
        distributions: for the study, of the same names.
        violations: metric to how far its exact cost misses a hard constraint (at or below 0: kept); only the baseline
            is ever above.
    """

    policy: Policy
    training: TrainingSpec
    origin: str = SAMPLER
    params: Mapping[str, Any] = field(default_factory=dict)
    distributions: Mapping[str, BaseDistribution] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)

    def to_trial(self, user_attrs: Mapping[str, Any]) -> FrozenTrial:
        """The RUNNING trial that one ``study.add_trial`` writes."""
        return create_trial(
            state=TrialState.RUNNING,
            params=dict(self.params),
            distributions=dict(self.distributions),
            user_attrs=dict(user_attrs),
            constraints=dict(self.violations),
        )


class PolicySampler:
    """Proposes policies of a space, by what a study holds and nothing else.

    The same study gives the same proposal, whether it grew in one go or over several runs.

    Args:
        policies: what the space offers for its model.
        constraints: what an exact cost may not exceed.
    """

    def __init__(self, policies: PolicySpace, constraints: HardConstraints) -> None:
        self._policies = policies
        self._constraints = constraints
        self._settings = policies.space.search
        self._planned = list(_planned(policies, constraints))

    def propose(self, study: Study) -> Proposal | None:
        """The next thing to train; the study is read, never written.

        Returns:
            a proposal that differs from all of the study's trials, however they ended; or None when the space is
            exhausted: proven by enumeration for a space of up to 20,000 points, else after 500 random policies in a
            row were known already or broke a constraint.
        """
        trials = study.get_trials(deepcopy=False)
        seen = {params_key(trial.params) for trial in trials}
        for origin, decided in self._planned:
            if decided.key not in seen:
                return self._proposal(decided, origin)
        rng = random.Random(f"{self._settings.seed}/{len(trials)}")
        for decided in self._attempts(study, trials, rng):
            if decided.key not in seen and self._constraints.met(decided.policy, decided.training):
                return self._proposal(decided, SAMPLER)
        return None

    def _proposal(self, decided: Decided, origin: str) -> Proposal:
        violations = self._constraints.violations(decided.policy, decided.training)
        return Proposal(
            decided.policy, decided.training, origin, decided.params, dict(decided.distributions), violations
        )

    def _modelled(
        self, study: Study, trials: Sequence[FrozenTrial], learned: Sequence[FrozenTrial], rng: random.Random
    ) -> Iterator[Decided]:
        copy = _copy_in_memory(study, trials, rng.randrange(2**32))
        for _ in range(_MODELLED_ATTEMPTS):
            # An attempt that fails stays in the copy as running, which steers the next one away from it.
            yield self._policies.decide(_suggest_with(copy.ask()))
        for _ in range(_MUTATED_ATTEMPTS):
            yield self._policies.decide(_mutation(rng.choice(learned).params, rng))

    def _attempts(self, study: Study, trials: Sequence[FrozenTrial], rng: random.Random) -> Iterator[Decided]:
        decide = self._policies.decide
        learned = [trial for trial in trials if trial.state in _LEARNED_FROM]
        if len(learned) >= self._settings.startup_trials:
            known = {_coarse_key(trial.params, trial.distributions) for trial in trials}
            for decided in self._modelled(study, trials, learned, rng):
                if _coarse_key(decided.params, decided.distributions) not in known:
                    yield decided
        for _ in range(_RANDOM_ATTEMPTS):
            yield decide(random_choices(self._policies, rng))
        if not self._policies.continuous() and self._policies.num_points() <= _MOST_ENUMERATED:
            rest = list(self._policies.everything())
            rng.shuffle(rest)
            yield from rest


def _coarse_key(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> tuple[Any, ...]:
    """A point's decisions, continuous ones by the tenth of their range.

    A model that is sure proposes one good policy again and again, with a threshold that differs in its third digit;
    such a trial tells nothing new.
    """
    return params_key(
        {
            name: value if size_of(distributions[name]) else _tenth(value, distributions[name])
            for name, value in params.items()
        }
    )


def _tenth(value: float, distribution: BaseDistribution) -> int:
    assert isinstance(distribution, FloatDistribution)  # the only kind that is continuous
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return min(9, int(10 * (scale(value) - low) / (high - low)))


def random_choices(policies: PolicySpace, rng: random.Random) -> Suggest:
    """Decides a whole point at random.

    How readily units are replaced is drawn first, once a point: an even coin for every unit would put nearly all points
    at `max_fraction`, and none near the baseline.
    """
    # Half as much again: a unit that borrows keeps its neighbours from being replaced, so fewer are than asked for.
    share = rng.uniform(0, min(1, 1.5 * policies.max_replaced / max(1, len(policies.blocks))))

    def suggest(name: str, distribution: Distribution) -> Any:
        return rng.random() < share if name.startswith("replace:") else draw(distribution, rng)

    return suggest


def _mutation(params: Mapping[str, Any], rng: random.Random) -> Suggest:
    """Decides as ``params`` did, but for one decision; decisions that follow from it anew are drawn at random."""
    changed = rng.choice(sorted(params)) if params else ""

    def suggest(name: str, distribution: Distribution) -> Any:
        if name in params and name != changed:
            return params[name]
        if name == changed and isinstance(distribution, CategoricalDistribution) and not distribution.single():
            return rng.choice([choice for choice in distribution.choices if choice != params[name]])
        return draw(distribution, rng)

    return suggest


def _copy_in_memory(study: Study, trials: Sequence[FrozenTrial], seed: int) -> Study:
    """The study's trials in a study of their own, whose sampler is TPE with ``seed``."""
    with warnings.catch_warnings():
        # `group` is what makes TPE model a conditional space; Optuna still calls it experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=1)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study that is made
    try:
        copy = optuna.create_study(directions=study.directions, sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
    for trial in trials:
        if trial.state in (*_LEARNED_FROM, TrialState.RUNNING):
            # Only what TPE reads: user attributes are most of a trial's bytes, and partial values of a raced-out trial
            # make Optuna ask a study of several objectives for its one direction.
            kept = create_trial(
                state=trial.state,
                values=trial.values,
                params=trial.params,
                distributions=trial.distributions,
                constraints=trial.constraints,
            )
            copy.add_trial(kept)
    return copy


def _suggest_with(trial: optuna.Trial) -> Suggest:
    def suggest(name: str, distribution: Distribution) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            return trial.suggest_categorical(name, distribution.choices)
        if isinstance(distribution, IntDistribution):
            step, log = distribution.step, distribution.log
            return trial.suggest_int(name, distribution.low, distribution.high, step=step, log=log)
        return trial.suggest_float(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )

    return suggest


def _planned(policies: PolicySpace, constraints: HardConstraints) -> Iterator[tuple[str, Decided]]:
    """What every search trains first: the baseline, and the controls that the space's methods have to beat."""
    space = policies.space
    yield BASELINE, policies.point({}, None, space.training)
    controls: list[tuple[str, dict[str, str], LearnDrop | None]] = []
    skipped = _evenly_spread(policies.skippable, policies.max_replaced)
    if skipped:
        controls.append((SKIP_CONTROL, dict.fromkeys(skipped, "skip"), None))
    if space.learn_drop is not None:
        controls.append((FREEZE_CONTROL, {}, space.learn_drop))
    for origin, blocks, learn_drop in controls:
        decided = policies.point(blocks, learn_drop, space.training)
        if constraints.met(decided.policy, decided.training):
            yield origin, decided


def _evenly_spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names (or all, where there are fewer), as far apart as they go."""
    count = min(count, len(names))
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]
