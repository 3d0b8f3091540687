"""What a run's folder lies on: how much room there is, how long a write takes, and whether SQLite can lock there."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "9p")
"""On these, locks are known to be lost or missing, and SQLite's files to be damaged for that."""

SLOW_SECONDS = 0.2
"""A trial's end takes about ten flushed writes."""

_MOUNTS = Path("/proc/self/mountinfo")
_WRITES, _BYTES = 5, 4096


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def file_system(folder: Path, mounts: str | None = None) -> str:
    """The kind of file system that a folder lies on, as Linux calls it; empty where that cannot be told.

    Args:
        folder: absolute, existing.
        mounts: the content of ``/proc/self/mountinfo``; None to read it.
    """
    if mounts is None:
        if not _MOUNTS.exists():
            return ""
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace")
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        place = Path(fields[4].replace("\\040", " "))
        # A later mount on the same place hides the earlier one.
        if (place == folder or place in folder.parents) and len(place.parts) >= best:
            best, kind = len(place.parts), after.split()[0]
    return kind


def flush_seconds(folder: Path) -> float:
    """How long it takes to write a small file so that a power cut does not lose it: the median of some.

    Raises:
        OSError: the folder is full or not writable.
    """
    seconds = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rlsearch-") as file:
        for _ in range(_WRITES):
            started = time.perf_counter()
            file.write(bytes(_BYTES))
            file.flush()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def storage_warnings(path: Path, needed_bytes: float, mounts: str | None = None) -> list[str]:
    """What speaks against a folder as the place of a run, with what to do about it.

    Args:
        path: of the run; it need not be there yet.
        needed_bytes: about how much a run writes.
        mounts: as for `file_system`.

    Raises:
        OSError: the folder is full or not writable.
    """
    folder, found = existing_folder(path), []
    kind, free = file_system(folder, mounts), shutil.disk_usage(folder).free
    if kind in NETWORK_FILE_SYSTEMS:
        found.append(
            f"{folder} is on a network file system ({kind}), where locks can fail and damage SQLite's study; "
            "take a local disk for the run, or make sure that only this machine uses it"
        )
    if free < needed_bytes:
        told = f"{folder} has {free / 1e9:.1f} GB free, and this needs about {needed_bytes / 1e9:.1f} GB"
        found.append(f"{told}; free some space")
    seconds = flush_seconds(folder)
    if seconds > SLOW_SECONDS:
        told = f"{folder} takes {seconds:.1f} s to flush a small file, and every trial's end flushes about ten"
        found.append(f"{told}; take a faster disk")
    return found
