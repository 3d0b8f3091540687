"""Ends what a driver leaves behind: a process of its own, beside the driver, that outlives a SIGKILL of it.

Ray's servers and workers follow a killed driver within seconds, but its two agents were seen to stay for good, and its
temporary folder always stays. This process waits for the end of its standard input, which comes when the driver closes
it or dies in whatever way; then it ends every process that has a file of the cluster's folder open, as all of Ray's
have their logs, or names one in its command, as those do that are only starting and would make the folder anew, and
removes the folder. (A mark in the environment does not last: a process that names itself in the process list, as Ray's
workers do, writes over it, and over its command.)

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

_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.02
_QUIET_SECONDS = 5.0
_SHUT_DOWN = "shut down"


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


def note_shutdown(folder: Path) -> None:
    """Says that the cluster in ``folder`` was shut down, all of it: nothing of it only starts."""
    with contextlib.suppress(OSError):  # where the disk is full, cleaning up takes some seconds more
        (folder / _SHUT_DOWN).touch()


def clean_up(folder: Path, driver: int) -> None:
    """Ends the processes of the cluster in ``folder``, all but the driver, and removes it."""
    deadline, gone_since = time.monotonic() + _PATIENCE_SECONDS, None
    # Where a driver was killed, or told to end while Ray started, a process of Ray may have neither a file there nor
    # the folder's name for a moment as it starts, and then makes the folder anew.
    quiet = 0.0 if (folder / _SHUT_DOWN).exists() else _QUIET_SECONDS
    while time.monotonic() < deadline:
        members = _members(folder) - {driver, os.getpid()}
        for process in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if members or folder.exists():
            gone_since = None
            if not members:
                shutil.rmtree(folder, ignore_errors=True)
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since >= quiet:
            return
        time.sleep(_PAUSE_SECONDS if gone_since is None or not quiet else 10 * _PAUSE_SECONDS)


def _members(folder: Path) -> set[int]:
    """The processes that have a file in ``folder`` open, or name one in their command."""
    # A process may end while it is looked at, and another user's cannot be looked into.
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                found.add(int(process.name))
            for file in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(file).startswith(f"{folder}/"):
                        found.add(int(process.name))
    return found


if __name__ == "__main__":
    parent = os.getppid()
    sys.stdin.buffer.read()
    clean_up(Path(sys.argv[1]), parent)
