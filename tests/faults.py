"""What can go wrong around a driver, done to a real one. Each fault says whether it came to pass."""

from __future__ import annotations

import functools
import os
import random
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from postgresql import Server
from real_driver import Driver

LONGEST_SECONDS = 8.0
DISK_BYTES = 8 * 2**30
# A full disk has room for a part of what a trial's end writes, or for none of it.
_MOST_ROOM_BYTES = 200_000


class RoomyDisk:
    """A folder on a file system in memory, which can be made full; an ordinary folder where none can be mounted.

    Args:
        folder: where; it must not exist.

    Attributes:
        is_mounted: whether it is a file system of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.is_mounted = False

    def __enter__(self) -> RoomyDisk:
        self._folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self._folder)]
        try:
            self.is_mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.is_mounted = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self._folder)], check=True)

    @property
    def kind(self) -> str:
        """How it gets full, in words."""
        return "a tmpfs made small" if self.is_mounted else "RLIMIT_FSIZE of the driver"


def kill_driver(driver: Driver, run: Path, rng: random.Random) -> bool:
    """SIGKILL, as the kernel sends it to one that takes too much memory."""
    driver.send(signal.SIGKILL)
    return driver.wait(None) == -signal.SIGKILL


def terminate_driver(driver: Driver, run: Path, rng: random.Random) -> bool:
    """SIGTERM, as a batch system sends it."""
    driver.send(signal.SIGTERM)
    return driver.wait(None) is not None


def interrupt_driver(driver: Driver, run: Path, rng: random.Random) -> bool:
    """Ctrl-C, once or, out of impatience, twice."""
    driver.send(signal.SIGINT)
    if rng.random() < 0.3:
        driver.wait(rng.uniform(0, 1))
        driver.send(signal.SIGINT)
    return driver.wait(None) is not None


def kill_worker(driver: Driver, run: Path, rng: random.Random) -> bool:
    """SIGKILL to one of the processes that train."""
    workers = driver.workers()
    if not workers:
        return False
    driver.kill_worker(rng.choice(workers))
    return True


def full_disk(driver: Driver, run: Path, rng: random.Random) -> bool:
    """No room for some seconds, or for as long as the driver lives."""
    room, seconds = rng.randrange(_MOST_ROOM_BYTES), rng.uniform(1, LONGEST_SECONDS)
    if os.path.ismount(run.parent):
        taken = os.statvfs(run.parent)
        used = (taken.f_blocks - taken.f_bfree) * taken.f_frsize
        if not _resize(run.parent, used + room):
            return False
        driver.wait(seconds)
        return _resize(run.parent, DISK_BYTES)
    largest = max((path.stat().st_size for path in run.glob("study.*")), default=None)
    if largest is None or driver.wait(0) is not None:
        return False
    before = resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    if driver.wait(seconds) is None:
        resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, before)
    return True


def locked_database(driver: Driver, run: Path, rng: random.Random) -> bool:
    """Another process holds the study for some seconds."""
    if not (run / "study.db").exists():
        return False
    connection = sqlite3.connect(run / "study.db", timeout=LONGEST_SECONDS, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        driver.wait(rng.uniform(1, LONGEST_SECONDS))
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError:  # the driver itself has held it all the time
        return False
    finally:
        connection.close()
    return True


def restarted_database(server: Server, driver: Driver, run: Path, rng: random.Random) -> bool:
    """The database crashes, and comes back after some seconds."""
    server.stop()
    driver.wait(rng.uniform(0, LONGEST_SECONDS))
    server.start()
    return True


Fault = Callable[[Driver, Path, random.Random], bool]


def faults(server: Server | None) -> dict[str, Fault]:
    """All faults, by what they are called in a table.

    Args:
        server: that holds the study; None where SQLite does.
    """
    kinds: dict[str, Fault] = {
        "SIGKILL of the driver": kill_driver,
        "SIGTERM of the driver": terminate_driver,
        "SIGINT of the driver": interrupt_driver,
        "SIGKILL of a worker": kill_worker,
        "full disk": full_disk,
    }
    if server is None:
        return {**kinds, "locked database": locked_database}
    return {**kinds, "restarted database": functools.partial(restarted_database, server)}


def _resize(mounted: Path, size: int) -> bool:
    command = ["mount", "-o", f"remount,size={size}", str(mounted)]
    return subprocess.run(command, capture_output=True).returncode == 0
