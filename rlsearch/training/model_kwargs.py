"""Checks the kwargs of a model before it is built, all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rlsearch.errors import ModelError, suggestion

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def check_kwargs(
    name: str, kwargs: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], fixed: Collection[str] = ()
) -> None:
    """Checks names and types.

    Args:
        name: the model's.
        kwargs: what was given.
        known: what the model takes, each with its plain types; with none, any value is left to the model to judge.
        fixed: what the constructor takes but the model's name decides.

    Raises:
        ModelError: kwargs that are unknown or of another type, all of them.
    """
    wrong = []
    for key, value in kwargs.items():
        if key in fixed:
            wrong.append(f"{key!r} is decided by the model's name")
        elif key not in known:
            wrong.append(f"{key!r} is unknown{suggestion(key, known)}")
        elif known[key] and not _is_one_of(value, known[key]):
            wrong.append(f"{key!r} must be {' or '.join(_WORDS[kind] for kind in known[key])}, got {value!r}")
    if wrong:
        takes = "" if known else " (it takes none)"
        raise ModelError(f"kwargs of model {name!r}{takes}: {'; '.join(wrong)}")


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """A bool is no number here, and a whole number is a number."""
    return type(value) in kinds or (type(value) is int and float in kinds)
