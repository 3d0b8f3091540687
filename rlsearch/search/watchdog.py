"""Ends what a driver leaves behind: a process of its own, beside the driver, that outlives a SIGKILL of it.

Ray's servers and workers follow a killed driver within seconds, but its two agents were seen to stay for good, and its
temporary folder always stays. This process waits for the end of its standard input, which comes when the driver closes
it or dies in whatever way; then it ends every process that has a file of the cluster's folder open, as all of Ray's
have their logs, and removes the folder. (A mark in the environment does not last: a process that names itself in the
process list, as Ray's do, writes over it.)

It imports the standard library alone, so that it starts in no time. Where there is no ``/proc`` it only removes the
folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PATIENCE_SECONDS = 10.0


def start_watchdog(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the watchdog of the cluster in ``folder``; it acts once its ``stdin`` is closed.

    It runs in a session of its own, so that a Ctrl-C meant for the driver does not end it.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def clean_up(folder: Path, driver: int) -> None:
    """Ends the processes of the cluster in ``folder``, all but the driver, and removes it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        members = _members(folder) - {driver, os.getpid()}
        for process in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if not members:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _members(folder: Path) -> set[int]:
    """The processes that have a file in ``folder`` open."""
    # A process may end while it is looked at, and another user's cannot be looked into.
    found = set()
    for files in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for file in files.iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(file).startswith(f"{folder}/"):
                        found.add(int(files.parent.name))
    return found


if __name__ == "__main__":
    parent = os.getppid()
    sys.stdin.buffer.read()
    clean_up(Path(sys.argv[1]), parent)
