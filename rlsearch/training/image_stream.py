"""A set that is decoded as it is needed: its description, which is light, and the order in which it is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rlsearch.training.augmentation import ORDER, random_stream
from rlsearch.training.data_decode import Pixels
from rlsearch.training.data_split import Indices
from rlsearch.training.encoded_images import EncodedImages

# From so many images the channels' mean and spread are known well enough, and so many reads give them from shards.
_SAMPLE_IMAGES, _SAMPLE_GROUPS = 1024, 16


@dataclass(frozen=True)
class StreamSplit:
    """Images that stay on disk, in place of an `ImageSplit`; every process that gets this opens them itself.

    Attributes:
        images: where they are.
        positions: which of them belong to this split, sorted, (N,).
        labels: (N,) int64.
        image_shape: of every image, (3, H, W).
        resized_crop: whether training takes a random region of each image, brought to the image's size, in place of its
            middle.
        skip_broken: whether images that cannot be decoded are left out rather than an error.
        workers: how many processes decode; 0: the training's own does; None: one for each CPU thread of the training.
    """

    images: EncodedImages
    positions: Indices
    labels: Indices
    image_shape: tuple[int, int, int]
    resized_crop: bool = False
    skip_broken: bool = False
    workers: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that this takes."""
        return self.positions.nbytes + self.labels.nbytes

    def sample(self) -> Pixels:
        """Some hundred of its images, always the same, from few places of the disk.

        Raises:
            DataError: one of them cannot be decoded and is not to be skipped, or none can.
        """
        images = self.images
        mean_size = max(1, len(self.positions) // (len(images.group_starts) - 1))
        groups = self.groups()
        present = np.unique(groups)
        wanted = _evenly(len(present), max(_SAMPLE_GROUPS, _SAMPLE_IMAGES // mean_size))
        chosen = self.positions[np.isin(groups, present[wanted])]
        chosen = chosen[_evenly(len(chosen), _SAMPLE_IMAGES)]
        broken: list[int] | None = [] if self.skip_broken else None
        return np.delete(images.pixels(chosen, broken), broken or [], axis=0)

    def groups(self) -> Indices:
        """The group of each image of the split, (N,)."""
        found: Indices = np.searchsorted(self.images.group_starts, self.positions, side="right") - 1
        return found


def epoch_order(split: StreamSplit, epoch: int, seed: int) -> torch.Tensor:
    """The images of a training split in the order of an epoch, (N,) int64, on the host.

    What can be read alone is shuffled fully, as in memory. Row groups are shuffled, and so are the images of every
    window of some of them: each row group is then read once by each worker, and not once for each of its rows.
    """
    generator = random_stream(seed, epoch, ORDER)
    shuffled = torch.randperm(len(split.positions), generator=generator)
    num_groups = len(split.images.group_starts) - 1
    if num_groups <= split.images.window:
        return shuffled
    rank = torch.randperm(num_groups, generator=generator)
    window = rank[torch.from_numpy(split.groups())] // split.images.window
    return shuffled[torch.argsort(window[shuffled], stable=True)]


def _evenly(count: int, wanted: int) -> Indices:
    """At most ``wanted`` of ``count`` positions, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
