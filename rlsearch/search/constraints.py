"""Bounds on a trial's metrics: their text, and how far a value is from keeping them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlsearch.config import typed
from rlsearch.errors import Problem, suggestion
from rlsearch.results.tables import METRICS

EXACT_METRICS = ("params", "params_total", "memory_predicted")
"""Metrics that a policy's cost gives exactly before it trains; ``memory`` is another where it is the predicted one."""

_TEXT = re.compile(r"\s*(<=|>=)\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(x?)\s*")


@dataclass(frozen=True)
class Constraint:
    """A bound that trials are to keep.

    Attributes:
        metric: one of `rlsearch.results.tables.METRICS`.
        op: ``<=`` or ``>=``.
        value: the bound, in the metric's unit; or the multiple of the baseline's value.
        relative: whether ``value`` multiplies the baseline's.
    """

    metric: str
    op: str
    value: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.op} {self.value}{'x' if self.relative else ''}"

    def violation(self, measured: float, baseline: float) -> float:
        """How far a trial misses the bound, in the metric's unit; at or below 0 it keeps it (as Optuna counts).

        Args:
            measured: the trial's value.
            baseline: the value of the end-to-end baseline (trial 0); used by relative bounds only.
        """
        bound = self.value * baseline if self.relative else self.value
        return measured - bound if self.op == "<=" else bound - measured


def parse_constraints(content: object, key: str, problems: list[Problem]) -> tuple[Constraint, ...]:
    """Constraints as written in a search space: metric to ``"<= 1.0x"`` or ``">= 0.9"``."""
    checked: Mapping[str, object] | None = typed(content, dict, key, problems)
    found = []
    for metric, text in (checked or {}).items():
        if metric not in METRICS:
            problems.append(Problem(f"{key}.{metric}", f"unknown metric{suggestion(str(metric), METRICS)}"))
            continue
        constraint = _parse(metric, text)
        if constraint is None:
            rule = 'must be a bound such as "<= 1.0x" (x: the end-to-end baseline) or ">= 0.9"'
            problems.append(Problem(f"{key}.{metric}", f"{rule}, got {text!r}"))
        else:
            found.append(constraint)
    return tuple(found)


def _parse(metric: str, text: object) -> Constraint | None:
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    try:
        value = float(match[2])
    except ValueError:  # 1.2.3
        return None
    return Constraint(metric, match[1], value, match[3] == "x") if math.isfinite(value) else None
