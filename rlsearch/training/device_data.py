"""Images as bytes on the training device: shuffled, mirrored, shifted and normalised there, a batch at a time.

The order of an epoch is drawn as its augmentation is (`rlsearch.training.augmentation`): by the host, without waiting
for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rlsearch.training.augmentation import (
    AUGMENTATION,
    ORDER,
    VIEWS,
    EpochAugmentation,
    Windows,
    random_offsets,
    random_stream,
)
from rlsearch.training.data import ImageData, decoded
from rlsearch.training.distributed import Group
from rlsearch.training.image_batches import ImageBatches, on_device


class DeviceData(ImageBatches):
    """The training and validation images in memory, on one device.

    Args:
        data: what `rlsearch.training.data.load_data` returned, decoded. On the CPU its arrays are used as they are.
        device: where training runs.
        group: as in `ImageBatches`.
    """

    def __init__(self, data: ImageData, device: torch.device | str, group: Group | None = None) -> None:
        device = torch.device(device)
        self._images, labels = on_device(decoded(data.train), device)
        self._validation = on_device(decoded(data.validation), device)
        super().__init__(data, device, labels, group)

    @property
    def num_bytes(self) -> int:
        """See `ImageBatches.num_bytes`."""
        return sum(tensor.nbytes for tensor in (self._images, self.labels, *self._validation))

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
        """See `ImageBatches.train_batches`."""
        order, shape = self._order(epoch, seed), self._images.shape[1:]
        changes = EpochAugmentation.draw(self, order, shape, batch_size, seed=seed, epoch=epoch, device=self.device)
        order = order.to(self.device, non_blocking=True)
        for step in range(start_step, self.num_batches(batch_size)):
            part = self._own(step, batch_size)
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
            windows = Windows(len(indices), self.crop, images.shape[1:], self.device, with_mirrored=False)
            images = windows(images, windows.corners(offsets[:, indices], None))
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
        """See `ImageBatches.validation_batches`."""
        images, labels = self._validation
        own = self._stretch(len(labels))
        return self._plain_batches(images[own], labels[own], batch_size)

    def _order(self, epoch: int, seed: int) -> Tensor:
        return torch.randperm(self.num_train, generator=random_stream(seed, epoch, ORDER))

    def _parts(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        for batch in range(self.num_batches(batch_size)):
            yield order[batch * batch_size : (batch + 1) * batch_size]
