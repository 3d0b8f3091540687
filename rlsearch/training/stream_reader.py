"""Batches of a streamed set, decoded ahead of the training by processes of their own.

torch's DataLoader starts, feeds and ends the processes: they go when the iterator is closed and when an error or Ctrl-C
ends the training; when it was killed, by a look of their own every second.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rlsearch.errors import DataError
from rlsearch.training.data_decode import BrokenImageError, Pixels, Source, decode_image, other_size
from rlsearch.training.data_split import Indices
from rlsearch.training.image_stream import StreamSplit

_LOG = logging.getLogger(__name__)
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Batch:
    """Decoded images, on the host.

    Attributes:
        images: (B, 3, H, W) uint8.
        broken: the places of images that could not be decoded; what stands there means nothing.
        reason: why the first of them could not.
    """

    images: Tensor
    broken: tuple[int, ...]
    reason: str

    def pin_memory(self) -> Batch:
        """The same in memory that the GPU reads directly; the DataLoader calls it."""
        return Batch(self.images.pin_memory(), self.broken, self.reason)


@dataclass
class Skipped:
    """Which images of a split were found broken.

    Attributes:
        positions: in the split.
        reason: of the first.
    """

    positions: set[int] = field(default_factory=set)
    reason: str = ""
    _told: bool = False

    def add(self, positions: Sequence[int], reason: str) -> None:
        """Remembers images."""
        self.reason = self.reason or reason
        self.positions.update(positions)

    def tell(self) -> None:
        """Logs their number, once."""
        if self.positions and not self._told:
            _LOG.warning("%d images cannot be decoded and are skipped; one: %s", len(self.positions), self.reason)
            self._told = True


def read_batches(
    split: StreamSplit,
    batches: Sequence[Indices],
    *,
    start: int = 0,
    regions: Sequence[Pixels] | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Decodes batches in their order.

    Args:
        split: the images.
        batches: positions in the split, (B,) each.
        start: the first batch that is wanted; nothing of those before it is read.
        regions: four random numbers in [0, 1) for each image of each batch, (B, 4): where a resized crop lies; None:
            the middle of each image.
        pin_memory: whether they come in memory that a GPU reads directly.

    Raises:
        DataError: an image cannot be decoded and is not to be skipped, or a file was changed or removed.
    """
    workers = min(_MOST_WORKERS, torch.get_num_threads()) if split.workers is None else split.workers
    with warnings.catch_warnings():
        # Threads of torch and Ray do not matter to a child that only decodes; how many there are, the user decides.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            _Decoder(split, batches, regions),
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            generator=torch.Generator(),  # torch's own random state is the training's
        )
        loaded = iter(loader)
    try:
        for batch in loaded:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        # The workers end now, and not when the last traceback that knows this frame is forgotten.
        del loaded


class _Decoder(Dataset[Any]):
    """Makes whole batches; an instance lives in every worker."""

    def __init__(self, split: StreamSplit, batches: Sequence[Indices], regions: Sequence[Pixels] | None) -> None:
        self._split = split
        self._batches = batches
        self._regions = regions
        self._opened: Callable[[int], Callable[[Indices], list[Source]]] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch | DataError:
        """The batch; an error is handed over, so that it is raised in the training and without the worker's frames."""
        try:
            return self._decoded(self._batches[number], None if self._regions is None else self._regions[number])
        except DataError as error:
            return error

    def _decoded(self, batch: Indices, regions: Pixels | None) -> Batch:
        split = self._split
        images = np.empty((len(batch), *split.image_shape), dtype=np.uint8)
        broken, reason = [], ""
        for place, (where, source) in self._sources(split.positions[batch]):
            region = None if regions is None else regions[place].tolist()
            try:
                image = decode_image(where, source, split.images.image_size, region)
            except BrokenImageError as error:
                if not split.skip_broken:
                    raise
                broken.append(place)
                reason = reason or str(error)
                continue
            if image.shape != images.shape[1:]:
                raise other_size(where, image, "the first image", images[0])
            images[place] = image
        return Batch(torch.from_numpy(images), tuple(broken), reason)

    def _sources(self, positions: Indices) -> Iterator[tuple[int, Source]]:
        """Places in the batch with what is to be decoded there, by group, in the order in which groups come up."""
        if self._opened is None:
            self._opened = lru_cache(maxsize=self._split.images.window)(self._split.images.open_group)
        starts = self._split.images.group_starts
        groups = np.searchsorted(starts, positions, side="right") - 1
        for group in dict.fromkeys(groups.tolist()):
            places = np.flatnonzero(groups == group)
            rows = positions[places] - starts[group]
            yield from zip(places.tolist(), self._opened(group)(rows), strict=True)


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(training: int, number: int) -> None:
    """A handler that the training's process has for the end of a run would keep a worker from its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # DataLoader looks too, but asks late who the parent is: a worker whose training was killed in its first moments
    # would wait for ever for a stranger's end.
    end_with_parent(training)


def end_with_parent(parent: int) -> None:
    """From now on this process ends within a second or so of its parent, whose process id that was at its start."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
