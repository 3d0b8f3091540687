"""How a trial ended: what a worker reports and the study keeps. No Ray, no Optuna, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlsearch.results.table_file import METRICS

OUTCOME = "outcome"
"""A trial's user attribute in the study that holds its `Outcome`."""

CONSTRAINT = "constraint"
"""The reason's first word where a trial was trained to its end and broke a constraint."""

STORAGE = "storage"
"""The reason's first word where a worker could not write to the run's folder: no fault of the trial."""


@dataclass(frozen=True)
class Outcome:
    """What is known of a trial after an epoch, or at its end.

    Attributes:
        state: one of `rlsearch.results.tables.STATES`; RUNNING while the trial goes on.
        epochs: the metrics of every epoch so far, as ``EpochMetrics.to_dict`` gives them.
        reason: why the trial is not COMPLETE, or a note on how it became so.
        detail: the end of the traceback, for whoever looks for the cause.
    """

    state: str
    epochs: tuple[Mapping[str, Any], ...] = ()
    reason: str | None = None
    detail: str | None = None

    @property
    def final(self) -> Mapping[str, Any]:
        """The metrics of the last epoch; empty without one."""
        return self.epochs[-1] if self.epochs else {}

    def has_values(self, objectives: Iterable[str]) -> bool:
        """Whether the trial was trained to its end and every objective is a finite number.

        Running out of memory is INFEASIBLE as breaking a constraint is, but leaves no result.
        """
        broke_constraint = self.state == "INFEASIBLE" and (self.reason or "").startswith(CONSTRAINT)
        return (self.state == "COMPLETE" or broke_constraint) and not unmeasured(self.final, objectives)

    def cleaned(self) -> Outcome:
        """The same with None for every metric that is missing, no number, or not finite: tables hold numbers alone."""
        return replace(self, epochs=tuple({**row, **dict.fromkeys(unmeasured(row, METRICS))} for row in self.epochs))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the epochs by column: a name is written once, not once an epoch."""
        columns = {name: [row[name] for row in self.epochs] for name in self.final}
        return {"state": self.state, "reason": self.reason, "detail": self.detail, "epochs": columns}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_dict` wrote."""
        columns = content["epochs"]
        rows = tuple(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return cls(content["state"], rows, content["reason"], content["detail"])


def unmeasured(metrics: Mapping[str, Any], objectives: Iterable[str]) -> list[str]:
    """The objectives that are missing, no number, or not finite."""

    def is_finite(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    return [name for name in objectives if not is_finite(metrics.get(name))]
