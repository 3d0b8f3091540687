"""How far trainings of one policy differ: the baseline's accuracies by seed."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from rlsearch.results.tables import Run, TrialRecord

REPEAT = "baseline repeat"
"""The origin of a trial that is the baseline again, with another seed."""


@dataclass(frozen=True)
class Noise:
    """The baseline trained several times.

    Attributes:
        seeds: of the trainings, at least two.
        accuracies: of each, in [0, 1].
    """

    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]

    @property
    def sd(self) -> float:
        """The standard deviation of the accuracies (of a sample), as a share."""
        return statistics.stdev(self.accuracies)

    @property
    def sentence(self) -> str:
        """The noise in words, and what follows from it."""
        values = ", ".join(f"{100 * accuracy:.2f}" for accuracy in self.accuracies)
        spread = f"standard deviation {100 * self.sd:.2f} points"
        return f"the baseline by seed: {values} %, {spread}; smaller differences between single trainings are noise"


def baseline_trainings(run: Run) -> list[TrialRecord]:
    """The baseline and its repeats, as far as they were trained to the end; by number."""
    return [
        record
        for record in run.records
        if record.origin in ("baseline", REPEAT)
        and record.state in ("COMPLETE", "INFEASIBLE")
        and record.accuracy is not None
        and math.isfinite(record.accuracy)
    ]


def baseline_noise(run: Run) -> Noise | None:
    """What the baseline's seeds say; None where it was trained with fewer than two."""
    found = [(record.seed, record.accuracy) for record in baseline_trainings(run) if record.accuracy is not None]
    return Noise(*zip(*found, strict=True)) if len(found) > 1 else None
