"""The search's own sampler: trains next what is expected to add most to the front, costs being known beforehand.

Only accuracy has to be learned: a Gaussian process learns it from all trials, those that were raced out included.
Of some hundred new and valid policies (made at random, out of the front, and best by effects that add up), the one is
proposed that is expected to add the most hypervolume; what runs at the same time counts as what it is likely to become.
Reconstruction; the idea that costs known exactly leave one objective to be modelled stands in no paper we know of.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from rlsearch.results.pareto import pareto_front
from rlsearch.search.acquisition import expected_gains
from rlsearch.search.additive import SingleReplacements
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.encoding import Encoding, Floats
from rlsearch.search.gaussian_process import GaussianProcess, Points
from rlsearch.search.objective_losses import ObjectiveLosses, exact_metrics
from rlsearch.search.observations import Observed, final_accuracies, observe, points_of
from rlsearch.search.policy_space import Decided, PolicySpace
from rlsearch.search.ranges import draw
from rlsearch.search.space import SearchSpace
from rlsearch.search.variations import coarse_key, crossing, mutation, random_choices, same_choices, same_settings
from rlsearch.training.loop import TrainingSpec

# Shares of the candidates; the rest are the neighbours of the best of these.
_MUTATED, _CROSSED, _RANDOM, _ADDED_UP = 0.3, 0.2, 0.17, 0.03
_ROUNDS, _PARENTS = 2, 8
# An accuracy so many interquartile ranges below the median (a training that diverged) counts as one just there.
_FARTHEST = 3.0


@dataclass(frozen=True)
class _Candidate:
    """A new point with what is known of it."""

    decided: Decided
    exact: Mapping[str, float]


class FrontSampler(BaseSampler):
    """Chooses a whole point of a space whenever a trial begins.

    Its study's trials carry the user attributes ``policy``, ``training`` and ``outcome`` of `rlsearch.search.study`;
    the first one is the baseline.

    Args:
        policies: the space.
        costs: of its model.
        constraints: what an exact cost may not exceed.
        seed: of everything random; the same seed and trials give the same choice.
        candidates: among how many new points it chooses.

    Attributes:
        earlier: what trials of other studies on the same space tell of accuracies; never on this study's front.
    """

    def __init__(
        self, policies: PolicySpace, costs: ExactCosts, constraints: HardConstraints, seed: int, candidates: int = 600
    ) -> None:
        self._policies = policies
        self._costs = costs
        self._constraints = constraints
        self._seed = seed
        self._count = candidates
        self._encoding = Encoding(policies)
        self._singles = SingleReplacements(policies)
        self._alone: list[_Candidate] = []
        self._observed: dict[tuple[int, TrialState], Observed | None] = {}
        self._known_exact: dict[tuple[str, TrainingSpec], Mapping[str, float]] = {}
        self._chosen: dict[int, Mapping[str, Any]] = {}
        self.earlier: tuple[Observed, ...] = ()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Chooses the trial's point."""
        trials = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        self._chosen = {trial.number: self.choose(trials)}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None: a conditional space has no joint one."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, see `infer_relative_search_space`."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The chosen point's value; a random one of a parameter that it does not have."""
        chosen = self._chosen.get(trial.number, {})
        if param_name in chosen:
            return chosen[param_name]
        return draw(param_distribution, random.Random(f"{self._seed}/{trial.number}/{param_name}"))

    def choose(self, trials: Sequence[FrozenTrial]) -> Mapping[str, Any]:
        """The parameters of what should be trained after these trials; empty where they are too few to learn from."""
        rng = random.Random(f"{self._seed}/{len(trials)}")
        observed = [item for trial in trials if (item := self._observe(trial)) is not None]
        whole = [item for item in observed if item.is_whole]
        if not whole or len(whole) + sum(item.is_whole for item in self.earlier) < 2:
            return {}
        exact = [self._exact_of(item) for item in (*observed, *self.earlier)]
        view = _View(self._policies.space, self._encoding, observed, self.earlier, exact)
        seen = {coarse_key(trial.params, trial.distributions) for trial in trials}
        best: list[tuple[float, Decided]] = []
        for fresh in self._rounds(view, best, rng):
            new = list(self._admitted(fresh, seen))
            if new:
                gains = view.gains(new)
                best.extend((gain, item.decided) for gain, item in zip(gains.tolist(), new, strict=True))
                best.sort(key=lambda pair: -pair[0])
        return best[0][1].params if best else {}

    def _observe(self, trial: FrozenTrial) -> Observed | None:
        key = trial.number, trial.state
        if key not in self._observed or trial.state == TrialState.RUNNING:
            self._observed[key] = observe(trial)
        return self._observed[key]

    def _exact_of(self, item: Observed) -> Mapping[str, float]:
        """Worked out once: of a thousand trials it would take a second each time."""
        key = item.policy.hash, item.training
        if key not in self._known_exact:
            self._known_exact[key] = exact_metrics(self._costs, item.policy, item.training)
        return self._known_exact[key]

    def _admitted(self, points: Iterable[Decided], seen: set[Any]) -> Iterator[_Candidate]:
        """Those that are new and keep the exact constraints."""
        for decided in points:
            key = coarse_key(decided.params, decided.distributions)
            if key not in seen:
                seen.add(key)
                exact = self._exact(decided)
                if all(violation <= 0 for violation in self._constraints.violations_of(exact).values()):
                    yield _Candidate(decided, exact)

    def _rounds(
        self, view: _View, best: Sequence[tuple[float, Decided]], rng: random.Random
    ) -> Iterator[list[Decided]]:
        """Candidates, then the neighbours of those that turned out best."""
        decide, count = self._policies.decide, self._count
        parents = view.parents
        again = map(same_choices, parents) if self.earlier else ()  # what was best before has not been trained here
        mutated = (mutation(rng.choice(parents), rng, rng.choice((1, 1, 2, 3))) for _ in range(int(_MUTATED * count)))
        crossed = (crossing(rng.choice(parents), rng.choice(parents), rng) for _ in range(int(_CROSSED * count)))
        drawn = (random_choices(self._policies, rng) for _ in range(int(_RANDOM * count)))
        first = [decide(suggest) for suggest in (*again, *mutated, *crossed, *drawn)]
        first += self._added_up(view, rng)
        yield first
        rest = (count - len(first)) // _ROUNDS
        for _ in range(_ROUNDS):
            around = [decided.params for _, decided in best[:_PARENTS]] or parents
            yield [decide(mutation(rng.choice(around), rng, rng.choice((1, 1, 2)))) for _ in range(rest)]

    def _added_up(self, view: _View, rng: random.Random) -> Iterator[Decided]:
        """The best replacements if effects add up, with the settings of points on the front."""
        if not self._policies.blocks:
            return
        if not self._alone:
            self._alone = [_Candidate(decided, self._exact(decided)) for decided in self._singles.points]
        for blocks in self._singles.optima(view.losses(self._alone), rng, int(_ADDED_UP * self._count)):
            yield self._policies.decide(same_settings(rng.choice(view.parents), blocks, rng))

    def _exact(self, decided: Decided) -> Mapping[str, float]:
        return exact_metrics(self._costs, decided.policy, decided.training)


