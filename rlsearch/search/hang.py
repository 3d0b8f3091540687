"""Trainings that hang: their process ends itself, and leaves where it stood.

A thread of Python's own would wait for ever where the hanging code never gives up the interpreter (a deadlock in a
library, a device that no longer answers). The timer of ``faulthandler`` needs no interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def ends_when_hung(folder: Path, seconds: float) -> Iterator[None]:
    """Ends this process where the block takes longer than that.

    Args:
        folder: of the trial, made where it is missing; the stacks of all threads are written there then.
        seconds: how long the block may take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"hung.{os.getpid()}.txt"
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink(missing_ok=True)


def stacks_of_hung(folder: Path) -> str:
    """Where the processes of a trial stood that ended so; empty where none did.

    Args:
        folder: of the trial.
    """
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("hung.*.txt")))
