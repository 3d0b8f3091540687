"""Races trials: stops those that have next to no chance of improving the front, so that their time goes to others.

A rung compares the accuracy that trials have *there* with what their policies cost. Reconstruction (METHODS section 5).
Of three or four objectives most trials are dominated by no other, so that ranks stop few of them; and accuracies are
noisy, so that ranks stop many that would have been on the front. A trial is judged by its chance instead
(`rlsearch.search.odds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from rlsearch.results.racing import RACED_OUT, is_poor, rungs
from rlsearch.search.odds import Finished, Odds
from rlsearch.search.outcome import unmeasured

CHANCE, CHANCE_WHERE_POOR = 0.05, 0.01
"""A trial is stopped below this chance of improving the front; the second where a rung says little about the end."""

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


def losses_at_rung(metrics: Mapping[str, Any], objectives: Iterable[str]) -> tuple[float, ...]:
    """What is compared at a rung, all minimised, accuracy first.

    Args:
        metrics: of a trial after the rung's epoch, as ``EpochMetrics.to_dict()`` gives them.
        objectives: the search's objectives.
    """
    costs = _costs_at_rung(objectives)
    values = [metrics[name] / metrics["epoch"] if name in _SUMS else metrics[name] for name in costs]
    return (-float(metrics["accuracy"]), *map(float, values))


def _costs_at_rung(objectives: Iterable[str]) -> list[str]:
    """The metrics beside the accuracy that are compared at a rung."""
    return list(dict.fromkeys(_AT_A_RUNG[name] for name in objectives if name in _AT_A_RUNG))


def is_best_in_one(losses: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether a trial is an end of the front at its rung: in some objective no other is better, ties included.

    So is whatever dominates all others. An objective in which all are equal tells nothing and has no end.

    Args:
        losses: (m,), minimised, of the trial in question.
        others: (n, m) of the other trials that reached the rung.
    """
    matrix = np.array([losses, *others])
    tells = np.ptp(matrix, axis=0) > 0
    return bool(not tells.any() or (matrix[0] <= matrix.min(axis=0))[tells].any())


class _Rung:
    """The trials that reached one epoch.

    Attributes:
        losses: of every trial that reached it, by an id.
        finished: those of them that were trained to their end.
    """

    def __init__(self) -> None:
        self.losses: dict[str, tuple[float, ...]] = {}
        self.finished: list[Finished] = []
        self._odds: Odds | None = None

    def add(self, finished: Finished) -> None:
        self.finished.append(finished)
        self._odds = None

    @property
    def odds(self) -> Odds:
        """What the finished trials tell, worked out once for each set of them."""
        if self._odds is None:
            self._odds = Odds(self.finished)
        return self._odds