class _View:
    """What the trials so far say.

    Args:
        space: what is searched.
        encoding: of its points.
        own: the study's trials.
        earlier: those of other studies.
        exact: `exact_metrics` of ``own``, then of ``earlier``.

    Attributes:
        parents: the decisions of what nothing else, earlier trials included, is likely to dominate.
    """

    def __init__(
        self,
        space: SearchSpace,
        encoding: Encoding,
        own: Sequence[Observed],
        earlier: Sequence[Observed],
        exact: Sequence[Mapping[str, float]],
    ) -> None:
        self._encoding = encoding
        self._exact = exact
        whole = [item for item in own if item.is_whole]
        observed = [*own, *earlier]
        accuracies, variances = final_accuracies(observed)
        points = points_of(encoding, observed)
        known = np.flatnonzero(np.isfinite(accuracies))
        self._accuracy = self._model(points[known], accuracies[known], variances[known])
        finished = np.array([index for index, item in enumerate(own) if item.is_whole])
        known_costs = [exact[index] for index in finished]
        self._losses = ObjectiveLosses(space.objectives, encoding, whole, known_costs, points[finished])
        self._bounds = [constraint for constraint in space.constraints if constraint.metric == "accuracy"]
        self._reference = float(whole[0].final["accuracy"])
        running = np.array([index for index, item in enumerate(observed) if item.is_running], dtype=np.int64)
        if len(running):
            # What runs is taken to become what it is likely to: its like are then not proposed beside it.
            expected = self._accuracy.predict(points[running])[0]
            both = np.concatenate([known, running])
            self._accuracy = self._model(
                points[both],
                np.concatenate([accuracies[known], expected]),
                np.concatenate([variances[known], np.zeros(len(running))]),
            )
        self._set_front(observed, points, [*finished.tolist(), *running.tolist()])
        self.parents = self._best_of(earlier, points[np.arange(len(own), len(observed))])

    def _set_front(self, observed: Sequence[Observed], points: Points, members: Sequence[int]) -> None:
        # While nothing keeps all constraints, what comes near is made out of what breaks them.
        feasible = [index for index in members if observed[index].is_feasible] or list(members)
        kept = np.array(feasible, dtype=np.int64)
        self._front = self._accuracy.predict(points[kept])[0]
        self._front_costs = self._losses.predicted(points[kept], [self._exact[index] for index in kept])
        self._members = [observed[index] for index in kept]

    def _best_of(self, earlier: Sequence[Observed], points: Points) -> list[Mapping[str, Any]]:
        losses = np.column_stack([-self._front, self._front_costs])
        if earlier:
            costs = self._losses.predicted(points, self._exact[-len(earlier) :])
            before = np.column_stack([-self._accuracy.predict(points)[0], costs])
            losses = np.concatenate([losses, before])
        members = [*self._members, *earlier]
        return [item.params for item, is_on in zip(members, pareto_front(losses), strict=True) if is_on]

    def gains(self, candidates: Sequence[_Candidate]) -> Floats:
        """How much hypervolume each is expected to add."""
        points = self._points(candidates)
        mean, deviation = self._accuracy.predict(points)
        losses = self._losses.predicted(points, [item.exact for item in candidates])
        gains = expected_gains(mean, deviation, losses, self._front, self._front_costs)
        return gains * self._chances(mean, deviation)

    def losses(self, candidates: Sequence[_Candidate]) -> Floats:
        """What each is likely to have in every objective, minimised, accuracy first: (N, 1 + M)."""
        points = self._points(candidates)
        costs = self._losses.predicted(points, [item.exact for item in candidates])
        return np.column_stack([-self._accuracy.predict(points)[0], costs])

    def _points(self, candidates: Sequence[_Candidate]) -> Points:
        return Points(
            np.stack([self._encoding.units(item.decided.policy) for item in candidates]),
            np.stack([self._encoding.settings(item.decided.policy, item.decided.training) for item in candidates]),
        )

    def _chances(self, mean: Floats, deviation: Floats) -> Floats:
        """How likely each keeps the constraints on accuracy; those on exact costs are kept already."""
        chances = np.ones(len(mean))
        for constraint in self._bounds:
            # Linear in what is measured: at or below 0 the bound is kept.
            missing = np.array([constraint.violation(value, self._reference) for value in mean])
            chances *= ndtr(-missing / deviation)
        return chances

    def _model(self, points: Points, values: Floats, variances: Floats) -> GaussianProcess:
        quarter, middle, three = np.percentile(values, (25, 50, 75))
        values = np.maximum(values, middle - _FARTHEST * max(three - quarter, 1e-3))
        return GaussianProcess(points, values, variances, self._encoding.num_kinds, self._encoding.chains)
