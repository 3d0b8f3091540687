"""A trial beside the baseline, and beside the controls that its method has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rlsearch.results.selection import baseline, candidates, losses_of
from rlsearch.results.tables import METRICS, Run, TrialRecord

BEATS, EQUAL, MIXED, BEATEN, SAME, MISSING = (
    "the pick beats it",
    "the pick equals it",
    "the pick does not beat it",
    "it beats the pick",
    "it is the pick",
    "it did not complete",
)


def difference(metric: str, value: float | None, reference: float | None) -> float | None:
    """How far ``value`` is from ``reference``: points of accuracy, else per cent of the reference.

    Args:
        metric: one of `METRICS`.
        value: in the metric's unit.
        reference: the baseline's value, in the same unit.

    Returns:
        Below 0 for less; None where one of the two is missing or not finite, or where the reference is 0.
    """
    if value is None or reference is None or not (math.isfinite(value) and math.isfinite(reference)):
        return None
    if metric == "accuracy":
        return 100 * (value - reference)
    return 100 * (value / reference - 1) if reference else None


def savings(run: Run, trial: TrialRecord) -> dict[str, float]:
    """The trial's difference to the baseline in every metric that both have, by metric.

    Accuracy is in points, everything else in per cent of the baseline; below 0 the trial has less. Empty while there
    is no baseline.
    """
    reference = baseline(run)
    if reference is None:
        return {}
    found = {name: difference(name, trial.metric(name), reference.metric(name)) for name in METRICS}
    return {name: change for name, change in found.items() if change is not None}


@dataclass(frozen=True)
class ControlVerdict:
    """Whether the pick beats one control.

    Attributes:
        control: the control's trial.
        verdict: `BEATS` (nowhere worse, somewhere better), `EQUAL`, `MIXED` (each is better in something), `BEATEN`,
            `SAME` (the pick is this control) or `MISSING` (the control has no result).
        better_in: the objectives in which the control is better than the pick.
    """

    control: TrialRecord
    verdict: str
    better_in: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The verdict in words, with its reason."""
        label = f"{self.control.origin} (trial {self.control.trial})"
        if self.verdict == MIXED:
            return f"{label}: {self.verdict}: the control is better in {', '.join(self.better_in)}"
        if self.verdict == MISSING:
            return f"{label}: {self.verdict} ({self.control.state}), so it says nothing"
        return f"{label}: {self.verdict}"


def control_verdicts(run: Run, pick: TrialRecord) -> list[ControlVerdict]:
    """The pick against every control of the run, one training each: differences within seed noise decide nothing."""
    measured = {record.trial for record in candidates(run)}
    verdicts = []
    for control in run.records:
        if not control.origin.endswith("control"):
            continue
        if control.trial == pick.trial:
            verdicts.append(ControlVerdict(control, SAME))
        elif control.trial not in measured:
            verdicts.append(ControlVerdict(control, MISSING))
        else:
            verdicts.append(_verdict(run, pick, control))
    return verdicts


def _verdict(run: Run, pick: TrialRecord, control: TrialRecord) -> ControlVerdict:
    ours, theirs = losses_of(run, [pick, control])
    better_in = tuple(np.array(list(run.objectives))[theirs < ours].tolist())
    if np.array_equal(ours, theirs):
        return ControlVerdict(control, EQUAL)
    if not better_in:
        return ControlVerdict(control, BEATS)
    return ControlVerdict(control, MIXED if (ours < theirs).any() else BEATEN, better_in)
