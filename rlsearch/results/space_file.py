"""``space.yaml`` of a run: read, and compared with what its trials were searched in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsearch.errors import ConfigError, RunFolderError, suggestion
from rlsearch.results.table_file import METRICS
from rlsearch.yaml_file import read_yaml

DIRECTIONS = ("maximize", "minimize")


def read_space(path: Path) -> dict[str, Any]:
    """The resolved search space of a run.

    Raises:
        RunFolderError: the file is missing, cannot be read, or holds no search space.
    """
    if not path.exists():
        raise RunFolderError(f"{path}: is missing, so {path.parent} holds no run; give the --run-dir of a search")
    try:
        space = read_yaml(path)
    except ConfigError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.problems[0]}); restore it from a copy") from None
    if not isinstance(space, dict) or not isinstance(space.get("constraints") or {}, dict):
        raise RunFolderError(f"{path}: is no search space; restore it from a copy")
    return space


def check_space(path: Path, space: Mapping[str, Any], expected: str | None) -> None:
    """Whether a search space is the one that the trials were searched in.

    Args:
        path: its file, for the message.
        space: its content.
        expected: the `space_digest` of the trials' own; None where their table does not say.

    Raises:
        RunFolderError: it is another one.
    """
    if expected is not None and space_digest(space) != expected:
        raise RunFolderError(
            f"{path}: was changed since its trials were trained; undo that, or let `rlsearch repair {path.parent}` "
            "write it anew from the study"
        )


def space_digest(space: Mapping[str, Any]) -> str:
    """The SHA-256 of a resolved search space, in its order, which is that of the objectives."""
    try:
        text = json.dumps(space)
    except (TypeError, ValueError, RecursionError) as error:  # YAML has more types than a space
        text = f"no search space: {type(error).__name__}"
    return hashlib.sha256(text.encode()).hexdigest()


def objectives_of(space: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The metrics that are objectives, and their directions.

    Raises:
        RunFolderError: ``space``, of the file ``path``, names none, or others than there are.
    """
    objectives = space.get("objectives")
    if not isinstance(objectives, dict) or not objectives:
        raise RunFolderError(f"{path}: objectives must map metrics to directions, got {objectives!r}")
    for name, direction in objectives.items():
        if name not in METRICS:
            raise RunFolderError(f"{path}: objectives.{name}: unknown metric{suggestion(str(name), METRICS)}")
        if direction not in DIRECTIONS:
            raise RunFolderError(f"{path}: objectives.{name}: must be maximize or minimize, got {direction!r}")
    return dict(objectives)
