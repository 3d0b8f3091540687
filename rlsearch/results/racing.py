"""What racing did in a run, and how far it could be trusted: the rank correlation between each rung and the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsearch.results.departures import epochs_of
from rlsearch.results.tables import Run

RACED_OUT = "raced out"
"""The first words of the reason of a trial that racing stopped."""
POOR_CORRELATION, LEAST_TRIALS = 0.5, 8
"""Below this correlation racing stops fewer trials at a rung; before as many trials have ended it stops none."""


@dataclass(frozen=True)
class RungFigures:
    """One rung of a run.

    Attributes:
        epoch: after which trials are compared.
        stopped: how many trials ended here because others were better.
        trials: how many were trained to their end and have an accuracy at this rung.
        correlation: Kendall's tau-b between their accuracy here and at the end; None where it is not defined.
    """

    epoch: int
    stopped: int
    trials: int
    correlation: float | None

    @property
    def is_poor(self) -> bool:
        """Whether an accuracy here says too little about the end, so that racing stops fewer trials."""
        return is_poor(self.trials, self.correlation)

    @property
    def sentence(self) -> str:
        """The rung in words."""
        found = "not defined" if self.correlation is None else f"{self.correlation:.2f}"
        return (
            f"after epoch {self.epoch}: {self.stopped} stopped, rank correlation with the end {found} "
            f"over {self.trials} trials{' (poor: fewer are stopped)' if self.is_poor else ''}"
        )


def rungs(min_epochs: int, eta: int, epochs: int) -> tuple[int, ...]:
    """The epochs after which trials are compared: min_epochs * eta^k, before the last epoch."""
    found = []
    epoch = min_epochs
    while epoch < epochs:
        found.append(epoch)
        epoch *= eta
    return tuple(found)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b: 1 for the same order, -1 for the opposite one, ties counted as neither.

    Args:
        first: (n,) finite values.
        second: (n,) finite values of the same trials.

    Returns:
        None where all values of one side are equal, or there are fewer than two.
    """
    from scipy.stats import kendalltau  # half a second to import, and only raced runs need it

    if len(first) < 2 or not np.ptp(first) or not np.ptp(second):
        return None
    return float(kendalltau(first, second).statistic)


def is_poor(trials: int, correlation: float | None) -> bool:
    """Whether so many trials show that a rung says too little about the end; too few show nothing."""
    return trials >= LEAST_TRIALS and (correlation is None or correlation < POOR_CORRELATION)


def racing_figures(run: Run) -> tuple[RungFigures, ...] | None:
    """Every rung of a run; None where its trials were not raced.

    Raises:
        RunFolderError: a table of epochs is damaged.
    """
    settings, training = run.space.get("search") or {}, run.space.get("training") or {}
    min_epochs, eta, epochs = settings.get("min_epochs"), settings.get("eta", 3), training.get("epochs")
    if min_epochs is None or epochs is None:
        return None
    pairs: dict[int, list[tuple[float, float]]] = {epoch: [] for epoch in rungs(min_epochs, eta, epochs)}
    for record in run.records:
        if record.state not in ("COMPLETE", "INFEASIBLE") or record.fidelity != epochs:
            continue
        accuracies = {row["epoch"]: row["accuracy"] for row in epochs_of(run, record)}
        final = accuracies.get(epochs)
        for epoch, found in pairs.items():
            there = accuracies.get(epoch)
            if there is not None and final is not None and math.isfinite(there) and math.isfinite(final):
                found.append((there, final))
    return tuple(_figures(run, epoch, found) for epoch, found in pairs.items())


def _figures(run: Run, epoch: int, pairs: Sequence[tuple[float, float]]) -> RungFigures:
    stopped = sum(
        record.state == "PRUNED" and record.fidelity == epoch and (record.reason or "").startswith(RACED_OUT)
        for record in run.records
    )
    return RungFigures(epoch, stopped, len(pairs), rank_correlation(*zip(*pairs, strict=True)) if pairs else None)