class Racing(FIFOScheduler):
    """Starts trials in their order, and stops at a rung those that have next to no chance of improving the front.

    A trial goes on where it is protected; where fewer than eta trials reached the rung; where it is the best there in
    any one objective, ties included; and where its chance to be more accurate in the end than every complete trial that
    costs no more is at least 5 %. Where the accuracies at the rung and at the end correlate poorly (Kendall's tau-b
    below 0.5 over 8 trials or more), at least 1 %. Before 8 trials have ended nothing is stopped.

    The searcher reads `raced_out` in ``on_trial_complete``, which Tune calls after the scheduler: a trial that is in it
    ends as PRUNED, never as COMPLETE.

    Args:
        min_epochs: the first rung; the following are min_epochs * eta^k.
        eta: see above; fewer trials than this at a rung are not compared.
        epochs: what a whole trial trains.
        objectives: the search's objectives.
        protected: tells by its Tune id whether a trial is never stopped (the baseline and the controls).
        probes: tells by its Tune id whether a trial is to train to the first rung and no further, whatever it shows.

    Attributes:
        raced_out: why each stopped trial was stopped, by its Tune id.
    """

    def __init__(
        self,
        min_epochs: int,
        eta: int,
        epochs: int,
        objectives: Iterable[str],
        protected: Callable[[str], bool],
        probes: Callable[[str], bool] = lambda trial_id: False,
    ) -> None:
        super().__init__()
        self.raced_out: dict[str, str] = {}
        self._eta = eta
        self._epochs = epochs
        self._objectives = tuple(objectives)
        self._protected = protected
        self._probes = probes
        self._rungs = {epoch: _Rung() for epoch in rungs(min_epochs, eta, epochs)}

    def remember(self, key: str, epochs: Sequence[Mapping[str, Any]], state: str) -> None:
        """Takes in a trial of an earlier run of this search, so that a resumed search races as before.

        Args:
            key: what no other trial is called.
            epochs: the metrics of every epoch.
            state: how it ended.
        """
        for metrics in epochs:
            self._reach(key, metrics)
        self.learn(epochs, state)

    def learn(self, epochs: Sequence[Mapping[str, Any]], state: str) -> None:
        """Takes in the end of a trial: what was trained in full tells what a rung says about the end.

        Args:
            epochs: the metrics of every epoch.
            state: COMPLETE, or INFEASIBLE for one that broke a constraint; of other trials nothing is learned here.
        """
        if state not in ("COMPLETE", "INFEASIBLE") or not epochs or epochs[-1]["epoch"] != self._epochs:
            return
        compared = ("accuracy", *_costs_at_rung(self._objectives))
        if unmeasured(epochs[-1], compared):
            return
        accuracy, *costs = losses_at_rung(epochs[-1], self._objectives)
        drops = _drops(epochs)
        for metrics in epochs:
            if metrics["epoch"] in self._rungs and not unmeasured(metrics, compared):
                there, *costs_there = losses_at_rung(metrics, self._objectives)
                finished = Finished(-there, -accuracy, tuple(costs_there), tuple(costs), state == "COMPLETE", drops)
                self._rungs[metrics["epoch"]].add(finished)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: dict[str, Any]) -> str:
        """Tune's question after every epoch: go on, or stop?"""
        # All epochs so far: a resumed trial may have passed a rung before this process began.
        epochs = result["outcome"].epochs if "outcome" in result else (result,)
        for metrics in epochs:
            self._reach(trial.trial_id, metrics)
        reason = self._why_stopped(trial.trial_id, result.get("epoch", 0), _drops(epochs))
        if reason is None:
            return str(TrialScheduler.CONTINUE)
        self.raced_out[trial.trial_id] = reason
        return str(TrialScheduler.STOP)

    def debug_string(self) -> str:
        """What Tune prints about its scheduler."""
        return f"Racing: {len(self.raced_out)} stopped at rungs {list(self._rungs)}"

    def _reach(self, key: str, metrics: Mapping[str, Any]) -> None:
        """Enters a trial at the rung that an epoch is; not where something is no number: it is about to fail."""
        rung = self._rungs.get(metrics.get("epoch", 0))
        if rung is not None and not unmeasured(metrics, ("accuracy", *_costs_at_rung(self._objectives))):
            rung.losses[key] = losses_at_rung(metrics, self._objectives)

    def _why_stopped(self, trial_id: str, epoch: int, drops: bool) -> str | None:
        """Why a trial is stopped after an epoch; None where it goes on."""
        if self._rungs and epoch >= min(self._rungs) and self._probes(trial_id):
            return f"probe: trained {epoch} of {self._epochs} epochs to learn which layers bear replacing"
        rung = self._rungs.get(epoch)
        if rung is None or trial_id not in rung.losses or self._protected(trial_id):
            return None
        losses = rung.losses[trial_id]
        others = [found for key, found in rung.losses.items() if key != trial_id]
        if len(others) + 1 < self._eta or is_best_in_one(losses, others):
            return None
        odds = rung.odds
        chance = odds.improving(-losses[0], losses[1:], drops)
        least = CHANCE_WHERE_POOR if is_poor(odds.num_trials, odds.correlation) else CHANCE
        if chance >= least:
            return None
        return f"{RACED_OUT} after epoch {epoch}: its chance to improve the front is {chance:.1%}, below {least:.0%}"


def _drops(epochs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a trial has Learn&Drop: it tells its layers in its first epoch."""
    return any(metrics.get("learning") for metrics in epochs)
