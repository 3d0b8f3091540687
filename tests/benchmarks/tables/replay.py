"""Whole searches in seconds: what a training would give comes from a landscape, all else is the real search.

The study, the searcher, the sampler and the scheduler are those of a run; only Tune's loop and the trainings are left
out. Trials take as long as their operations, so that several at once end in a sensible order.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from rich.console import Console

from rlsearch import Policy, TrainingSpec
from rlsearch.results.pareto import hypervolume, pareto_front
from rlsearch.results.selection import REFERENCE_FACTOR
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.outcome import Outcome
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.progress import SearchProgress
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.scheduler import Racing
from rlsearch.search.searcher import StopSearch, StudySearcher
from rlsearch.search.space import SearchSpace
from rlsearch.search.study import RunStudy
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.trial_spec import TrialSpec

# A space's images, which play no part but in operations.
IMAGES = 480


MakeSampler: TypeAlias = Callable[[PolicySpace, HardConstraints, ExactCosts], Any]


class Landscape(Protocol):
    """What trainings give."""

    def curve(self, policy: Policy, training: TrainingSpec, seed: int) -> Sequence[float]:
        """The accuracy after every epoch, with its noise: the same for the same arguments."""

    def accuracy(self, policy: Policy, training: TrainingSpec) -> float:
        """The accuracy at the end, without noise."""


@dataclass(frozen=True)
class Table:
    """What all replays share.

    Attributes:
        space: what is searched.
        policies: of it.
        costs: of its model.
        landscape: what trainings give.
    """

    space: SearchSpace
    policies: PolicySpace
    costs: ExactCosts
    landscape: Landscape


@dataclass(frozen=True)
class Replayed:
    """One search.

    Attributes:
        policies: what was trained, with how, in the order of ends.
        epochs: how many each was trained.
        whole: whether each was trained to its end.
        work: operations of each.
        study: what the search has left.
    """

    policies: tuple[tuple[Policy, TrainingSpec], ...]
    epochs: tuple[int, ...]
    whole: tuple[bool, ...]
    work: tuple[float, ...]
    study: optuna.Study


def replay(
    table: Table,
    *,
    trials: int,
    seed: int,
    concurrent: int = 1,
    make: MakeSampler = PolicySampler,
    **settings: Any,
) -> Replayed:
    """A search through the classes of a real one.

    Args:
        table: what it searches.
        trials: how many.
        seed: of the proposals, and of every training's noise.
        concurrent: trials at once.
        make: what proposes.
        settings: of ``search``, beside those.
    """
    space = table.space
    space = replace(space, search=replace(space.search, trials=trials, seed=seed, **settings))
    policies = copy.copy(table.policies)  # looking at the model again would take a second
    policies.space = space
    baseline = Policy(space.model)
    constraints = HardConstraints(space.constraints, table.costs, baseline, space.training)
    storage = InMemoryStorage()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, directions=[*space.objectives.values()])
    study.set_user_attr("trials", trials)
    progress = SearchProgress(Console(quiet=True), space.objectives, trials)
    sampler = make(policies, constraints, table.costs)
    run_study = RunStudy(storage, study, space.objectives)
    searcher = StudySearcher(space, run_study, _NoFolder(), sampler, progress)  # type: ignore[arg-type]
    if space.search.min_epochs is not None:
        searcher.racing = Racing(
            space.search.min_epochs,
            space.search.eta,
            space.training.epochs,
            space.objectives,
            searcher.is_protected,
            searcher.is_probe,
        )
    return _Loop(table, searcher, study, concurrent).run()


class _NoFolder:
    """In place of a run's folder: a replay leaves no tables."""

    def checkpoints(self, number: int) -> Path:
        return Path(str(number))

    def write_trial(self, *_: object) -> None: ...

    def write_trials(self, *_: object) -> None: ...


