"""Images as bytes on the training device: shuffled, mirrored, shifted and normalised there, a batch at a time.

The order of an epoch is drawn as its augmentation is (`rlsearch.training.augmentation`): by the host, without waiting
for the device.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from rlsearch.errors import DataError
from rlsearch.training.augmentation import (
    AUGMENTATION,
    ORDER,
    VIEWS,
    EpochAugmentation,
    Normalisation,
    random_offsets,
    random_stream,
    window_corners,
    window_table,
    windows,
)
from rlsearch.training.data import ImageData, ImageSplit


class DeviceData:
    """The training and validation images on one device.

    Args:
        data: what `rlsearch.training.data.load_data` returned. On the CPU its arrays are used as they are, not copied.
        device: where training runs.

    Attributes:
        device: where training runs.
        labels: (num_train,) int64, of the training images.
        flip: whether training images are mirrored, and how, as in `rlsearch.training.augmentation.Augmented`.
        crop: by how many pixels training images are shifted at most.
        cutout: the side of the square that is cut out of training images; 0: none.
        input_shape: of a batch without its first axis, (3, H, W).
        num_train: how many training images there are.
        num_validation: how many validation images there are.
    """

    def __init__(self, data: ImageData, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.flip = data.flip
        self.crop = data.crop
        self.cutout = data.cutout
        self.input_shape = data.input_shape
        self.num_train = len(data.train.labels)
        self.num_validation = len(data.validation.labels)
        self._images, self.labels = self._send(data.train)
        self._validation = self._send(data.validation)
        self._normalised = Normalisation(data.mean, data.std, data.input_shape[2], self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes that the set takes on the device."""
        return sum(tensor.nbytes for tensor in (self._images, self.labels, *self._validation))

    def num_batches(self, batch_size: int) -> int:
        """Training batches an epoch."""
        full, rest = divmod(self.num_train, batch_size)
        return full + (rest > 1)

    def generator(self, seed: int, epoch: int) -> torch.Generator:
        """The host's random stream for the augmentation of an epoch; the same for the same two numbers."""
        return random_stream(seed, epoch, AUGMENTATION)

    def epoch_order(self, batch_size: int, epoch: int, seed: int) -> Iterator[Tensor]:
        """Positions of the training images of every batch, (B,) int64, each image once in an order of its own an epoch.

        A last batch of one image is left out: batch norm cannot train on it.
        """
        return self._parts(self._order(epoch, seed).to(self.device, non_blocking=True), batch_size)

    def host_order(self, batch_size: int, epoch: int, seed: int) -> Iterator[Tensor]:
        """The same as `epoch_order`, in host memory."""
        return self._parts(self._order(epoch, seed), batch_size)

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
        order, shape = self._order(epoch, seed), self._images.shape[1:]
        changes = EpochAugmentation.draw(self, order, shape, batch_size, seed=seed, epoch=epoch, device=self.device)
        order = order.to(self.device, non_blocking=True)
        for step in range(start_step, self.num_batches(batch_size)):
            part = slice(step * batch_size, (step + 1) * batch_size)
            indices = order[part]
            images = changes.moved(self._images.index_select(0, indices), part)
            yield changes.cut_out(self._normalised(images), part), self.labels[indices], indices

    def view(self, indices: Tensor, flipped: bool = False, offsets: Tensor | None = None) -> Tensor:
        """Training images without any randomness, as for a cache of features.

        Args:
            indices: (B,) positions in the training set.
            flipped: whether all of them are mirrored.
            offsets: of all training images, as `view_offsets` gives them; None: nothing is cropped.

        Returns:
            (B, 3, H, W) float32 channels_last, normalised.
        """
        images = self._images.index_select(0, indices)
        if offsets is not None:
            shape, place = images.shape[1:], offsets[:, indices]
            corners = window_corners(place, torch.zeros_like(place[0], dtype=torch.bool), self.crop, shape)
            table = window_table(len(indices), self.crop, shape, with_mirrored=False).to(self.device)
            images = windows(images, self.crop, corners, table, with_mirrored=False)
        return self._normalised(images.flip(3) if flipped else images)

    def view_offsets(self, view: int, seed: int) -> Tensor | None:
        """Where each training image is cropped in one fixed view, (2, num_train); None in the plain first view."""
        if view == 0 or self.crop == 0:
            return None
        return random_offsets(self.num_train, self.crop, random_stream(seed, view, VIEWS)).to(self.device)

    def fingerprint(self) -> str:
        """Tells sets of training images apart: of the labels, and of some hundred images over the whole set."""
        some = torch.linspace(0, self.num_train - 1, min(self.num_train, 512), device=self.device).long()
        described = hashlib.sha256(repr((self._images.shape, self.flip, self.crop)).encode())
        for tensor in (self.labels, self._images.index_select(0, some), *self._normalised.described()):
            described.update(tensor.cpu().contiguous().numpy().tobytes())
        return described.hexdigest()[:16]

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images in their own order: images (B, 3, H, W) as in `train_batches`, labels (B,)."""
        return self._plain_batches(*self._validation, batch_size)

    def split_batches(self, split: ImageSplit, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Another split (test) in its own order, normalised with the statistics of the training images.

        Raises:
            DataError: its images have another shape than the training images.
        """
        expected = tuple(self._images.shape[1:])
        if split.images.shape[1:] != expected:
            raise DataError(
                f"images of shape {split.images.shape[1:]} (channels, height, width) cannot stand beside training "
                f"images of shape {expected}; set data.image_size to bring all to one size"
            )
        return self._plain_batches(*self._send(split), batch_size)

    def _order(self, epoch: int, seed: int) -> Tensor:
        return torch.randperm(self.num_train, generator=random_stream(seed, epoch, ORDER))

    def _parts(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        for batch in range(self.num_batches(batch_size)):
            yield order[batch * batch_size : (batch + 1) * batch_size]

    def _plain_batches(self, images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            yield self._normalised(images[part]), labels[part]

    def _send(self, split: ImageSplit) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            # Ray's shared memory is read-only, which torch warns about; nothing here writes to these tensors.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(split.images).to(self.device), torch.from_numpy(split.labels).to(self.device)
