"""What ``rlsearch train`` says: one line an epoch, and a summary at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlsearch.learn_drop import Dropper
from rlsearch.results.departures import Departures, departures
from rlsearch.results.describe import describe_value
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.trial import Trial

_STORED_IN = {"pinned": "in host memory", "file": "in a file"}


def epoch_line(metrics: EpochMetrics, trial: Trial) -> str:
    """One epoch; where layers left with it, also which, and how their outputs will be had from now on."""
    line = (
        f"epoch {metrics.epoch}/{metrics.epochs}: accuracy {metrics.accuracy:.2%}, "
        f"train loss {metrics.train_loss:.4f}, {metrics.samples_per_second:,.0f} images/s"
    )
    if metrics.left:
        return f"{line}, {said(metrics.left)} left training; features {_where(trial)}"
    if trial.dropper is None or trial.dropper.cut == 0:
        return line
    return f"{line}, {trial.dropper.cut} of {len(trial.dropper.layers)} layers have left"


def summary(rows: Sequence[Mapping[str, Any]], trial: Trial) -> list[str]:
    """A whole training: what it took and gave, which layers left, and what that saved.

    Args:
        rows: the metrics of every epoch.
        trial: at its end.
    """
    first, last = rows[0], rows[-1]
    accuracy, seconds = (describe_value(name, last[name]) for name in ("accuracy", "train_seconds"))
    lines = [f"{last['epoch']} epochs in {seconds}: accuracy {accuracy} on the validation images"]
    found = departures(rows)
    if found is None or trial.dropper is None:
        return lines
    predicted = " (predicted)" if last["device"] == "cpu" else ""
    memory = [describe_value("memory", row["step_memory"]) for row in (first, last)]
    return [
        *lines,
        _departed(found) if found.cuts else nothing_left(trial.dropper, trial.spec.training.epochs),
        f"forward operations: {last['forward_share']:.1%} of end-to-end training's",
        f"memory of a step{predicted}: {memory[0]} in the first epoch, {memory[1]} in the last",
    ]


def said(layers: Sequence[str]) -> str:
    """Layers that follow each other, in words."""
    if len(layers) > 2:
        return f"{layers[0]} to {layers[-1]} ({len(layers)} layers)"
    return " and ".join(layers)


def nothing_left(dropper: Dropper, epochs: int) -> str:
    """Why no layer may have left, and what to try; only the first layer's score is in the way of all others."""
    settings, measured = dropper.settings, {name: score for name, score in dropper.scores.items() if score is not None}
    begun = "no layer left training: "
    if settings.score == "schedule":
        return f"{begun}try more epochs, or a lower warmup or interval, or a higher max_fraction"
    first, *_ = dropper.scores
    if first not in measured:
        return f"{begun}nothing was measured in {epochs} epochs; try more epochs, or a lower interval"
    lowest = min(measured, key=lambda name: measured[name])
    told = f"{begun}the {settings.score} of {first}, which must leave first, was at last {measured[first]:.2g} of its "
    told += "greatest" if lowest == first else f"greatest, and the lowest that of {lowest}, {measured[lowest]:.2g}"
    told += f"; the threshold is {settings.threshold:g}. Try more epochs, or "
    if measured[first] < settings.threshold:
        return f"{told}a lower patience, interval or warmup, or a higher max_fraction"
    if measured[first] >= 1:
        return f"{told}score=schedule: its parameters have not begun to settle"
    higher = _above(measured[first])
    return f"{told}threshold={higher:g}: with a higher one layers leave earlier, which may cost accuracy"


def _departed(found: Departures) -> str:
    cuts = ", ".join(f"{said(cut.left)} after epoch {cut.epoch}" for cut in found.cuts)
    total = len(found.layers)
    return f"{found.num_left} of {total} layers ({found.num_left / total:.0%}) left training: {cuts}"


def _where(trial: Trial) -> str:
    tier = trial.features_in
    if tier is None:
        return "recomputed"
    usual = "in memory" if trial.device.type == "cpu" else "on the device"
    return f"stored {_STORED_IN.get(tier, usual)}"


def _above(share: float) -> float:
    """The next tenth above a share; a threshold is at most 1."""
    return min(1.0, (math.floor(share * 10) + 1) / 10)
