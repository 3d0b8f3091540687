"""Proposes what to train next: the baseline, the controls, then valid policies that nobody has trained yet.

`FrontSampler` does the choosing, or a sampler of Optuna's own. Those work on a copy of the study in memory: one
`suggest` is one write to the study's database, and a policy takes some thirty of them.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from rlsearch.policy import Policy
from rlsearch.results.noise import REPEAT
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.front_sampler import FrontSampler
from rlsearch.search.observations import Observed
from rlsearch.search.policy_space import Decided, PolicySpace, Suggest, params_key
from rlsearch.search.ranges import Distribution
from rlsearch.search.sampler_settings import SAMPLERS, SamplerSettings
from rlsearch.search.start_design import SAMPLER, start_design
from rlsearch.search.variations import coarse_key, mutation, random_choices, same_choices
from rlsearch.training.loop import TrainingSpec

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
        origin: ``baseline``, ``skip control``, ``freeze control``, ``baseline repeat``, ``sensitivity`` or ``sampler``.
        params: for the study; empty for a control that the space itself does not offer.
        distributions: for the study, of the same names.
        violations: metric to how far its exact cost misses a hard constraint (at or below 0: kept); only the baseline
            is ever above.
        repeat: 0, or by how much the seed of its training is above the search's own.
    """

    policy: Policy
    training: TrainingSpec
    origin: str = SAMPLER
    params: Mapping[str, Any] = field(default_factory=dict)
    distributions: Mapping[str, BaseDistribution] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    repeat: int = 0

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
        costs: of the space's model.
    """

    def __init__(self, policies: PolicySpace, constraints: HardConstraints, costs: ExactCosts) -> None:
        self._policies = policies
        self._constraints = constraints
        self._settings = policies.space.search
        self._design = start_design(policies, constraints)
        self._front: FrontSampler | None = None
        sampler = self._settings.sampler
        if sampler.name == "front" and "accuracy" in policies.space.objectives:
            self._front = FrontSampler(policies, costs, constraints, self._settings.seed, **sampler.options)

    def learn_from(self, earlier: Sequence[Observed]) -> None:
        """Takes in what trials of an earlier run tell; only `FrontSampler` makes use of it."""
        if self._front is not None:
            self._front.earlier = tuple(earlier)

    def propose(self, study: Study) -> Proposal | None:
        """The next thing to train; the study is read, never written.

        Returns:
            a proposal that differs from all of the study's trials, however they ended; or None when the space is
            exhausted: proven by enumeration for a space of up to 20,000 points, else after 500 random policies in a
            row were known already or broke a constraint.
        """
        trials = study.get_trials(deepcopy=False)
        seen = {params_key(trial.params) for trial in trials}
        repeats = sum(trial.user_attrs["origin"] == REPEAT for trial in trials)
        for item in self._design:
            if repeats < item.repeat or item.decided.key not in seen:
                return replace(self._proposal(item.decided, item.origin), repeat=item.repeat)
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
        if self._front is not None:
            params = self._front.choose(trials)
            if params:
                yield self._policies.decide(same_choices(params))
        else:
            copy = _copy_in_memory(study, trials, _sampler(self._settings.sampler, rng.randrange(2**32)))
            for _ in range(_MODELLED_ATTEMPTS):
                # An attempt that fails stays in the copy as running, which steers the next one away from it.
                yield self._policies.decide(_suggest_with(copy.ask()))
        for _ in range(_MUTATED_ATTEMPTS):
            yield self._policies.decide(mutation(rng.choice(learned).params, rng))

    def _attempts(self, study: Study, trials: Sequence[FrozenTrial], rng: random.Random) -> Iterator[Decided]:
        decide = self._policies.decide
        learned = [trial for trial in trials if trial.state in _LEARNED_FROM]
        num_known = len(learned) + (0 if self._front is None else len(self._front.earlier))
        if learned and num_known >= self._settings.startup_trials and self._settings.sampler.name != "random":
            known = {coarse_key(trial.params, trial.distributions) for trial in trials}
            for decided in self._modelled(study, trials, learned, rng):
                if coarse_key(decided.params, decided.distributions) not in known:
                    yield decided
        for _ in range(_RANDOM_ATTEMPTS):
            yield decide(random_choices(self._policies, rng))
        if not self._policies.continuous() and self._policies.num_points() <= _MOST_ENUMERATED:
            rest = list(self._policies.everything())
            rng.shuffle(rest)
            yield from rest


def _sampler(settings: SamplerSettings, seed: int) -> BaseSampler:
    """One of Optuna's own: TPE where the search's own has no accuracy to learn."""
    if settings.name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=settings.options["population_size"])
    candidates = settings.options.get("n_ei_candidates", SAMPLERS["tpe"]["n_ei_candidates"][1])
    with warnings.catch_warnings():
        # `group` is what makes TPE model a conditional space; Optuna still calls it experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=1, n_ei_candidates=candidates)


def _copy_in_memory(study: Study, trials: Sequence[FrozenTrial], sampler: BaseSampler) -> Study:
    """The study's trials in a study of their own."""
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
