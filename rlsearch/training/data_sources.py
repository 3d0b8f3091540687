"""Which data sets there are, and what suits each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlsearch.training.data_files import read_image_folder, read_parquet
from rlsearch.training.data_named import read_digits, read_idx, read_imagenette, read_torchvision
from rlsearch.training.encoded_images import RawSplit


@dataclass(frozen=True)
class Source:
    """A set known by name.

    Attributes:
        read: ``(split, root, download, image_size) -> RawSplit``.
        num_classes: of the set.
        side: of its square images in pixels, as far as they are of one size or brought to one.
        flip: whether its images may be mirrored.
        crop: by how many pixels its images may be shifted; None: an eighth of their side.
        image_size: the size that its images are brought to where the user names none.
        encoded: whether its images have to be decoded, and so can be streamed.
    """

    read: Callable[[str, Path, bool, int | None], RawSplit]
    num_classes: int
    side: int
    flip: bool
    crop: int | None = None
    image_size: int | None = None
    encoded: bool = False


# The one place to add a data set by name.
SOURCES = {
    "digits": Source(read_digits, 10, 8, flip=False),
    "cifar10": Source(partial(read_torchvision, "CIFAR10"), 10, 32, flip=True),
    "cifar100": Source(partial(read_torchvision, "CIFAR100"), 100, 32, flip=True),
    "svhn": Source(partial(read_torchvision, "SVHN"), 10, 32, flip=False),
    "stl10": Source(partial(read_torchvision, "STL10"), 10, 96, flip=True),
    "mnist": Source(partial(read_idx, "MNIST"), 10, 28, flip=False, crop=2),
    "fashionmnist": Source(partial(read_idx, "FashionMNIST"), 10, 28, flip=True, crop=2),
    "imagenette": Source(read_imagenette, 10, 128, flip=True, image_size=128, encoded=True),
}
# The same for sets of the user's own, written KIND:PATH.
FOLDERS: dict[str, Callable[[str, Path, int | None], RawSplit]] = {
    "parquet": read_parquet,
    "imagefolder": read_image_folder,
}
