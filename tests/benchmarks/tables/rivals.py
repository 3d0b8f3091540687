"""Who searches: rlsearch's own sampler, the others that it offers, and what people would put together themselves."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from replay import Replayed, Table, replay

from rlsearch import Policy
from rlsearch.search.additive import SingleReplacements
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.outcome import OUTCOME, Outcome
from rlsearch.search.policy_space import Decided, PolicySpace, params_key
from rlsearch.search.sampler import Proposal
from rlsearch.search.sampler_settings import parse_sampler
from rlsearch.search.start_design import SAMPLER
from rlsearch.search.variations import same_settings

KEEP = "keep"
# How often a sampler of Optuna is asked again for something new.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Rival:
    """One way to search.

    Attributes:
        search: table, trials and seed to what was trained.
        trials: how many it is given; fewer than 200 where its proposals take too long.
        most_seeds: likewise.
    """

    search: Callable[[Table, int, int], Replayed]
    trials: int = 200
    most_seeds: int = 1000


class Stock:
    """A sampler of Optuna as it comes, asked for valid policies; what was trained before is asked for again.

    Args:
        policies: of the space.
        sampler: of Optuna.
        flat: whether every unit is asked for, also those that the rest of the policy leaves no choice: a sampler that
            takes no conditional parameters sees nothing else.
    """

    def __init__(self, policies: PolicySpace, sampler: BaseSampler, flat: bool) -> None:
        self._policies = policies
        directions = [*policies.space.objectives.values()]
        self._own = optuna.create_study(directions=directions, sampler=sampler)
        self._asked: list[optuna.Trial] = []
        self._told = 0
        self._flat = flat
        self._random = RandomSampler(seed=policies.space.search.seed)

    def propose(self, study: optuna.Study) -> Proposal:
        """What `rlsearch.search.sampler.PolicySampler` does."""
        trials = study.get_trials(deepcopy=False)
        while self._told < len(self._asked):  # one trial at a time: all that was asked for has ended
            self._own.tell(self._asked[self._told], trials[1 + self._told].values)
            self._told += 1
        if not trials:
            return Proposal(Policy(self._policies.space.model), self._policies.space.training, "baseline")
        seen = {params_key(trial.params) for trial in trials}
        usual = self._own.sampler
        for attempt in itertools.count():
            # A sampler that has no random part would ask for the same thing for ever.
            self._own.sampler = usual if attempt < _ATTEMPTS else self._random
            asked = self._own.ask()
            decided = self._policies.decide(self._flattened(asked) if self._flat else asked._suggest)
            self._own.sampler = usual
            if decided.key not in seen:
                self._asked.append(asked)
                return Proposal(decided.policy, decided.training, SAMPLER, decided.params, decided.distributions)
            self._own.tell(asked, state=TrialState.FAIL)
        raise AssertionError("unreachable")

    def _flattened(self, asked: optuna.Trial) -> Callable[[str, Any], Any]:
        chosen = {
            unit: asked.suggest_categorical(unit, (KEEP, *variants)) for unit, variants in self._policies.blocks.items()
        }

        def suggest(name: str, distribution: Any) -> Any:
            kind, _, unit = name.partition(":")
            if kind == "replace":
                return chosen[unit] != KEEP
            if not unit:
                return asked._suggest(name, distribution)
            assert isinstance(distribution, CategoricalDistribution)
            return chosen[unit] if chosen[unit] in distribution.choices else distribution.choices[0]

        return suggest


class SensitivitiesAndProgram:
    """Every replacement by itself, trained to its end; then what an integer program says if their effects add up.

    The recipe of Bercovich et al., "Puzzle" (arXiv 2411.19146), with full trainings as scores; the program is solved
    for weights drawn at random, which is how it finds a front.
    """

    def __init__(self, policies: PolicySpace, constraints: HardConstraints, costs: ExactCosts) -> None:
        self._policies, self._costs = policies, costs
        self._singles = SingleReplacements(policies)
        self._rng = random.Random(policies.space.search.seed)

    def propose(self, study: optuna.Study) -> Proposal:
        """What `rlsearch.search.sampler.PolicySampler` does."""
        trials = study.get_trials(deepcopy=False)
        points = self._singles.points
        if len(trials) < len(points):
            return _proposal(points[len(trials)])
        seen = {params_key(trial.params) for trial in trials}
        return next(_proposal(point) for point in self._optima(trials) if point.key not in seen)

    def _optima(self, trials: list[Any]) -> Iterator[Decided]:
        ends = [Outcome.from_dict(trial.user_attrs[OUTCOME]).final for trial in trials[: len(self._singles.points)]]
        base = ends[0]
        names = [name for name in self._policies.space.objectives if name != "accuracy"]
        losses = np.array([[-end["accuracy"], *(end[name] / base[name] for name in names)] for end in ends])
        while True:
            # The recipe says nothing of a learning rate: half keep the default, half draw one.
            settings = self._singles.points[0].params if self._rng.random() < 0.5 else {}
            for blocks in self._singles.optima(losses, self._rng, 1):
                yield self._policies.decide(same_settings(settings, blocks, self._rng))


def _proposal(point: Decided) -> Proposal:
    return Proposal(point.policy, point.training, SAMPLER, point.params, point.distributions)


def ours(name: str, **settings: Any) -> Callable[[Table, int, int], Replayed]:
    """A search by one of the samplers that rlsearch offers."""

    def run(table: Table, trials: int, seed: int) -> Replayed:
        return replay(table, trials=trials, seed=seed, sampler=parse_sampler(name, []), **settings)

    return run


def stock(make: Callable[[int], BaseSampler], flat: bool = False) -> Callable[[Table, int, int], Replayed]:
    """A search by Optuna as it comes."""

    def run(table: Table, trials: int, seed: int) -> Replayed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return replay(table, trials=trials, seed=seed, make=lambda p, *_: Stock(p, make(seed), flat))

    return run


def program(table: Table, trials: int, seed: int) -> Replayed:
    """A search by sensitivities and an integer program."""
    return replay(table, trials=trials, seed=seed, make=SensitivitiesAndProgram)


FRONT, RACING, TPE = "front", "front, racing", "TPE as it comes"
RIVALS: dict[str, Rival] = {
    FRONT: Rival(ours("front"), 120),
    RACING: Rival(ours("front", min_epochs=1, eta=2), 120, 5),
    "front, sensitivities, racing": Rival(ours("front", min_epochs=1, eta=2, sensitivities=True), 120, 3),
    TPE: Rival(stock(lambda seed: TPESampler(seed=seed))),
    "TPE, multivariate": Rival(ours("tpe", startup_trials=10)),
    "NSGA-II": Rival(ours("nsga2", startup_trials=10)),
    "GPSampler": Rival(stock(lambda seed: GPSampler(seed=seed), flat=True), 30, 3),
    "sensitivities and program": Rival(program),
    "random": Rival(ours("random")),
}
