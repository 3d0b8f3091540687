"""The images of a training: named in a `DataSpec`, decoded once, split by a fixed seed.

A set is held in memory whole, decoded: a byte a channel and pixel, so 154 MB for CIFAR-10's 50,000 training images and
7.5 GB for 50,000 of 224x224. Sets beyond memory are not supported yet; ``limit`` and ``image_size`` make them fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlsearch.errors import ConfigError, DataError, Problem, suggestion
from rlsearch.training.augmentation import ALTERNATING
from rlsearch.training.data_decode import Pixels
from rlsearch.training.data_files import read_image_folder, read_parquet
from rlsearch.training.data_named import read_digits, read_idx, read_imagenette, read_torchvision
from rlsearch.training.data_split import Indices, balanced_subset, stratified_split
from rlsearch.training.decoded_cache import cached
from rlsearch.training.encoded_images import RawSplit

_DEFAULT_ROOT = "~/.cache/rlsearch/data"


@dataclass(frozen=True)
class _Source:
    """A set known by name.

    Attributes:
        read: ``(split, root, download, image_size) -> RawSplit``.
        num_classes: of the set.
        side: of its square images in pixels, as far as they are of one size or brought to one.
        flip: whether its images may be mirrored.
        crop: by how many pixels its images may be shifted; None: an eighth of their side.
        image_size: the size that its images are brought to where the user names none.
    """

    read: Callable[[str, Path, bool, int | None], RawSplit]
    num_classes: int
    side: int
    flip: bool
    crop: int | None = None
    image_size: int | None = None


# The one place to add a data set by name.
_SOURCES = {
    "digits": _Source(read_digits, 10, 8, flip=False),
    "cifar10": _Source(partial(read_torchvision, "CIFAR10"), 10, 32, flip=True),
    "cifar100": _Source(partial(read_torchvision, "CIFAR100"), 100, 32, flip=True),
    "svhn": _Source(partial(read_torchvision, "SVHN"), 10, 32, flip=False),
    "stl10": _Source(partial(read_torchvision, "STL10"), 10, 96, flip=True),
    "mnist": _Source(partial(read_idx, "MNIST"), 10, 28, flip=False, crop=2),
    "fashionmnist": _Source(partial(read_idx, "FashionMNIST"), 10, 28, flip=True, crop=2),
    "imagenette": _Source(read_imagenette, 10, 128, flip=True, image_size=128),
}
# The same for sets of the user's own, written KIND:PATH.
_FOLDERS: dict[str, Callable[[str, Path, int | None], RawSplit]] = {
    "parquet": read_parquet,
    "imagefolder": read_image_folder,
}


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
            their side.
        cutout: the side of a square, somewhere in each training image, that is set to the channels' means; less than
            the image's side; 0: none. Stored features (Learn&Drop) come from whole images.
        seed: decides which images validate.
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

    def problems(self, key: str = "data") -> list[Problem]:
        """What is out of range, each with its key."""
        found = []
        kind, colon, path = self.name.partition(":")
        if colon and kind not in _FOLDERS:
            found.append(Problem(f"{key}.name", f"unknown kind {kind!r} of {self.name!r}{suggestion(kind, _FOLDERS)}"))
        elif colon and not path:
            found.append(Problem(f"{key}.name", f"{self.name!r} must name a folder, as in {kind}:PATH"))
        elif not colon and self.name not in _SOURCES:
            found.append(Problem(f"{key}.name", f"unknown data set {self.name!r}{suggestion(self.name, known_data())}"))
        if not (math.isfinite(self.validation_fraction) and 0 < self.validation_fraction < 1):
            message = f"must be above 0 and below 1, got {self.validation_fraction}"
            found.append(Problem(f"{key}.validation_fraction", message))
        for name, least in (("limit", 2), ("image_size", 1), ("crop", 0), ("cutout", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(Problem(f"{key}.{name}", f"must be a whole number of at least {least}, got {value}"))
        if isinstance(self.flip, str) and self.flip != ALTERNATING:
            found.append(Problem(f"{key}.flip", f"must be true, false or {ALTERNATING}, got {self.flip!r}"))
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


@dataclass(frozen=True)
class ImageData:
    """A decoded set, ready to be put on a device. Its arrays are contiguous: Ray shares them without a copy.

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

    train: ImageSplit
    validation: ImageSplit
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
        height, width = self.train.images.shape[2:]
        return (3, height, width)


