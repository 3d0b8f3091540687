"""What the trials of a study tell a model: whole trainings, and those that ended at a rung or are under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rlsearch.policy import Policy
from rlsearch.search.encoding import Encoding, Floats
from rlsearch.search.gaussian_process import Points
from rlsearch.search.outcome import Outcome
from rlsearch.training.loop import TrainingSpec

OUTCOME = "outcome"
"""The trial's user attribute that holds its `Outcome`."""

# So many trainings to the end tell what an epoch's accuracy becomes.
_LEAST_PAIRS = 5


@dataclass(frozen=True)
class Observed:
    """One trial.

    Attributes:
        policy: what was trained.
        training: how.
        params: the decisions that led to it.
        curve: the accuracy after each epoch so far.
        final: the last epoch's metrics; empty where there is none.
        is_whole: whether it was trained to its end.
        is_running: whether it is still under way.
        is_feasible: whether it keeps all constraints, as far as that is known.
    """

    policy: Policy
    training: TrainingSpec
    params: Mapping[str, Any]
    curve: tuple[float, ...]
    final: Mapping[str, Any]
    is_whole: bool
    is_running: bool
    is_feasible: bool


def observe(trial: FrozenTrial) -> Observed | None:
    """A trial as a model sees it; None for one that tells nothing (it failed, or waits)."""
    outcome = Outcome.from_dict(trial.user_attrs[OUTCOME]) if OUTCOME in trial.user_attrs else Outcome("RUNNING")
    is_running = trial.state == TrialState.RUNNING
    is_whole = trial.state == TrialState.COMPLETE
    if not (is_running or is_whole or trial.state == TrialState.PRUNED):
        return None
    return Observed(
        policy=Policy.from_dict(trial.user_attrs["policy"]),
        training=TrainingSpec(**trial.user_attrs["training"]),
        params=trial.params,
        curve=tuple(float(row["accuracy"]) for row in outcome.epochs),
        final=outcome.final,
        is_whole=is_whole,
        is_running=is_running,
        is_feasible=all(violation <= 0 for violation in trial.constraints.values()),
    )


def points_of(encoding: Encoding, observed: Sequence[Observed]) -> Points:
    """The trials' policies and settings as numbers."""
    return Points(
        np.stack([encoding.units(item.policy) for item in observed]),
        np.stack([encoding.settings(item.policy, item.training) for item in observed]),
    )


def final_accuracies(observed: Sequence[Observed]) -> tuple[Floats, Floats]:
    """What each trial's accuracy is at its end, or is likely to become, and the variance of that beside the noise.

    A training that was stopped counts as what the others' accuracy became from such a one after the same epoch, by a
    line through them, with their spread about it; NaN where too few of them tell.

    Returns:
        accuracies and variances, (N,) each.
    """
    whole = [item for item in observed if item.is_whole]
    values, variances = np.full(len(observed), np.nan), np.zeros(len(observed))
    lines: dict[int, tuple[float, float, float] | None] = {}
    for index, item in enumerate(observed):
        epoch = len(item.curve)
        if item.is_whole:
            values[index] = item.curve[-1]
        elif epoch:
            if epoch not in lines:
                lines[epoch] = _line(
                    [(other.curve[epoch - 1], other.curve[-1]) for other in whole if len(other.curve) > epoch]
                )
            line = lines[epoch]
            if line is not None:
                slope, start, variances[index] = line
                values[index] = start + slope * item.curve[-1]
    return values, variances


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Slope, start and the variance about it of a line from an epoch's accuracy to the last one's."""
    if len(pairs) < _LEAST_PAIRS:
        return None
    before, after = np.array(pairs, dtype=np.float64).T
    spread = float(before.var())
    # The slope of a line through few noisy points is pulled towards 1: what is ahead stays ahead by as much.
    prior = 0.25 * spread + 1e-8
    slope = (float(np.mean((before - before.mean()) * (after - after.mean()))) + prior) / (spread + prior)
    slope = min(max(slope, 0.0), 2.0)
    start = float(after.mean() - slope * before.mean())
    variance = float(np.sum((after - start - slope * before) ** 2)) / (len(pairs) - 2)
    return slope, start, variance
