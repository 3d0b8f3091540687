"""Races trials: stops those that are far behind at a rung, so that their time goes to others.

A rung compares the accuracy that trials have *there* with what their policies cost. Reconstruction (METHODS section 5),
after successive halving for several objectives; unlike Syne Tune's, a rank here is a rank: a newcomer that dominates
all others at its rung is never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from rlsearch.results.pareto import nondominated_ranks

# What stands for each objective while a trial is under way: costs that are exact from its start, FLOPs an epoch, and
# what is a mean over the images so far. Seconds at a rung would tell how crowded the device was.
_AT_A_RUNG = {
    "params": "params",
    "params_total": "params_total",
    "memory": "memory_predicted",
    "memory_predicted": "memory_predicted",
    "train_flops": "train_flops",
    "forward_flops": "forward_flops",
    "forward_share": "forward_share",
    "mean_learnable_params": "mean_learnable_params",
    "train_seconds": "train_flops",
    "samples_per_second": "train_flops",
}
_SUMS = ("train_flops", "forward_flops")


def rungs(min_epochs: int, eta: int, epochs: int) -> tuple[int, ...]:
    """The epochs after which trials are compared: min_epochs * eta^k, before the last epoch."""
    found = []
    epoch = min_epochs
    while epoch < epochs:
        found.append(epoch)
        epoch *= eta
    return tuple(found)


def losses_at_rung(metrics: Mapping[str, Any], objectives: Iterable[str]) -> tuple[float, ...]:
    """What is compared at a rung, all minimised.

    Args:
        metrics: of a trial after the rung's epoch, as ``EpochMetrics.to_dict()`` gives them.
        objectives: the search's objectives.
    """
    costs = dict.fromkeys(_AT_A_RUNG[name] for name in objectives if name in _AT_A_RUNG)
    values = [metrics[name] / metrics["epoch"] if name in _SUMS else metrics[name] for name in costs]
    return (-float(metrics["accuracy"]), *map(float, values))


def goes_on(losses: Sequence[Sequence[float]], eta: int) -> bool:
    """Whether the last of the trials that reached a rung is among the better 1/eta there.

    Trials stand in the order of their non-dominated rank, and trials of one rank stand side by side: the last one is
    out when ceil(n / eta) trials have a better rank. So whatever nothing dominates goes on, the ends of the front among
    it. Fewer than eta trials are too few to tell.

    Args:
        losses: (n, m), minimised; one row a trial, the one in question last.
        eta: the share that goes on is 1/eta.
    """
    if len(losses) < eta:
        return True
    ranks = nondominated_ranks(np.asarray(losses, dtype=float))
    return int(np.sum(ranks < ranks[-1])) < math.ceil(len(losses) / eta)


class Racing(FIFOScheduler):
    """Starts trials in their order, and stops at a rung those that are outside the better 1/eta.

    The searcher reads `raced_out` in ``on_trial_complete``, which Tune calls after the scheduler: a trial that is in it
    ends as PRUNED, never as COMPLETE.

    Args:
        min_epochs: the first rung; the following are min_epochs * eta^k.
        eta: the share that goes on at a rung is 1/eta.
        epochs: what a whole trial trains.
        objectives: the search's objectives.
        protected: tells by its Tune id whether a trial is never stopped (the baseline and the controls).

    Attributes:
        raced_out: why each stopped trial was stopped, by its Tune id.
    """

    def __init__(
        self, min_epochs: int, eta: int, epochs: int, objectives: Iterable[str], protected: Callable[[str], bool]
    ) -> None:
        super().__init__()
        self.raced_out: dict[str, str] = {}
        self._eta = eta
        self._objectives = tuple(objectives)
        self._protected = protected
        self._rungs: dict[int, list[tuple[float, ...]]] = {epoch: [] for epoch in rungs(min_epochs, eta, epochs)}

    def remember(self, metrics: Mapping[str, Any]) -> None:
        """Takes in an epoch of a trial of an earlier run of this search, so that a resumed search races as before."""
        self._reached(metrics)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: dict[str, Any]) -> str:
        """Tune's question after every epoch: go on, or stop?"""
        rung = self._reached(result)
        if rung is None or self._protected(trial.trial_id) or goes_on(rung, self._eta):
            return str(TrialScheduler.CONTINUE)
        self.raced_out[trial.trial_id] = (
            f"raced out after epoch {result['epoch']}: outside the better 1/{self._eta} of {len(rung)} trials"
        )
        return str(TrialScheduler.STOP)

    def debug_string(self) -> str:
        """What Tune prints about its scheduler."""
        return f"Racing: {len(self.raced_out)} stopped at rungs {list(self._rungs)}"

    def _reached(self, metrics: Mapping[str, Any]) -> list[tuple[float, ...]] | None:
        """The rung that an epoch is, with the epoch's losses added last; None where it is no rung or not finite."""
        rung = self._rungs.get(metrics.get("epoch", 0))
        if rung is None:
            return None
        losses = losses_at_rung(metrics, self._objectives)
        if not all(map(math.isfinite, losses)):  # the trial has diverged: it is about to fail by itself
            return None
        rung.append(losses)
        return rung
