"""What may be searched for one setting: a range or a list of choices, as Optuna's distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rlsearch.config import from_mapping, join, typed, unknown_keys
from rlsearch.errors import Problem, suggestion

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
T = TypeVar("T")

_RANGE_KEYS = ("low", "high", "log", "step")
_CHOICE_KEYS = ("choices",)


def is_searched(value: Any) -> bool:
    """Whether a setting's value is a range or a list of choices instead of a fixed value."""
    return isinstance(value, (list, dict))


def parse_distribution(value: Any, kind: type, key: str, problems: list[Problem]) -> Distribution | None:
    """The distribution that a user wrote for a setting; None, and a problem, where it is wrong.

    Args:
        value: ``{low, high, log?, step?}``, ``{choices: [...]}`` or a list of choices.
        kind: the setting's type (str, int, float or bool).
        key: the setting's dotted key, for messages.
        problems: what is wrong is added here.
    """
    if isinstance(value, list):
        return _parse_choices(value, kind, key, problems)
    before = len(problems)
    if "choices" in value:
        unknown_keys(value, _CHOICE_KEYS, key, problems)
        choices = typed(value["choices"], list, join(key, "choices"), problems)
        return None if len(problems) > before else _parse_choices(choices, kind, join(key, "choices"), problems)
    for name in value:
        if name not in _RANGE_KEYS:
            # A misspelt key is none of those that are there: `lgo` beside `low` is `log`.
            missing = [known for known in _RANGE_KEYS if known not in value]
            problems.append(Problem(join(key, str(name)), f"unknown key{suggestion(str(name), missing)}"))
    if kind not in (int, float):
        problems.append(Problem(key, "has no range: give a list of choices, as in [a, b]"))
        return None
    return _parse_range(value, kind, key, problems)


def parse_settings(
    cls: type[T], content: Any, key: str, prefix: str, problems: list[Problem], never: Mapping[str, str] | None = None
) -> tuple[T | None, dict[str, Distribution]]:
    """A settings dataclass of which some values may be searched.

    Args:
        cls: a frozen dataclass of plain values that states its ranges in ``problems(key)``.
        content: what the user wrote.
        key: the dotted key of ``content``, for messages.
        prefix: of the parameter names in the study (``training``, ``learn_drop``).
        problems: what is wrong is added here; the ends of every range are checked as the values themselves would be.
        never: settings that cannot be searched, and why.

    Returns:
        the settings, where searched ones hold the value that the baseline takes (see `default_of`), or None; and the
        distributions by parameter name.
    """
    if typed(content, dict, key, problems) is None:
        return None, {}
    hints = get_type_hints(cls)
    searched: dict[str, Distribution] = {}
    fixed = {name: value for name, value in content.items() if name not in hints or not is_searched(value)}
    for name in content:
        if name in fixed:
            continue
        if never and name in never:
            problems.append(Problem(join(key, name), f"cannot be searched: {never[name]}; give one value"))
            continue
        distribution = parse_distribution(content[name], hints[name], join(key, name), problems)
        if distribution is not None:
            searched[name] = distribution
    settings = from_mapping(cls, fixed, key, problems)
    if settings is None:
        return None, {}
    defaults = {item.name: getattr(settings, item.name) for item in fields(settings)}  # type: ignore[arg-type]  # cls is a dataclass by contract
    for name, distribution in searched.items():
        for value in _extremes(distribution):
            found = cls(**{**defaults, name: value}).problems(key)  # type: ignore[attr-defined]  # by contract
            problems.extend(p for p in found if p.key == join(key, name) and p not in problems)
    chosen = {name: default_of(distribution, defaults[name]) for name, distribution in searched.items()}
    return cls(**{**defaults, **chosen}), {join(prefix, name): value for name, value in searched.items()}


def default_of(distribution: Distribution, usual: Any) -> Any:
    """The value that the baseline takes of a searched setting: the usual one where it may be chosen, else the middle.

    Args:
        distribution: what may be chosen.
        usual: the setting's value when nobody sets it.

    Returns:
        ``usual``; or the first of the choices; or the middle of the range (of its logarithm with ``log``), on its grid.
    """
    if isinstance(distribution, CategoricalDistribution):
        return usual if usual in distribution.choices else distribution.choices[0]
    low, high, step = distribution.low, distribution.high, distribution.step
    if low <= usual <= high and (step is None or math.isclose((usual - low) / step, round((usual - low) / step))):
        return usual
    middle = math.sqrt(low * high) if distribution.log else (low + high) / 2
    if step is not None:
        middle = low + round((middle - low) / step) * step
    return int(middle) if isinstance(distribution, IntDistribution) else float(middle)


