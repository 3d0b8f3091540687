"""The images of a split as they lie on disk: where each one is, which are read together, and how they become pixels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rlsearch.errors import DataError
from rlsearch.training.data_decode import BrokenImageError, Pixels, Source, decode_images, size_on_disk
from rlsearch.training.data_split import Indices

# Row groups are shuffled together until they hold so many images, which each worker then has in memory, encoded.
_WINDOW_IMAGES, _LEAST_WINDOW = 2048, 2


class EncodedImages(ABC):
    """Images in the order of the split's labels, in groups that are read together. Light: workers get a copy.

    Attributes:
        image_size: as in `decode_images`.
        group_starts: the position of each group's first image, and behind the last the number of images, (G + 1,).
        window: how many groups are shuffled together, and so held open at once.
    """

    image_size: int | None
    group_starts: Indices
    window: int

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """All files that hold the images, in their order."""

    @abstractmethod
    def open_group(self, group: int) -> Callable[[Indices], list[Source]]:
        """What gives the images at rows (n,) of a group, not yet decoded.

        Raises:
            DataError: the group cannot be read.
        """

    def items(self, indices: Indices) -> Iterator[Source]:
        """The images at sorted positions; one group is in memory at a time."""
        groups = np.searchsorted(self.group_starts, indices, side="right") - 1
        present, firsts = np.unique(groups, return_index=True)
        for group, part in zip(present.tolist(), np.split(indices, firsts[1:]), strict=True):
            yield from self.open_group(group)(part - self.group_starts[group])

    def pixels(self, indices: Indices, broken: list[int] | None = None) -> Pixels:
        """The images at sorted positions (n,), decoded to (n, 3, H, W); arguments and errors as in `decode_images`."""
        return decode_images(self.items(indices), len(indices), self.image_size, broken)

    def first_size(self, indices: Indices, skip_broken: bool) -> tuple[int, int]:
        """Height and width of the first image at sorted positions (n,) whose beginning can be read.

        Raises:
            DataError: none can be, or the first one cannot and is not to be skipped.
        """
        for where, source in self.items(indices):
            try:
                return size_on_disk(where, source)
            except BrokenImageError as error:
                if not skip_broken:
                    raise
                last = error
        raise DataError(f"none of {len(indices)} images can be decoded; the last one's error: {last}")


@dataclass(frozen=True)
class RawSplit:
    """One split of a data set, before its images are decoded.

    Attributes:
        labels: (N,) int64, already checked to lie in [0, len(classes)).
        classes: the names of the classes, in label order.
        pixels: decodes the images at sorted positions (n,) to (n, C, H, W) uint8, C being 1 or 3. The places of those
            that cannot be decoded are added to the list, where one is given; else they are a DataError.
        encoded: where the images come from, if they have to be decoded.
    """

    labels: Indices
    classes: tuple[str, ...]
    pixels: Callable[[Indices, list[int] | None], Pixels]
    encoded: EncodedImages | None = None

    @classmethod
    def of(cls, labels: Indices, classes: Sequence[str], encoded: EncodedImages) -> RawSplit:
        """A split whose images have to be decoded."""
        return cls(labels, tuple(classes), encoded.pixels, encoded)


@dataclass(frozen=True)
class Shard:
    """A Parquet file with its labels (n,), and the number of rows of each of its row groups."""

    path: Path
    labels: npt.NDArray[np.int64]
    group_sizes: tuple[int, ...]


class ShardImages(EncodedImages):
    """The ``image`` column of Parquet shards, read by row group."""

    def __init__(self, shards: Sequence[Shard], image_size: int | None) -> None:
        self._paths = tuple(shard.path for shard in shards)
        self.image_size = image_size
        sizes = [size for shard in shards for size in shard.group_sizes]
        self.group_starts = np.cumsum([0, *sizes], dtype=np.int64)
        self.window = max(_LEAST_WINDOW, math.ceil(_WINDOW_IMAGES * len(sizes) / max(1, sum(sizes))))
        # For every row group: its shard, its number there, and the shard's row that it begins with.
        self._places = [
            (shard.path, number, sum(shard.group_sizes[:number]))
            for shard in shards
            for number in range(len(shard.group_sizes))
        ]

    @property
    def files(self) -> tuple[Path, ...]:
        """See `EncodedImages.files`."""
        return self._paths

    def open_group(self, group: int) -> Callable[[Indices], list[Source]]:
        """See `EncodedImages.open_group`; the group's encoded images are in memory as long as the result is."""
        path, number, first = self._places[group]
        try:
            with pq.ParquetFile(path) as file:
                column = file.read_row_group(number, columns=["image"], use_threads=False).column("image")
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read, it may be damaged: {error}") from None
        size = self.group_starts[group + 1] - self.group_starts[group]
        if len(column) != size:
            raise DataError(f"{path}: row group {number} has {len(column)} rows, and had {size}: the file was changed")
        return lambda rows: [(f"{path}, row {first + row}", column[row].as_py()) for row in rows.tolist()]


class FileImages(EncodedImages):
    """One file an image, each a group of its own."""

    def __init__(self, files: Sequence[Path], image_size: int | None) -> None:
        self._names = [str(file) for file in files]  # a path is an object of its own, ten times as large
        self.image_size = image_size
        self.window = len(files)
        self.group_starts = np.arange(len(files) + 1, dtype=np.int64)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `EncodedImages.files`."""
        return tuple(map(Path, self._names))

    def open_group(self, group: int) -> Callable[[Indices], list[Source]]:
        """See `EncodedImages.open_group`; the file is read where it is decoded."""
        return lambda rows: [(self._names[group], Path(self._names[group]))] * len(rows)
