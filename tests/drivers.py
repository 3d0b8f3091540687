"""What processes forked by `warm_ray` run: drivers of a search, and parts of one that end before their n-th write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kill_at import kill_at
from one_process_search import CONTENT, end_next_trial
from rich.console import Console

import rlsearch.search.trainable
import rlsearch.training.checkpoint
import rlsearch.training.trial  # noqa: F401  # what the workers import
from rlsearch.search.prepare import prepare
from rlsearch.search.run import _begin, resume_search, start_search
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.space import parse_space


def warm_up() -> None:
    """Imports what a driver imports only when it gets there."""
    prepare(parse_space(CONTENT))


def drive(folder: str, address: str, trials: int) -> None:
    """Searches until the run has so many trials: a new search where there is none, else one that goes on."""
    path, console = Path(folder), Console(width=200)
    if (path / "study.db").exists():
        resume_search(path, trials=str(trials), address=address, console=console)
    else:
        content = CONTENT | {"search": {**CONTENT["search"], "trials": trials}}
        start_search(parse_space(content), path, address=address, console=console)


def die_in_the_end_of_a_trial(folder: str, outcome: dict[str, Any], nth: int) -> None:
    """Ends the run's next trial, but for the writes from the n-th on."""
    kill_at(nth, Path(folder), Path(f"{folder}.writes"))
    end_next_trial(Path(folder), outcome)


def die_in_a_resume(folder: str, nth: int) -> None:
    """Takes a run up that has all of its trials, but for the writes from the n-th on."""
    kill_at(nth, Path(folder), Path(f"{folder}.writes"))
    resume_search(folder, console=Console(quiet=True))


def die_in_the_making(folder: str, nth: int) -> None:
    """Makes a run's folder as a new search does, but for the writes from the n-th on."""
    kill_at(nth, Path(folder), Path(f"{folder}.writes"))
    run, space = RunFolder(folder), parse_space(CONTENT).with_num_classes(10)
    run.check_free()
    with run.locked():
        run.check_free()
        _begin(space, run, [])
