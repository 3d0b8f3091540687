"""Conditions on trials, as ``--where`` takes them: ``"accuracy>=0.9 and params<=0.8x"``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from rlsearch.errors import ConfigError, Problem, UserError, suggestion
from rlsearch.results.tables import METRICS, TrialRecord

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(x?)\s*")
_FORM = "must be METRIC, one of >= <= > <, and a number, with x after it for multiples of the baseline (params<=0.8x)"


@dataclass(frozen=True)
class Condition:
    """One condition: a metric against a bound.

    Attributes:
        metric: one of `METRICS`.
        comparison: ``>=``, ``<=``, ``>`` or ``<``.
        bound: the number, in the metric's unit or in multiples of the baseline.
        relative: whether the bound counts in multiples of the baseline's value.
    """

    metric: str
    comparison: str
    bound: float
    relative: bool = False

    def holds(self, record: TrialRecord, baseline: TrialRecord | None) -> bool:
        """Whether ``record`` meets the condition; a value that was never measured meets none.

        Raises:
            UserError: the bound is relative, and there is no baseline to be relative to.
        """
        bound = self.bound
        if self.relative:
            reference = None if baseline is None else baseline.metric(self.metric)
            if reference is None or not math.isfinite(reference):
                raise UserError(
                    f"--where: {self}: the run has no baseline with {self.metric}; give the bound as a number"
                )
            bound *= reference
        value = record.metric(self.metric)
        return value is not None and _OPERATORS[self.comparison](value, bound)

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound:g}{'x' if self.relative else ''}"


def parse_where(text: str) -> tuple[Condition, ...]:
    """The conditions of ``text``, parted by ``and`` or commas; all of them must hold.

    Raises:
        ConfigError: a part that is no condition, or an unknown metric; every one of them at once.
    """
    problems = []
    conditions = []
    for part in re.split(r"\s+and\s+|,", text, flags=re.IGNORECASE):
        match = _CONDITION.fullmatch(part)
        if match is None:
            problems.append(Problem("", f"{_FORM}, got {part.strip()!r}"))
            continue
        metric, comparison, bound, relative = match.groups()
        if metric not in METRICS:
            problems.append(Problem(metric, f"unknown metric{suggestion(metric, METRICS)}"))
        conditions.append(Condition(metric, comparison, float(bound), bool(relative)))
    if problems:
        raise ConfigError(problems, "--where")
    return tuple(conditions)
