"""Policies, values and differences in the few words that fit a table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any

from rlsearch.errors import printable
from rlsearch.policy import LearnDrop, Policy
from rlsearch.results.comparison import difference
from rlsearch.results.selection import baseline, policy_of
from rlsearch.results.tables import Run, TrialRecord

LABELS = {
    "accuracy": "accuracy",
    "params": "parameters",
    "params_total": "parameters in all",
    "memory": "memory",
    "memory_predicted": "memory, predicted",
    "train_flops": "compute",
    "forward_flops": "forward compute",
    "forward_share": "forward share",
    "mean_learnable_params": "mean learnable",
    "train_seconds": "training time",
    "samples_per_second": "speed",
}
"""The metrics as a reader calls them."""

TIMES = ("train_seconds", "samples_per_second")
"""The metrics that trials which share a device spoil for each other."""

SHARED = "†"
"""The mark of a time that was measured on a shared device."""

SHARED_NOTE = f"{SHARED} measured while other trials trained on the same device: not to be compared"

HEADLINE = ("params", "memory", "train_flops", "accuracy")
"""The metrics by which a policy is told in a sentence, objectives or not."""

DROPPING = ("forward_share", "mean_learnable_params")
"""The metrics that tell what Learn&Drop saved."""

_FLOP_PREFIXES = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}


@dataclass(frozen=True)
class Unit:
    """How a metric is shown: the factor into the unit, the unit's sign, and the decimals."""

    factor: float
    sign: str
    decimals: int


def unit_of(metric: str, scale: float) -> Unit:
    """The unit for values of about the size of ``scale``: give one scale for what is to be compared.

    Args:
        metric: one of `METRICS`.
        scale: a typical value, such as the baseline's.
    """
    if metric == "accuracy":
        return Unit(100, "%", 2)
    if metric == "forward_share":
        return Unit(100, "%", 1)
    if metric.startswith("memory"):
        return Unit(2**-30, "GiB", 2) if scale >= 10 * 2**30 else Unit(2**-20, "MiB", 1)
    if metric.endswith("flops"):
        sign, size = next((item for item in _FLOP_PREFIXES.items() if scale >= item[1]), ("MFLOP", 1e6))
        return Unit(1 / size, sign, 3)
    if metric == "train_seconds":
        return Unit(1, "s", 1)
    return Unit(1, "images/s" if metric == "samples_per_second" else "", 0)


def is_shared_time(metric: str, record: TrialRecord) -> bool:
    """Whether a metric is a time, and the trial shared its device."""
    return metric in TIMES and (record.packed or 1) > 1


def describe_metric(metric: str, record: TrialRecord, scale: float | None = None) -> str:
    """A trial's value as by `describe_value`, a time on a shared device with a mark."""
    shown = describe_value(metric, record.metric(metric), scale)
    return f"{shown} {SHARED}" if is_shared_time(metric, record) else shown


def describe_value(metric: str, value: float | None, scale: float | None = None) -> str:
    """A value with its unit, as in ``97.78 %`` or ``61.4 MiB``; a dash where there is none.

    Args:
        metric: one of `METRICS`.
        value: in the metric's own unit (bytes, FLOPs, …).
        scale: decides the unit, as in `unit_of`; the value itself if it is None.
    """
    if value is None:
        return "–"
    unit = unit_of(metric, value if scale is None else scale)
    return f"{value * unit.factor:,.{unit.decimals}f} {unit.sign}".rstrip()


def describe_difference(metric: str, value: float | None, reference: float | None) -> str:
    """The difference to the baseline, as in ``−0.6 points`` or ``−22.1 %``; empty where there is none to state."""
    change = difference(metric, value, reference)
    if change is None:
        return ""
    unit = "points" if metric == "accuracy" else "%"
    # A plus-minus sign keeps a change too small to show from reading as a gain or a loss.
    number = f"{change:+.1f}" if abs(change) >= 0.05 else "±0.0"
    return f"{number.replace('-', '−')} {unit}"


def describe_policy(policy: Policy) -> str:
    """A policy on one line, as in ``skip layer1.2,1.4; scalar layer2.3; drop<0.012 p2``.

    Units stand after their block in natural order; a leading word that a unit shares with the one before it is left
    out, and a trailing one that all share (``.self_attention``) stands once behind them. Options of a block and
    Learn&Drop settings stand there where they are not the default.
    """
    if policy.is_baseline:
        return "end-to-end"
    groups: dict[str, list[str]] = {}
    for item in policy.replacements:
        options = ",".join(f"{key}={value}" for key, value in sorted(item.options.items()))
        groups.setdefault(f"{item.block}({options})" if options else item.block, []).append(item.unit)
    parts = [f"{block} {_short_units(units)}" for block, units in sorted(groups.items())]
    if policy.learn_drop is not None:
        parts.append(_describe_learn_drop(policy.learn_drop))
    return printable("; ".join(parts))


def describe_trial(record: TrialRecord, baseline: TrialRecord | None) -> str:
    """The trial's policy, and the training settings in which it differs from the baseline, as in ``lr=0.05``."""
    parts = [describe_policy(policy_of(record))]
    if baseline is not None:
        reference = training_of(baseline)
        parts += [f"{key}={_short(value)}" for key, value in training_of(record).items() if value != reference.get(key)]
    return printable("; ".join(parts))


def describe_savings(run: Run, record: TrialRecord) -> str:
    """What a trial changes against the baseline, as in ``parameters −22.1 %, …, accuracy −0.6 points``."""
    reference = baseline(run)
    if reference is None:
        return "there is no baseline to compare it with"
    if record.trial == reference.trial:
        return "the end-to-end baseline itself: it saves nothing"
    changes = ((name, record.metric(name), reference.metric(name)) for name in HEADLINE)
    parts = [f"{LABELS[name]} {change}" for name, *pair in changes if (change := describe_difference(name, *pair))]
    return ", ".join(parts)


def describe_duration(seconds: float) -> str:
    """A time to the second, or from an hour on to the minute, as in ``4m07s`` and ``2h05m``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def training_of(record: TrialRecord) -> dict[str, Any]:
    """The training settings of a trial by name; empty where the table holds none."""
    content = json.loads(record.training or "{}")
    return content if isinstance(content, dict) else {}


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts ``layer1.10`` behind ``layer1.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _short_units(units: list[str]) -> str:
    roles = {_trailing_word(unit) for unit in units}
    role = roles.pop() if len(units) > 1 and len(roles) == 1 else ""
    units = [unit.removesuffix(role) for unit in units]
    shown = []
    before = ""
    for unit in sorted(units, key=natural_key):
        word = re.match(r"\D*", unit)
        prefix = word.group() if word else ""
        shown.append(unit[len(prefix) :] if prefix == before and len(prefix) < len(unit) else unit)
        before = prefix
    return ",".join(shown) + role


def _trailing_word(unit: str) -> str:
    """What stands behind the last number of a name: ``.self_attention``."""
    word = re.search(r"\D*$", unit)
    return word.group() if word else ""


def _describe_learn_drop(settings: LearnDrop) -> str:
    default = LearnDrop()
    # What a schedule does not look at is not shown.
    rule = "" if settings.score == "schedule" else f"<{_short(settings.threshold)} p{settings.patience}"
    shown = f"drop{rule}"
    for item in fields(LearnDrop):
        value = getattr(settings, item.name)
        if item.name not in ("threshold", "patience") and value != getattr(default, item.name):
            shown += f" {item.name}={_short(value)}"
    return shown


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
