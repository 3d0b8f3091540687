"""The data sets known by name: the digits of scikit-learn, and those that torchvision can fetch."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlsearch.errors import DataError
from rlsearch.training.data_decode import Pixels, resize_images
from rlsearch.training.data_files import read_image_folder
from rlsearch.training.data_split import stratified_split
from rlsearch.training.encoded_images import RawSplit

_DIGITS_TEST_FRACTION = 0.2
# Fixed for good, so that no spec's seed ever moves an image from test to train.
_DIGITS_TEST_SEED = 20170901
_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
# In the order of the folders, which are named by WordNet id.
_IMAGENETTE_NAMES = (
    "tench", "English springer", "cassette player", "chain saw", "church",
    "French horn", "garbage truck", "gas pump", "golf ball", "parachute",
)  # fmt: skip


def read_digits(split: str, root: Path, download: bool, image_size: int | None) -> RawSplit:
    """The 1,797 8x8 digits that come with scikit-learn, values 0 to 16 scaled to 0 to 255; a fixed fifth is test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, test = stratified_split(labels, _DIGITS_TEST_FRACTION, _DIGITS_TEST_SEED)
    chosen = train if split == "train" else test
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]
    return _from_array(images, labels[chosen], _DIGIT_NAMES, image_size)


def read_idx(name: str, split: str, root: Path, download: bool, image_size: int | None) -> RawSplit:
    """MNIST or FashionMNIST from idx files, packed (.gz) or not, in ``root/name/raw``."""
    prefix = "train" if split == "train" else "t10k"
    folder = root / name / "raw"
    if download and _idx_file(folder, f"{prefix}-images-idx3-ubyte") is None:
        _fetch(name, root)
    images = _read_idx_file(folder, f"{prefix}-images-idx3-ubyte", num_axes=3)
    labels = _read_idx_file(folder, f"{prefix}-labels-idx1-ubyte", num_axes=1).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {split} images but {len(labels)} labels; fetch the files again")
    classes = _DIGIT_NAMES if name == "MNIST" else _FASHION_NAMES
    if labels.size and labels.max() >= len(classes):
        row = int(np.flatnonzero(labels >= len(classes))[0])
        raise DataError(f"{folder}: {split} label {labels[row]} at row {row} is out of range, it must be in [0, 9]")
    return _from_array(images[:, None], labels, classes, image_size)


def read_imagenette(split: str, root: Path, download: bool, image_size: int | None) -> RawSplit:
    """Imagenette v2 below ``root``: the smallest of its three sizes that ``image_size`` allows."""
    side = image_size or 160
    suffix, size = ("-160", "160px") if side <= 160 else ("-320", "320px") if side <= 320 else ("", "full")
    folder = root / f"imagenette2{suffix}"
    if not folder.is_dir():
        if not download:
            raise _missing("imagenette", folder)
        _fetch("Imagenette", root, size=size)
    raw = read_image_folder(split, folder, image_size)
    classes = _IMAGENETTE_NAMES if len(raw.classes) == len(_IMAGENETTE_NAMES) else raw.classes
    return replace(raw, classes=classes)


def read_torchvision(name: str, split: str, root: Path, download: bool, image_size: int | None) -> RawSplit:
    """CIFAR10, CIFAR100, SVHN or STL10 with torchvision's own reader, which checks every file's checksum."""
    arguments: dict[str, Any] = {"split": split} if name in ("SVHN", "STL10") else {"train": split == "train"}
    try:
        dataset = _torchvision_set(name)(str(root), download=False, **arguments)
    except RuntimeError as error:
        if not download:
            raise _missing(name.lower(), root) from error
        dataset = _fetch(name, root, **arguments)
    labels = np.asarray(getattr(dataset, "targets", None) or dataset.labels, dtype=np.int64)
    images = dataset.data if name in ("SVHN", "STL10") else dataset.data.transpose(0, 3, 1, 2)
    classes = tuple(getattr(dataset, "classes", _DIGIT_NAMES))
    return _from_array(images, labels, classes, image_size)


def _from_array(
    images: Pixels, labels: npt.NDArray[np.int64], classes: tuple[str, ...], image_size: int | None
) -> RawSplit:
    """A split whose images (N, C, H, W) are decoded already."""
    return RawSplit(labels, classes, partial(_select, images, image_size))


def _select(images: Pixels, image_size: int | None, indices: npt.NDArray[np.int64], broken: list[int] | None) -> Pixels:
    return resize_images(np.ascontiguousarray(images[indices]), image_size)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx_file(folder: Path, name: str, num_axes: int) -> npt.NDArray[np.uint8]:
    """An idx file of bytes: two zeros, 8 for uint8, the number of axes, the big-endian sizes, the values."""
    path = _idx_file(folder, name)
    if path is None:
        raise _missing(folder.parent.name.lower(), folder / f"{name}[.gz]")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read, it may be truncated ({error}); fetch it again") from None
    start = 4 + 4 * num_axes
    if content[:4] != bytes((0, 0, 8, num_axes)) or len(content) < start:
        raise DataError(f"{path} is no idx file of uint8 with {num_axes} axes; fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=num_axes, offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=start)
    if values.size != np.prod(shape, dtype=object):
        raise DataError(f"{path} is truncated: {values.size} values for shape {shape}; fetch it again")
    return values.reshape(shape)


def _missing(name: str, place: Path) -> DataError:
    return DataError(
        f"data set {name!r} was not found, or is damaged, at {place}; set data.download to true to fetch it there, "
        "or data.root to the folder that holds it"
    )


def _torchvision_set(name: str) -> Callable[..., Any]:
    import torchvision  # takes a second to import, which digits and shards need not pay

    dataset: Callable[..., Any] = getattr(torchvision.datasets, name)
    return dataset


def _fetch(name: str, root: Path, **arguments: Any) -> Any:
    """Downloads a torchvision set into ``root``."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _torchvision_set(name)(str(root), download=True, **arguments)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(f"data set {name!r} cannot be fetched into {root}: {error}") from error
