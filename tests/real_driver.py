"""The program as a user starts it: a process in a session of its own, with a Ray of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class Driver:
    """``rlsearch search`` or ``rlsearch resume``, under way.

    Args:
        arguments: of the command line.
        temporary: its folder for temporary files.
        log: takes what it prints, after what others have printed.

    Attributes:
        pid: its process id, and that of its session.
    """

    def __init__(self, arguments: Sequence[str], temporary: Path, log: Path) -> None:
        environment = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TMPDIR": str(temporary)}
        with log.open("ab") as output:
            self._log, self._begin = log, output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlsearch", *arguments],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def wait(self, seconds: float | None) -> int | None:
        """Its exit code; None where it has not ended in time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def send(self, signal_number: int) -> None:
        """Sends a signal to the driver alone."""
        self._process.send_signal(signal_number)

    def end(self) -> None:
        """Kills the driver where it still lives; its Ray follows it by itself."""
        self._process.kill()
        self._process.wait()

    def told(self) -> str:
        """What it has printed."""
        with self._log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def workers(self) -> list[int]:
        """The processes of its Ray that train, or are about to."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                name = (process / "cmdline").read_bytes()
                # Without its agents (ray::DashboardAgent) Ray ends a node, and everything on it.
                if name.startswith(b"ray::") and b"Agent" not in name and os.getsid(int(process.name)) == self.pid:
                    found.append(int(process.name))
        return sorted(found)

    def kill_worker(self, process: int) -> None:
        """Kills one of `workers`, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
