"""Where stored features lie: device memory, pinned host memory or a memory-mapped file, each as one run of bytes.

`FeatureCache` gives the bytes their shape; here is only where they are, and what to do when they do not fit.
Reconstruction (METHODS, section 4): the paper says that outputs are kept, not where.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsearch.learn_drop.feature_file import FeatureFile

# From the fastest to read to the slowest.
TIERS = ("device", "pinned", "file")

# Of what is free, in memory and on disk, the part that features may take: the training itself still needs some.
_SHARE = 0.5

Key = Mapping[str, Any]


class FeatureStore:
    """Bytes in memory: of the device (``device``), or page-locked ones of the host (``pinned``).

    Attributes:
        tier: one of `TIERS`.
        buffer: (num_bytes,) uint8.
    """

    def __init__(self, tier: str, buffer: Tensor) -> None:
        self.tier = tier
        self.buffer = buffer

    @property
    def num_bytes(self) -> int:
        """How much fits in."""
        return len(self.buffer)

    def begin(self) -> None:
        """The bytes are about to change: until `commit` they are worth nothing to anybody else."""

    def commit(self, num_bytes: int, key: Key) -> None:
        """The first ``num_bytes`` are what ``key`` says; copies that are still on their way are waited for."""
        if self.buffer.is_pinned():
            torch.cuda.synchronize()

    def close(self) -> None:
        """Gives the bytes back; neither the store nor a tensor of it may be used afterwards."""
        self.buffer = torch.empty(0, dtype=torch.uint8)


class FileStore(FeatureStore):
    """Bytes in a memory-mapped file, which vanishes when it is closed, collected, or the process ends."""

    def __init__(self, file: FeatureFile) -> None:
        super().__init__("file", torch.frombuffer(file.content(), dtype=torch.uint8))
        self._file = file

    def begin(self) -> None:
        self._file.begin()

    def commit(self, num_bytes: int, key: Key) -> None:
        self._file.commit(num_bytes, canonical(key))
        self.buffer = self.buffer[:num_bytes]

    def close(self) -> None:
        super().close()
        self._file.close()


@dataclass(frozen=True)
class Places:
    """Where features may be kept.

    Attributes:
        device: that trains.
        room: bytes that may be taken, by tier; a tier that is not named is not used.
        folder: of the file; None where the tier ``file`` is not named.
        run: what tells this run's files from another's.
    """

    device: torch.device
    room: Mapping[str, int]
    folder: Path | None = None
    run: str = ""
    refused: list[str] = field(default_factory=list)

    def opened(self, num_bytes: int, tiers: tuple[str, ...] = TIERS) -> FeatureStore | None:
        """A store of ``num_bytes`` in the first of ``tiers`` that has the room; None where none has.

        What went wrong on the way (memory that was promised and refused, a full disk) is noted in ``refused``.
        """
        for tier in tiers:
            if num_bytes > self.room.get(tier, -1):
                continue
            try:
                return self._open(tier, num_bytes)
            except (MemoryError, OSError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                self.refused.append(f"{tier}: {first_line(error)}")
        return None

    def tier_of(self, num_bytes: int) -> str | None:
        """The first tier that has the room."""
        return next((tier for tier in TIERS if num_bytes <= self.room.get(tier, -1)), None)

    def found(self, num_bytes: int, key: Key) -> FileStore | None:
        """The file that an interrupted process left behind, if it is whole and is what ``key`` says."""
        if "file" not in self.room or self.folder is None:
            return None
        file = FeatureFile.found(self.folder, self.run, num_bytes, canonical(key))
        return None if file is None else FileStore(file)

    def too_small(self, num_bytes: int) -> str:
        """Says how much is needed, and how much room there is."""
        room = ", ".join(f"{bytes_ / 1e9:.2f} GB ({name})" for name, bytes_ in self.room.items())
        return f"stored features need {num_bytes / 1e9:.2f} GB, and there is room for {room}"

    def _open(self, tier: str, num_bytes: int) -> FeatureStore:
        if tier == "file":
            assert self.folder is not None  # a room for files is only given with a folder
            return FileStore(FeatureFile.created(self.folder, self.run, num_bytes))
        if tier == "device":
            return FeatureStore(tier, torch.empty(num_bytes, dtype=torch.uint8, device=self.device))
        return FeatureStore(tier, torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda"))


def places_now(device: torch.device, folder: Path | None, run: str, sharers: int = 1) -> Places:
    """Where there is room at this moment, a share left to the training.

    Args:
        device: that trains.
        folder: for a file; None: there is to be none.
        run: what tells this run's files from another's.
        sharers: how many processes of this host each keep such features, on a GPU of their own where they have one.
    """
    of_host = _SHARE / sharers
    room = {"device": int((_SHARE if device.type == "cuda" else of_host) * available_bytes(device))}
    if device.type == "cuda":
        room["pinned"] = int(of_host * available_bytes(torch.device("cpu")))
    if folder is not None:
        room["file"] = int(of_host * available_disk_bytes(folder))
    return Places(device, room, folder, run)


def canonical(key: Key) -> dict[str, Any]:
    """The key as it reads after JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True))
    return plain


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory or disk space ran out, or that a file cannot be written."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OSError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def first_line(error: BaseException) -> str:
    """What an error says, without what torch appends to it."""
    return str(error).split("\n")[0] or type(error).__name__


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device`` (host memory for the CPU)."""
    if device.type == "cuda":
        # What torch's allocator holds and does not use can be taken too.
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        # A process may be held to a share of the device, which others may have taken before it.
        share = torch.cuda.get_per_process_memory_fraction(device)
        return int(min(free + torch.cuda.memory_reserved(device) - allocated, share * total - allocated))
    return _available_host_bytes()


def _available_host_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        # Other systems do not say what is available; half of what there is, is a careful guess.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024


def available_disk_bytes(folder: Path) -> int:
    """Disk space that can still be taken in ``folder``; none where the folder is missing."""
    try:
        free = shutil.disk_usage(folder).free
        return min(free, _available_host_bytes()) if _is_memory(folder) else free
    except OSError:
        return 0


def _is_memory(folder: Path) -> bool:
    """Whether a folder lies in memory, as /tmp does on some systems: its files take what they were to spare."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return False
    in_memory = [line.split()[1] for line in mounts.read_text().splitlines() if line.split()[2] in ("tmpfs", "ramfs")]
    return any(Path(mount).is_dir() and os.stat(mount).st_dev == os.stat(folder).st_dev for mount in in_memory)
