"""Mappings from YAML or JSON into frozen dataclasses: strict types, unknown keys are errors, every error at once.

A dataclass that holds settings states its ranges in a method ``problems(key) -> list[Problem]``; `from_mapping` calls
it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from rlsearch.errors import Problem, suggestion

T = TypeVar("T")

_LONGEST_SHOWN = 300
_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


def typed(value: Any, kind: type, key: str, problems: list[Problem]) -> Any:
    """``value`` if it is of ``kind``; else None, and a problem.

    A whole number passes as a number (and becomes a float); true and false pass as nothing but themselves.
    """
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        problems.append(Problem(key, f"must be {_NAMES[kind]}, got {_shown(value)}{_yaml_hint(value, kind)}"))
        return None
    return float(value) if kind is float else value


def unknown_keys(content: Mapping[Any, Any], known: Iterable[str], key: str, problems: list[Problem]) -> None:
    """Adds a problem for every key of ``content`` that is not ``known``, with the nearest known one."""
    names = list(known)
    for name in content:
        if name not in names:
            problems.append(Problem(join(key, str(name)), f"unknown key{suggestion(str(name), names)}"))


def from_mapping(cls: type[T], content: Any, key: str, problems: list[Problem]) -> T | None:
    """An instance of the settings dataclass ``cls``; None when ``content`` is no mapping or lacks a required key.

    Args:
        cls: a dataclass whose fields are text, numbers, booleans or mappings, or one of several of these, each possibly
            optional (``| None``).
        content: what the user wrote.
        key: the dotted key of ``content``, for messages.
        problems: what is wrong is added here; the caller raises once it has read everything.
    """
    if typed(content, dict, key, problems) is None:
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls)
    values = {}
    specs = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass by contract
    unknown_keys(content, specs, key, problems)
    for name, item in specs.items():
        if name in content:
            value = _value(content[name], hints[name], join(key, name), problems)
            if value is not MISSING:
                values[name] = value
        elif item.default is MISSING and item.default_factory is MISSING:
            problems.append(Problem(join(key, name), "is missing"))
    if any(name not in values for name, item in specs.items() if item.default is item.default_factory is MISSING):
        return None
    settings = cls(**values)
    if len(problems) == before and hasattr(settings, "problems"):
        problems.extend(settings.problems(key))
    return settings


def join(key: str, name: str) -> str:
    """``key.name``, or ``name`` at the top."""
    return f"{key}.{name}" if key else name


def _value(value: Any, hint: Any, key: str, problems: list[Problem]) -> Any:
    """``value`` checked against one field's type; MISSING when it does not fit."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    if len(kinds) > 1:
        if type(value) in kinds:
            return value
        problems.append(Problem(key, f"must be {' or '.join(_NAMES[kind] for kind in kinds)}, got {_shown(value)}"))
        return MISSING
    kind = kinds[0]
    checked = typed(value, dict if typing.get_origin(kind) is Mapping else kind, key, problems)
    return MISSING if checked is None else checked


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _yaml_hint(value: Any, kind: type) -> str:
    """YAML 1.1 reads ``1e-3`` as text: say so."""
    if kind is float and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return f" (YAML reads {value} as text: write it with a decimal point, as in 1.0e-3)"
    return ""
