"""Outcomes that the study could not take because its database was away: kept in the run's folder until it can."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from rlsearch.files import write_atomic
from rlsearch.search.outcome import Outcome
from rlsearch.search.study import Ended, RunStudy

_FOLDER = "unsaved"


def keep_outcome(run_dir: Path, number: int, outcome: Outcome, violations: Mapping[str, float]) -> None:
    """Keeps how a trial ended.

    Args:
        run_dir: the run's folder.
        number: of the trial.
        outcome: its outcome.
        violations: as `rlsearch.search.study.RunStudy.finish` takes them.

    Raises:
        OSError: it cannot be written.
    """
    folder = run_dir / _FOLDER
    folder.mkdir(exist_ok=True)
    content = json.dumps({"outcome": outcome.to_dict(), "violations": dict(violations)})
    kept = {"content": content, "sha256": _digest(content)}
    write_atomic(folder / f"trial-{number:05d}.json", json.dumps(kept).encode())


def settle(study: RunStudy, run_dir: Path) -> list[str]:
    """Settles what an earlier session left open: by what was kept, else as `RunStudy.reconcile` does.

    Returns:
        what was done, a line each.
    """
    folder = run_dir / _FOLDER
    kept, lines = {}, []
    for file in sorted(folder.glob("*.json")):
        ended = _read(file)
        if ended is None:
            lines.append(f"{_FOLDER}/{file.name}: is damaged, and was left aside: its trial is taken up again")
        else:
            kept[int(file.stem.removeprefix("trial-"))] = ended
    lines += study.reconcile(kept)
    if folder.is_dir():
        shutil.rmtree(folder)
    return lines


def _read(file: Path) -> Ended | None:
    """How a trial ended; None where the file is not as it was written."""
    if not re.fullmatch(r"trial-\d{5,}", file.stem):
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        content = kept["content"]
        if kept["sha256"] != _digest(content):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    ended = json.loads(content)
    return Outcome.from_dict(ended["outcome"]), ended["violations"]


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
