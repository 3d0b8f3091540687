"""The images of a training: named in a `DataSpec`, decoded once, split by a fixed seed.

A set is held in memory whole, decoded: a byte a channel and pixel, so 154 MB for CIFAR-10's 50,000 training images and
7.5 GB for 50,000 of 224x224. A user's own set that would take more than half of the machine's memory stays on disk and
is decoded as it is needed, image by image, in every epoch (`rlsearch.training.image_stream`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlsearch.errors import ConfigError, DataError, Problem, suggestion
from rlsearch.training.augmentation import ALTERNATING
from rlsearch.training.data_decode import Pixels, host_memory
from rlsearch.training.data_sources import FOLDERS, SOURCES
from rlsearch.training.data_split import Indices, balanced_subset, stratified_split
from rlsearch.training.decoded_cache import cached
from rlsearch.training.encoded_images import RawSplit
from rlsearch.training.image_stream import StreamSplit
from rlsearch.training.pixel_statistics import pixel_statistics

_LOG = logging.getLogger(__name__)

_DEFAULT_ROOT = "~/.cache/rlsearch/data"
# A set that would take more of the machine's memory than this is streamed.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class DataSpec:
    """Which images, how many of them, and how they are varied in training.

    Attributes:
        name: one of `known_data`; ``parquet:PATH`` and ``imagefolder:PATH`` are the user's own.
        root: the folder of the sets known by name; None is ``~/.cache/rlsearch/data``.
        download: whether a missing set may be fetched from the network.
        validation_fraction: the share of the training images that validates, in (0, 1).
        limit: at most so many training images, as balanced over the classes as the set allows; taken before the split.
        image_size: the side in pixels of the square that images are resized and cropped to; None: the set's own.
        flip: whether training images are mirrored: ``True`` half of them, at random; ``alternating`` likewise in the
            first epoch, and each the other way round in every epoch after; ``False`` none; None: the set's default.
        crop: training images are shifted by up to so many pixels; None: the set's default, mostly an eighth of
            their side, and for a streamed set with ``image_size`` a random region of each image, resized.
        cutout: the side of a square, somewhere in each training image, that is set to the channels' means; less than
            the image's side; 0: none. Stored features (Learn&Drop) come from whole images.
        seed: decides which images validate.
        stream: whether images stay on disk and are decoded in every epoch as they are needed: ``auto`` for those of
            ``parquet:``, ``imagefolder:`` and imagenette that would take more than half of the machine's memory. Shards
            are best shuffled when they are written, in row groups of some hundred images; Learn&Drop recomputes.
        workers: processes that decode a streamed set; 0: the training's own does it; None: as many as the training has
            CPU threads, at most 16.
        skip_broken: whether images that cannot be decoded are left out, with one warning that counts them, rather than
            an error. In training another image of its batch takes the place of a streamed one.
    """

    name: str
    root: str | None = None
    download: bool = False
    validation_fraction: float = 0.1
    limit: int | None = None
    image_size: int | None = None
    flip: bool | str | None = None
    crop: int | None = None
    cutout: int = 0
    seed: int = 0
    stream: bool | str = "auto"
    workers: int | None = None
    skip_broken: bool = False

    def problems(self, key: str = "data") -> list[Problem]:
        """What is out of range, each with its key."""
        found = []
        kind, colon, path = self.name.partition(":")
        if colon and kind not in FOLDERS:
            found.append(Problem(f"{key}.name", f"unknown kind {kind!r} of {self.name!r}{suggestion(kind, FOLDERS)}"))
        elif colon and not path:
            found.append(Problem(f"{key}.name", f"{self.name!r} must name a folder, as in {kind}:PATH"))
        elif not colon and self.name not in SOURCES:
            found.append(Problem(f"{key}.name", f"unknown data set {self.name!r}{suggestion(self.name, known_data())}"))
        if not (math.isfinite(self.validation_fraction) and 0 < self.validation_fraction < 1):
            message = f"must be above 0 and below 1, got {self.validation_fraction}"
            found.append(Problem(f"{key}.validation_fraction", message))
        for name, least in (("limit", 2), ("image_size", 1), ("crop", 0), ("cutout", 0), ("seed", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(Problem(f"{key}.{name}", f"must be a whole number of at least {least}, got {value}"))
        if isinstance(self.flip, str) and self.flip != ALTERNATING:
            found.append(Problem(f"{key}.flip", f"must be true, false or {ALTERNATING}, got {self.flip!r}"))
        if isinstance(self.stream, str) and self.stream != "auto":
            found.append(Problem(f"{key}.stream", f"must be true, false or auto, got {self.stream!r}"))
        if self.stream is True and self.name in SOURCES and not SOURCES[self.name].encoded:
            message = f"{self.name!r} is held in memory; parquet:, imagefolder: and imagenette can be streamed"
            found.append(Problem(f"{key}.stream", message))
        return found


@dataclass(frozen=True)
class ImageSplit:
    """Images and their labels.

    Attributes:
        images: (N, C, H, W) uint8, C being 1 or 3.
        labels: (N,) int64.
    """

    images: Pixels
    labels: npt.NDArray[np.int64]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of every image, (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that this takes."""
        return self.images.nbytes + self.labels.nbytes


