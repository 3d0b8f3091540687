"""A file of stored features, mapped into memory: named by its run, known by its key, gone when it is not needed.

Only a whole file bears the final name; while it is written it has a name of its process's own. A process that is killed
leaves its file behind: the resumed run takes it if the key fits (no pass over the images then), else deletes it, and
any other run that uses the folder clears it away. A lock, which ends with the process, tells which files are in use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)

_PREFIX, _SUFFIX, _PARTIAL = "rlsearch-features-", ".bin", ".partial.bin"
_MAGIC = "rlsearch.features/1"
# A page, so that the features are aligned; the key is text of a few hundred bytes.
_HEADER_BYTES = 4096
_ZEROS = bytes(1 << 20)


class FeatureFile:
    """An open, locked and mapped file; use `created` or `found`.

    Attributes:
        path: where it is now.
    """

    def __init__(self, folder: Path, run: str, descriptor: int, path: Path, num_bytes: int) -> None:
        self._final = _final_path(folder, run)
        self._descriptor = descriptor
        self._names = [path]
        self._map = mmap.mmap(descriptor, _HEADER_BYTES + num_bytes)
        # Also runs at the end of the process; a forked child must not delete what its parent uses.
        self._finalizer = weakref.finalize(self, _remove, descriptor, self._names, os.getpid())

    @classmethod
    def created(cls, folder: Path, run: str, num_bytes: int) -> FeatureFile:
        """A new file with all its space reserved; what dead processes left in ``folder`` is cleared away first.

        Raises:
            OSError: the folder cannot be written to, or the disk is too full; nothing is left behind.
        """
        _clear(folder)
        descriptor, name = tempfile.mkstemp(_PARTIAL, f"{_PREFIX}{run}.", folder)
        path = Path(name)
        try:
            _lock(descriptor)
            _reserve(descriptor, _HEADER_BYTES + num_bytes)
            return cls(folder, run, descriptor, path, num_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise

    @classmethod
    def found(cls, folder: Path, run: str, num_bytes: int, key: dict[str, Any]) -> FeatureFile | None:
        """The whole file of an earlier process of this run; one that is truncated or of another key is deleted."""
        path = _final_path(folder, run)
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        fault = _fault(descriptor, num_bytes, key)
        if fault is None:
            return cls(folder, run, descriptor, path, num_bytes)
        _LOG.warning("the stored features in %s %s: they are built again", path, fault)
        path.unlink(missing_ok=True)
        os.close(descriptor)
        return None

    @property
    def path(self) -> Path:
        """Where the file is now."""
        return self._names[0]

    def content(self) -> memoryview:
        """What is behind the header, ``num_bytes`` of it: mapped, so that writing to it writes the file."""
        return memoryview(self._map)[_HEADER_BYTES:]

    def begin(self) -> None:
        """Takes the final name away: the content is about to change."""
        if self.path == self._final:
            self._rename(self._final.with_name(f"{self._final.stem}.{os.getpid()}{_PARTIAL}"))

    def commit(self, num_bytes: int, key: dict[str, Any]) -> None:
        """Keeps the first ``num_bytes``, writes the key, and gives the file its final name.

        Raises:
            OSError: the file cannot be shortened or renamed.
        """
        header = json.dumps({"magic": _MAGIC, "boot": _boot(), "key": key}, sort_keys=True).encode()
        assert len(header) <= _HEADER_BYTES
        self._map[:_HEADER_BYTES] = header.ljust(_HEADER_BYTES)
        os.ftruncate(self._descriptor, _HEADER_BYTES + num_bytes)
        self._rename(self._final)

    def close(self) -> None:
        """Deletes the file; its space is given back once no tensor of it is left."""
        self._finalizer()

    def _rename(self, path: Path) -> None:
        # Whoever deleted the file took its name alone: what is mapped stays.
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, path)
        self._names[0] = path


def _final_path(folder: Path, run: str) -> Path:
    return folder / f"{_PREFIX}{run}{_SUFFIX}"


def _boot() -> str:
    """Names the time since the machine started: what was mapped, and not flushed, does not survive a power cut."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _remove(descriptor: int, names: list[Path], owner: int) -> None:
    if os.getpid() == owner:
        for name in names:
            # Another process of the same run may have put its own file there.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(name), os.fstat(descriptor)):
                    name.unlink()
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Takes the space now: a full disk met later, through the mapping, would kill the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, len(_ZEROS)):
        os.write(descriptor, _ZEROS[: min(len(_ZEROS), size - start)])


def _fault(descriptor: int, num_bytes: int, key: dict[str, Any]) -> str | None:
    """What is wrong with a file that was found."""
    size = os.fstat(descriptor).st_size
    try:
        header = json.loads(os.pread(descriptor, _HEADER_BYTES, 0))
    except ValueError:
        return "have no readable key"
    if not isinstance(header, dict) or header.get("magic") != _MAGIC or not isinstance(header.get("key"), dict):
        return "have no readable key"
    if header.get("boot") != _boot():
        return "were written before this machine started"
    different = sorted(name for name in {*key, *header["key"]} if header["key"].get(name) != key.get(name))
    if different:
        return f"are of another {', '.join(different)}"
    if size != _HEADER_BYTES + num_bytes:
        return f"are truncated ({size} of {_HEADER_BYTES + num_bytes} bytes)"
    return None


def _clear(folder: Path) -> None:
    """Deletes the files whose processes are dead."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the file is now ours; the lock is held until the descriptor is closed or the process ends."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