class _Loop:
    """What Tune does: starts trials, hands on their epochs, and stops those that the scheduler wants to stop."""

    def __init__(self, table: Table, searcher: StudySearcher, study: optuna.Study, concurrent: int) -> None:
        self._table = table
        self._searcher = searcher
        self._study = study
        self._concurrent = concurrent
        self._ends: list[tuple[float, str]] = []
        self._trials: dict[str, tuple[TrialSpec, list[dict[str, Any]]]] = {}
        self._reached: dict[str, int] = {}
        self._done: list[tuple[Policy, TrainingSpec, int, float]] = []

    def run(self) -> Replayed:
        now, number, more = 0.0, 0, True
        try:
            while True:
                while more and len(self._trials) < self._concurrent:
                    config = self._searcher.suggest(str(number))
                    more = isinstance(config, dict)
                    if more:
                        self._start(str(number), config["job"].spec, now)
                        number += 1
                if not self._ends:
                    break
                now, trial_id = heapq.heappop(self._ends)
                self._epoch(trial_id, now)
        except StopSearch as stop:
            if stop.cause is not None:
                raise stop.cause from stop
        policies = tuple((policy, training) for policy, training, _, _ in self._done)
        epochs = tuple(epochs for _, _, epochs, _ in self._done)
        whole = tuple(count == training.epochs for _, training, count, _ in self._done)
        return Replayed(policies, epochs, whole, tuple(work for *_, work in self._done), self._study)

    def _start(self, trial_id: str, spec: TrialSpec, now: float) -> None:
        cost = self._table.costs.cost(spec.policy, spec.training)
        curve = self._table.landscape.curve(spec.policy, spec.training, spec.seed)
        rows = [_metrics(cost, accuracy, epoch, spec.training.epochs) for epoch, accuracy in enumerate(curve, 1)]
        self._trials[trial_id], self._reached[trial_id] = (spec, rows), 0
        heapq.heappush(self._ends, (now + rows[0]["train_flops"], trial_id))

    def _epoch(self, trial_id: str, now: float) -> None:
        """The next epoch of a trial has ended."""
        spec, rows = self._trials[trial_id]
        self._reached[trial_id] += 1
        told = rows[: self._reached[trial_id]]
        is_last = len(told) == spec.training.epochs
        outcome = Outcome("COMPLETE" if is_last else "RUNNING", tuple(told))
        result = {**told[-1], "outcome": outcome, "done": is_last}
        racing = self._searcher.racing
        stopped = not is_last and racing is not None and self._stops(racing, trial_id, result)
        if is_last or stopped:
            del self._trials[trial_id]
            self._done.append((spec.policy, spec.training, len(told), told[-1]["train_flops"]))
            self._searcher.on_trial_complete(trial_id, result)
        else:
            self._searcher.on_trial_result(trial_id, result)
            heapq.heappush(self._ends, (now + rows[0]["train_flops"], trial_id))

    @staticmethod
    def _stops(racing: Racing, trial_id: str, result: dict[str, Any]) -> bool:
        trial: Any = SimpleNamespace(trial_id=trial_id)
        return racing.on_trial_result(None, trial, result) == Racing.STOP


def _metrics(cost: Any, accuracy: float, epoch: int, epochs: int) -> dict[str, Any]:
    work = cost.step_flops * IMAGES * epoch
    return EpochMetrics(
        epoch=epoch,
        epochs=epochs,
        accuracy=float(accuracy),
        validation_loss=math.nan,
        train_loss=math.nan,
        lr=0.0,
        params=cost.params,
        params_total=cost.params_total,
        learnable_params=cost.params,
        mean_learnable_params=cost.params,
        memory=cost.memory,
        memory_predicted=cost.memory,
        step_memory=cost.memory,
        train_flops=work,
        forward_flops=cost.forward_flops * IMAGES * epoch,
        forward_share=1.0,
        train_seconds=work / 1e9,
        samples_per_second=1.0,
        dropped_units=0,
        learning=(),
        left=(),
        device="replay",
    ).to_dict()


class Judge:
    """The hypervolume of what a search has trained, by accuracies without noise.

    Args:
        table: what is searched.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        base = table.costs.cost(Policy(table.space.model), table.space.training)
        self._scale = REFERENCE_FACTOR * np.array([base.params, base.memory, base.step_flops])
        self._known: dict[tuple[str, float], list[float]] = {}

    def losses(self, policy: Policy, training: TrainingSpec) -> list[float]:
        """The four objectives as losses in [0, 1]."""
        key = policy.hash, training.lr
        if key not in self._known:
            cost = self._table.costs.cost(policy, training)
            relative = np.array([cost.params, cost.memory, cost.step_flops]) / self._scale
            accuracy = self._table.landscape.accuracy(policy, training)
            self._known[key] = np.clip([1 - accuracy, *relative], 0, 1).tolist()
        return self._known[key]

    def trace(self, search: Replayed) -> list[float]:
        """The hypervolume after each trial, of those that were trained to their end."""
        found, points = [], [[1.0] * 4]
        for (policy, training), is_whole in zip(search.policies, search.whole, strict=True):
            if is_whole:
                points.append(self.losses(policy, training))
            found.append(hypervolume(points, np.ones(4)))
        return found

    def lost(self, search: Replayed, margin: float = 0.0) -> tuple[int, int]:
        """What racing stopped of the true front: of all that was proposed, by accuracies without noise.

        Args:
            search: one search.
            margin: by how much more accurate than all that costs no more a policy must be to count as lost.

        Returns:
            how many points the true front has, and how many of them were stopped.
        """
        losses = np.array([self.losses(policy, training) for policy, training in search.policies])
        on_front = pareto_front(losses)
        stopped = on_front & ~np.array(search.whole)
        lost = 0
        for index in np.flatnonzero(stopped):
            rivals = losses[np.array(search.whole) & (losses[:, 1:] <= losses[index, 1:]).all(axis=1)]
            lost += len(rivals) == 0 or losses[index, 0] + margin < rivals[:, 0].min()
        return int(on_front.sum()), int(lost)


def first_reaching(trace: Sequence[float], level: float) -> float:
    """How many trials it took to reach a hypervolume; infinite where it never did."""
    return next((index for index, value in enumerate(trace, 1) if value >= level), math.inf)
