"""What the trials of a study tell a model: whole trainings, and those that ended at a rung or are under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rlsearch.policy import Policy
from rlsearch.search.encoding import Encoding, Floats
from rlsearch.search.forecast import Line, fit_line
from rlsearch.search.gaussian_process import Points
from rlsearch.search.outcome import OUTCOME, Outcome
from rlsearch.training.loop import TrainingSpec


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

    A training that was stopped counts as what the others' accuracy became from such a one after the same epoch
    (`rlsearch.search.forecast`), with their spread about that; NaN where too few of them tell.

    Returns:
        accuracies and variances, (N,) each.
    """
    whole = [item for item in observed if item.is_whole]
    values, variances = np.full(len(observed), np.nan), np.zeros(len(observed))
    lines: dict[int, Line | None] = {}
    for index, item in enumerate(observed):
        epoch = len(item.curve)
        if item.is_whole:
            values[index] = item.curve[-1]
        elif epoch:
            if epoch not in lines:
                longer = [other.curve for other in whole if len(other.curve) > epoch]
                lines[epoch] = fit_line([curve[epoch - 1] for curve in longer], [curve[-1] for curve in longer])
            line = lines[epoch]
            if line is not None:
                values[index] = line.at(item.curve[-1])
                variances[index] = line.deviation(item.curve[-1]) ** 2
    return values, variances