def size_of(distribution: BaseDistribution) -> int | None:
    """How many values may be chosen; None for a continuous range."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // distribution.step + 1
    assert isinstance(distribution, FloatDistribution)  # Optuna has no other kind
    if distribution.single():
        return 1
    return None if distribution.step is None else round((distribution.high - distribution.low) / distribution.step) + 1


def values_of(distribution: BaseDistribution) -> list[Any]:
    """All values of a discrete distribution, in order."""
    size = size_of(distribution)
    assert size is not None  # asked for discrete distributions only
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))  # Optuna has no other kind
    return [distribution.low + index * (distribution.step or 0) for index in range(size)]


def draw(distribution: BaseDistribution, rng: random.Random) -> Any:
    """A value drawn at random: evenly, or evenly in the logarithm where the range says so."""
    if isinstance(distribution, FloatDistribution) and size_of(distribution) is None:
        low, high = distribution.low, distribution.high
        value = math.exp(rng.uniform(math.log(low), math.log(high))) if distribution.log else rng.uniform(low, high)
        return min(max(value, low), high)
    if isinstance(distribution, IntDistribution) and distribution.log:
        value = math.exp(rng.uniform(math.log(distribution.low - 0.5), math.log(distribution.high + 0.5)))
        return min(max(round(value), distribution.low), distribution.high)
    return rng.choice(values_of(distribution))


def to_plain(distribution: Distribution) -> Any:
    """What a user would write in YAML for this distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    plain: dict[str, Any] = {"low": distribution.low, "high": distribution.high}
    if distribution.log:
        plain["log"] = True
    elif distribution.step is not None and distribution.step != (
        1 if isinstance(distribution, IntDistribution) else None
    ):
        plain["step"] = distribution.step
    return plain


def _parse_choices(values: list[Any], kind: type, key: str, problems: list[Problem]) -> Distribution | None:
    before = len(problems)
    if not values:
        problems.append(Problem(key, "must hold at least one choice"))
    choices = [typed(value, kind, f"{key}[{index}]", problems) for index, value in enumerate(values)]
    for index, choice in enumerate(choices):
        if choice is not None and choice in choices[:index]:
            problems.append(Problem(f"{key}[{index}]", f"{choice!r} stands twice; keep one"))
    return None if len(problems) > before else CategoricalDistribution(choices)


def _parse_range(value: Mapping[str, Any], kind: type, key: str, problems: list[Problem]) -> Distribution | None:
    before = len(problems)
    for name in ("low", "high"):
        if name not in value:
            problems.append(Problem(join(key, name), f"is missing{_misspelt(name, value)}"))
    numbers = {
        name: typed(value[name], kind, join(key, name), problems) for name in ("low", "high", "step") if name in value
    }
    log = bool(typed(value.get("log", False), bool, join(key, "log"), problems))
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            problems.append(Problem(join(key, name), f"must be finite, got {number}"))
    if len(problems) > before:
        return None
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    problems += _range_problems(low, high, step, log, key)
    if len(problems) > before:
        return None
    if kind is int:
        return IntDistribution(low, high, log=log, step=1 if step is None else step)
    return FloatDistribution(low, high, log=log, step=step)


def _range_problems(low: float, high: float, step: float | None, log: bool, key: str) -> list[Problem]:
    """What is wrong with finite numbers as a range."""
    found = []
    if low > high:
        found.append(Problem(key, f"low must not be above high, got low {low} and high {high}"))
    if log and low <= 0:
        found.append(Problem(join(key, "low"), f"must be above 0 with log: true, got {low}"))
    if step is None:
        return found
    if log:
        found.append(Problem(join(key, "step"), "cannot be combined with log: true; drop one of the two"))
    if step <= 0:
        found.append(Problem(join(key, "step"), f"must be above 0, got {step}"))
    elif low <= high and not _on_grid(high - low, step):
        found.append(Problem(join(key, "step"), f"must divide high - low = {high - low:g}, got {step}"))
    return found


def _on_grid(width: float, step: float) -> bool:
    return math.isclose(width / step, round(width / step), abs_tol=1e-9)


def _misspelt(name: str, value: Mapping[str, Any]) -> str:
    """A hint where neither a range nor choices can be recognised."""
    if any(key in _RANGE_KEYS for key in value):
        return ""
    near = suggestion(str(next(iter(value), "")), _CHOICE_KEYS) if value else ""
    return (
        near
        if "did you mean" in near
        else f"; a searched value is {{low, high}} or {{choices: [...]}}, {name} begins one"
    )


def _extremes(distribution: Distribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]
