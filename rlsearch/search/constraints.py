"""Bounds on a trial's metrics: their text, and how far a value is from keeping them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rlsearch.config import typed
from rlsearch.errors import Problem, suggestion
from rlsearch.results.tables import METRICS

EXACT_METRICS = ("params", "params_total", "memory_predicted")
"""Metrics that a policy's cost gives exactly before it trains; ``memory`` is another where it is the predicted one."""

_KNOWN_WITHOUT_DROPPING = ("train_flops", "forward_flops", "forward_share", "mean_learnable_params")

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
        elif (wrong := _why_senseless(constraint)) is not None:
            problems.append(Problem(f"{key}.{metric}", f"{wrong}, got {text!r}"))
        else:
            found.append(constraint)
    return tuple(found)


def check_objectives(
    objectives: Iterable[str], constraints: Iterable[Constraint], has_learn_drop: bool, problems: list[Problem]
) -> None:
    """Adds a problem where neither an objective nor a constraint is left for a training to tell.

    Args:
        objectives: their metrics.
        constraints: bounds, on others possibly.
        has_learn_drop: whether layers may leave training, which nobody knows beforehand.
        problems: where the problem goes.
    """
    judged = [*objectives, *(constraint.metric for constraint in constraints)]
    known = {*EXACT_METRICS, "memory", *(() if has_learn_drop else _KNOWN_WITHOUT_DROPPING)}
    if judged and known.issuperset(judged):
        names = list(objectives)
        told = f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {'is' if len(names) == 1 else 'are'}"
        message = f"{told} known before training, so that nothing needs to be trained; add accuracy: maximize"
        problems.append(Problem("objectives", message))


def _why_senseless(constraint: Constraint) -> str | None:
    """Why no trial, or any, keeps a bound whatever the model; None where that takes a look at it."""
    if constraint.metric == "accuracy" and not constraint.relative and constraint.value > 1:
        return "must be at most 1: it is a share (95 % is 0.95)"
    if constraint.op == "<=" and constraint.value == 0:
        return "must be above 0: no trial keeps it"
    return None


def _parse(metric: str, text: object) -> Constraint | None:
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    try:
        value = float(match[2])
    except ValueError:  # 1.2.3
        return None
    return Constraint(metric, match[1], value, match[3] == "x") if math.isfinite(value) else None