@dataclass(frozen=True)
class ImageData:
    """A set, ready to be put on a device or, where it is streamed, to be opened by whoever trains on it.

    Decoded arrays are contiguous: Ray shares them without a copy.

    Attributes:
        train: the images that are learned from.
        validation: the images that accuracy is measured on, split off from the training images.
        num_classes: of the labels.
        classes: their names, (num_classes,).
        mean: of the training pixels, a channel of 3, where 1 is white.
        std: likewise; never 0.
        flip: whether and how training images are mirrored, as in `DataSpec`.
        crop: by how many pixels training images are shifted at most.
        name: of the set.
        cutout: the side of the square that is cut out of training images; 0: none.
    """

    train: ImageSplit | StreamSplit
    validation: ImageSplit | StreamSplit
    num_classes: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool | str
    crop: int
    name: str
    cutout: int = 0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """What the model gets, (3, H, W): grey images are expanded on the device."""
        return (3, *self.train.image_shape[1:])

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that this takes."""
        return self.train.num_bytes + self.validation.num_bytes

    @property
    def is_streamed(self) -> bool:
        """Whether the images are still on disk."""
        return isinstance(self.train, StreamSplit)


def known_shape(spec: DataSpec) -> tuple[int, tuple[int, int, int]] | None:
    """The number of classes of a set known by name, and `ImageData.input_shape`, without reading it; None for a user's
    own."""
    if spec.name not in SOURCES:
        return None
    source = SOURCES[spec.name]
    side = spec.image_size or source.side
    return source.num_classes, (3, side, side)


def known_data() -> list[str]:
    """The names that a `DataSpec` takes."""
    return [*SOURCES, *(f"{kind}:PATH" for kind in FOLDERS)]


def load_data(spec: DataSpec) -> ImageData:
    """Decodes the training images, or decides to stream them, and splits validation off; test is never opened.

    Raises:
        ConfigError: ``spec`` is out of range.
        DataError: the data are missing, damaged, too large, too few, or not of the form that was asked for.
    """
    raw = _read(spec, "train")
    limit = len(raw.labels) if spec.limit is None else spec.limit
    chosen = balanced_subset(raw.labels, limit)
    rest, held_out = stratified_split(raw.labels[chosen], spec.validation_fraction, spec.seed)
    if len(rest) < 2 or len(held_out) < 1:
        raise DataError(
            f"data {spec.name!r}: {len(chosen)} training images and validation_fraction {spec.validation_fraction} "
            f"leave {len(rest)} to train on and {len(held_out)} to validate; use more images or another fraction"
        )
    train, validation = _splits(spec, raw, [chosen[rest], chosen[held_out]])
    if train.image_shape != validation.image_shape:
        raise DataError(f"data {spec.name!r}: the images are not all of one size; set data.image_size")
    flip, crop = _augmentation(spec, train)
    mean, std = pixel_statistics(train.images if isinstance(train, ImageSplit) else train.sample())
    return ImageData(train, validation, len(raw.classes), raw.classes, mean, std, flip, crop, spec.name, spec.cutout)


def load_test(spec: DataSpec) -> ImageSplit | StreamSplit:
    """The whole test split of ``spec``, which ``limit`` and ``seed`` leave as it is.

    Raises:
        ConfigError: ``spec`` is out of range.
        DataError: as in `load_data`, or the set has no test split.
    """
    raw = _read(spec, "test")
    if not len(raw.labels):
        raise DataError(f"data {spec.name!r}: the test split holds no images")
    (test,) = _splits(spec, raw, [np.arange(len(raw.labels))])
    return test


def decoded(split: ImageSplit | StreamSplit) -> ImageSplit:
    """The split itself, of a set that is known not to be streamed."""
    assert isinstance(split, ImageSplit)
    return split


def _splits(spec: DataSpec, raw: RawSplit, parts: list[Indices]) -> list[ImageSplit | StreamSplit]:
    """The images at each of the sorted positions ``parts``: decoded, or as they are to be streamed."""
    everything = np.sort(np.concatenate(parts))
    shape = _streamed_shape(spec, raw, everything)
    if shape is None or raw.encoded is None:
        raw = cached(raw, everything)
        return [_decoded(spec, raw, part) for part in parts]
    resized_crop = raw.encoded.image_size is not None and spec.crop is None
    return [
        StreamSplit(raw.encoded, part, raw.labels[part], shape, resized_crop, spec.skip_broken, spec.workers)
        for part in parts
    ]


def _streamed_shape(spec: DataSpec, raw: RawSplit, chosen: Indices) -> tuple[int, int, int] | None:
    """The shape of one image (3, H, W) of a set that is to be streamed; None: it is to be decoded into memory."""
    images, memory = raw.encoded, host_memory()
    if images is None or spec.stream is False or (spec.stream == "auto" and memory is None):
        return None
    side = images.image_size
    height, width = (side, side) if side is not None else images.first_size(chosen, spec.skip_broken)
    if spec.stream == "auto" and len(chosen) * 3 * height * width <= _MEMORY_SHARE * (memory or 0):
        return None
    return 3, height, width


def _decoded(spec: DataSpec, raw: RawSplit, indices: Indices) -> ImageSplit:
    broken: list[int] = []
    images, labels = raw.pixels(indices, broken if spec.skip_broken else None), raw.labels[indices]
    if broken:
        _LOG.warning("data %r: %d images cannot be decoded and are skipped", spec.name, len(broken))
        images, labels = np.delete(images, broken, axis=0), np.delete(labels, broken)
    return ImageSplit(images, labels)


def _read(spec: DataSpec, split: str) -> RawSplit:
    problems = spec.problems()
    if problems:
        raise ConfigError(problems, "data")
    kind, colon, path = spec.name.partition(":")
    if colon:
        return FOLDERS[kind](split, Path(path).expanduser(), spec.image_size)
    source = SOURCES[spec.name]
    root = Path(spec.root or _DEFAULT_ROOT).expanduser()
    return source.read(split, root, spec.download, spec.image_size or source.image_size)


def _augmentation(spec: DataSpec, train: ImageSplit | StreamSplit) -> tuple[bool | str, int]:
    """Flip and crop: what the user set, else what suits the set."""
    height, width = train.image_shape[1:]
    source = SOURCES.get(spec.name)
    flip: bool | str = source.flip if source else True
    crop = source.crop if source else None
    if spec.flip is not None:
        flip = spec.flip
    if spec.crop is not None:
        crop = spec.crop
    if isinstance(train, StreamSplit) and train.resized_crop:
        crop = 0
    if crop is None:
        crop = min(height, width) // 8
    for name, pixels in (("crop", crop), ("cutout", spec.cutout)):
        if pixels >= min(height, width):
            raise DataError(
                f"data.{name} must be less than the image's side, got {pixels} for images of {height}x{width}"
            )
    return flip, crop
