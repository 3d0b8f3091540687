"""Ends this process by a SIGKILL right before its n-th write, so that a test can end it before each of them.

A write is whatever a later process could see: a file that is opened for writing, renamed or removed, a folder made or
removed, and a commit of SQLite. Between two of them nothing else is there to be seen.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from sqlalchemy import Connection, Engine, event

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def kill_at(nth: int, folder: Path, told: Path) -> None:
    """Lives as long as this process: what it counts cannot be taken back.

    Args:
        nth: which write never happens, from 1.
        folder: writes to files elsewhere do not count.
        told: gets a line on each write, before it.
    """
    left = nth
    log = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def count(what: str) -> None:
        nonlocal left
        os.write(log, f"{what}\n".encode())
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(name: str, arguments: tuple[object, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and _is_inside(path, folder):
                count(f"open {path!r}")
        elif name in _CHANGES and _is_inside(arguments[0], folder):
            count(f"{name} {arguments[0]!r}")

    @event.listens_for(Engine, "commit")
    def on_commit(connection: Connection) -> None:
        if connection.connection.in_transaction:  # SQLite begins one with its first change
            count("commit")

    sys.addaudithook(on_event)


def _is_inside(path: object, folder: Path) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)