def known_shape(spec: DataSpec) -> tuple[int, tuple[int, int, int]] | None:
    """The number of classes of a set known by name, and `ImageData.input_shape`, without reading it; None for a user's
    own."""
    if spec.name not in _SOURCES:
        return None
    source = _SOURCES[spec.name]
    side = spec.image_size or source.side
    return source.num_classes, (3, side, side)


def known_data() -> list[str]:
    """The names that a `DataSpec` takes."""
    return [*_SOURCES, *(f"{kind}:PATH" for kind in _FOLDERS)]


def load_data(spec: DataSpec) -> ImageData:
    """Decodes the training images and splits validation off; the test split is never opened.

    Raises:
        ConfigError: ``spec`` is out of range.
        DataError: the data are missing, damaged, too large, too few, or not of the form that was asked for.
    """
    raw = _read(spec, "train")
    limit = len(raw.labels) if spec.limit is None else spec.limit
    chosen = balanced_subset(raw.labels, limit)
    raw = cached(raw, chosen)
    rest, held_out = stratified_split(raw.labels[chosen], spec.validation_fraction, spec.seed)
    if len(rest) < 2 or len(held_out) < 1:
        raise DataError(
            f"data {spec.name!r}: {len(chosen)} training images and validation_fraction {spec.validation_fraction} "
            f"leave {len(rest)} to train on and {len(held_out)} to validate; use more images or another fraction"
        )
    train, validation = (_decoded(raw, indices) for indices in (chosen[rest], chosen[held_out]))
    if train.images.shape[1:] != validation.images.shape[1:]:
        raise DataError(f"data {spec.name!r}: the images are not all of one size; set data.image_size")
    flip, crop = _augmentation(spec, train.images)
    mean, std = _pixel_statistics(train.images)
    return ImageData(train, validation, len(raw.classes), raw.classes, mean, std, flip, crop, spec.name, spec.cutout)


def load_test(spec: DataSpec) -> ImageSplit:
    """Decodes the whole test split of ``spec``, which ``limit`` and ``seed`` leave as it is.

    Raises:
        ConfigError: ``spec`` is out of range.
        DataError: as in `load_data`, or the set has no test split.
    """
    raw = _read(spec, "test")
    if not len(raw.labels):
        raise DataError(f"data {spec.name!r}: the test split holds no images")
    everything = np.arange(len(raw.labels))
    return _decoded(cached(raw, everything), everything)


def _decoded(raw: RawSplit, indices: Indices) -> ImageSplit:
    return ImageSplit(raw.pixels(indices, None), raw.labels[indices])


def _read(spec: DataSpec, split: str) -> RawSplit:
    problems = spec.problems()
    if problems:
        raise ConfigError(problems, "data")
    kind, colon, path = spec.name.partition(":")
    if colon:
        return _FOLDERS[kind](split, Path(path).expanduser(), spec.image_size)
    source = _SOURCES[spec.name]
    root = Path(spec.root or _DEFAULT_ROOT).expanduser()
    return source.read(split, root, spec.download, spec.image_size or source.image_size)


def _augmentation(spec: DataSpec, images: Pixels) -> tuple[bool | str, int]:
    """Flip and crop: what the user set, else what suits the set."""
    height, width = images.shape[2:]
    source = _SOURCES.get(spec.name)
    flip: bool | str = source.flip if source else True
    crop = source.crop if source else None
    if spec.flip is not None:
        flip = spec.flip
    if spec.crop is not None:
        crop = spec.crop
    if crop is None:
        crop = min(height, width) // 8
    for name, pixels in (("crop", crop), ("cutout", spec.cutout)):
        if pixels >= min(height, width):
            raise DataError(
                f"data.{name} must be less than the image's side, got {pixels} for images of {height}x{width}"
            )
    return flip, crop


def _pixel_statistics(images: Pixels) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each of 3 channels, where 1 is white; exact sums over blocks of images."""
    num_channels = images.shape[1]
    total = np.zeros(num_channels)
    squares = np.zeros(num_channels)
    for start in range(0, len(images), 256):
        block = images[start : start + 256].astype(np.float64)
        total += block.sum(axis=(0, 2, 3))
        squares += np.square(block).sum(axis=(0, 2, 3))
    num_pixels = images.size / num_channels
    mean = total / num_pixels
    # A channel of one colour has no spread; one grey level keeps its normalisation finite.
    std = np.maximum(np.sqrt(np.maximum(squares / num_pixels - mean**2, 0)), 1)
    expanded_mean, expanded_std = ([float(v) / 255 for v in np.broadcast_to(values, 3)] for values in (mean, std))
    return (expanded_mean[0], expanded_mean[1], expanded_mean[2]), (expanded_std[0], expanded_std[1], expanded_std[2])
