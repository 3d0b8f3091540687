"""The lock of a run's folder: one process writes to it at a time."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rlsearch.errors import RunFolderError
from rlsearch.files import naming

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """The right to write to a run's folder, for as long as the block runs.

    The kernel holds the lock for the process, so that it is free again however the process ends. What stands in the
    file only tells others who holds it.

    Raises:
        RunFolderError: another process holds it, and the message says which; or the folder cannot be written to.
        OSError: the disk is full.
    """
    file = folder / LOCK_FILE
    lock = FileLock(file)
    if file.is_symlink():
        raise RunFolderError(f"{file}: is a link; delete it, for what it leads to would be written over")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(f"{folder}: is in use by {_holder(file)}; wait for it, or give another folder") from None
    except OSError as error:
        raise RunFolderError(f"{file}: cannot be locked ({error.strerror}); check who may write to it") from None
    try:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": now}
        with naming(file):
            file.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(lock: Path) -> str:
    """Who holds the lock, as far as its text tells."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {holder['pid']} of {holder['user']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "an unnamed user"
