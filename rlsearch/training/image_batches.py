"""What a training asks of its images, wherever they are: in memory, or on disk."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rlsearch.errors import DataError
from rlsearch.training.augmentation import Normalisation
from rlsearch.training.data import ImageData, ImageSplit
from rlsearch.training.distributed import Group
from rlsearch.training.image_stream import StreamSplit
from rlsearch.training.stream_reader import Skipped, read_batches


class ImageBatches(ABC):
    """The training and validation images, in batches on one device.

    Args:
        data: what `rlsearch.training.data.load_data` returned.
        device: where training runs.
        labels: of the training images, on the device.
        group: the processes that train together, where there are several: batches are this process's parts then, and
            what is random in them is the same as in a training alone.

    Attributes:
        name: of the set.
        num_classes: of the labels.
        is_streamed: whether the images stay on disk.
        device: where training runs.
        labels: (num_train,) int64, of the training images.
        flip: whether training images are mirrored, and how, as in `rlsearch.training.augmentation.Augmented`.
        crop: by how many pixels training images are shifted at most.
        cutout: the side of the square that is cut out of training images; 0: none.
        input_shape: of a batch without its first axis, (3, H, W).
        num_train: how many training images there are.
        num_validation: how many validation images there are.
    """

    def __init__(self, data: ImageData, device: torch.device, labels: Tensor, group: Group | None = None) -> None:
        self._group = group
        self.name = data.name
        self.num_classes = data.num_classes
        self.is_streamed = data.is_streamed
        self.device = device
        self.labels = labels
        self.flip = data.flip
        self.crop = data.crop
        self.cutout = data.cutout
        self.input_shape = data.input_shape
        self.num_train = len(data.train.labels)
        self.num_validation = len(data.validation.labels)
        self._image_shape = data.train.image_shape
        self._normalised = Normalisation(data.mean, data.std, data.input_shape[2], device)

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that the set takes on the device."""

    @abstractmethod
    def train_batches(
        self, batch_size: int, epoch: int, seed: int, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The augmented training images of an epoch; everything random depends on ``seed`` and ``epoch`` alone.

        Args:
            batch_size: images a batch, the last one excepted.
            epoch: from 0 or 1 on.
            seed: of order and augmentation.
            start_step: how many batches are left out at the beginning; the others are as they would be after them.

        Yields:
            Images (B, 3, H, W) float32 channels_last, normalised; labels (B,); positions (B,) in the training set.
        """

    @abstractmethod
    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images, or this process's part of them, in their own order: images (B, 3, H, W) as in
        `train_batches`, labels (B,)."""

    def own_part(self, count: int) -> slice:
        """This process's part of a training batch of ``count`` images, which is under way from now on."""
        return slice(0, count) if self._group is None else self._group.take(count)

    def num_batches(self, batch_size: int) -> int:
        """Training batches an epoch. A last batch of one image is left out: batch norm cannot train on it."""
        full, rest = divmod(self.num_train, batch_size)
        return full + (rest > 1)

    def split_batches(self, split: ImageSplit | StreamSplit, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Another split (test) in its own order, normalised with the statistics of the training images.

        Raises:
            DataError: its images have another shape than the training images.
        """
        if split.image_shape != self._image_shape:
            raise DataError(
                f"images of shape {split.image_shape} (channels, height, width) cannot stand beside training "
                f"images of shape {self._image_shape}; set data.image_size to bring all to one size"
            )
        if isinstance(split, StreamSplit):
            return self._streamed(split, slice(0, len(split.labels)), batch_size, Skipped())
        return self._plain_batches(*on_device(split, self.device), batch_size)

    def _own(self, step: int, batch_size: int) -> slice:
        """This process's part of a step's batch, as places in the epoch's order; the batch is under way from now on."""
        start = step * batch_size
        part = self.own_part(min(batch_size, self.num_train - start))
        return slice(start + part.start, start + part.stop)

    def _stretch(self, count: int) -> slice:
        """This process's part of ``count`` images that are looked at once."""
        return slice(0, count) if self._group is None else self._group.stretch(count)

    def _plain_batches(self, images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            yield self._normalised(images[part]), labels[part]

    def _streamed(
        self, split: StreamSplit, own: slice, batch_size: int, skipped: Skipped
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The ``own`` images of a streamed split in its order, without those that are skipped."""
        places = np.arange(own.start, own.stop)
        batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
        labels = torch.from_numpy(split.labels)
        for positions, batch in zip(batches, read_batches(split, batches, pin_memory=self._pins), strict=True):
            images, sound = batch.images, torch.from_numpy(positions)
            if batch.broken:
                skipped.add(positions[list(batch.broken)].tolist(), batch.reason)
                kept = torch.from_numpy(np.delete(np.arange(len(positions)), batch.broken))
                images, sound = images[kept], sound[kept]
            if len(sound):
                yield self._normalised(self._sent(images)), self._sent(labels[sound])
        skipped.tell()

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def on_device(split: ImageSplit, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors; on the CPU the arrays are used as they are, not copied."""
    with warnings.catch_warnings():
        # Ray's shared memory is read-only, which torch warns about; nothing here writes to these tensors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device)
