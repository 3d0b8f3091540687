"""Images as bytes on the training device: shuffled, mirrored, shifted and normalised there, a batch at a time.

Order and augmentation are drawn by the host's random generator, a whole epoch at once, and sent over without waiting
for the device: a run that moves to another device, or resumes, sees the same batches.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlsearch.errors import DataError
from rlsearch.training.data import ImageData, ImageSplit
from rlsearch.training.distributed import Group

# What a random stream is for; each purpose has its own, so that none repeats another.
_ORDER, _AUGMENTATION, _VIEWS = 0, 1, 2


class DeviceData:
    """The training and validation images on one device.

    Args:
        data: what `rlsearch.training.data.load_data` returned. On the CPU its arrays are used as they are, not copied.
        device: where training runs.
        group: the processes that train together, where there are several: batches are this process's parts then, and
            what is random in them is the same as in a training alone.

    Attributes:
        device: where training runs.
        labels: (num_train,) int64, of the training images.
        flip: whether training images are mirrored at random.
        crop: by how many pixels training images are shifted at most.
        input_shape: of a batch without its first axis, (3, H, W).
        num_train: how many training images there are.
        num_validation: how many validation images there are.
    """

    def __init__(self, data: ImageData, device: torch.device | str, group: Group | None = None) -> None:
        self.device = torch.device(device)
        self._group = group
        self.flip = data.flip
        self.crop = data.crop
        self.input_shape = data.input_shape
        self.num_train = len(data.train.labels)
        self.num_validation = len(data.validation.labels)
        self._images, self.labels = self._send(data.train)
        self._validation = self._send(data.validation)
        mean, std = torch.tensor(data.mean, dtype=torch.float64), torch.tensor(data.std, dtype=torch.float64)
        # (x / 255 - mean) / std as one multiplication and one addition of the bytes.
        self._scale = (1 / (255 * std)).float().view(3, 1, 1).to(self.device)
        self._shift = (-mean / std).float().view(3, 1, 1).to(self.device)

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
        return _generator(seed, epoch, _AUGMENTATION)

    def epoch_order(self, batch_size: int, epoch: int, seed: int) -> Iterator[Tensor]:
        """Positions of the training images of every batch, (B,) int64, each image once in an order of its own an epoch.

        A last batch of one image is left out: batch norm cannot train on it.
        """
        return self._parts(self._order(epoch, seed).to(self.device, non_blocking=True), batch_size)

    def host_order(self, batch_size: int, epoch: int, seed: int) -> Iterator[Tensor]:
        """The same as `epoch_order`, in host memory."""
        return self._parts(self._order(epoch, seed), batch_size)

    def train_batches(self, batch_size: int, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The augmented training images of an epoch; everything random depends on ``seed`` and ``epoch`` alone.

        Args:
            batch_size: images a batch, the last one excepted.
            epoch: from 0 or 1 on.
            seed: of order and augmentation.

        Yields:
            Images (B, 3, H, W) float32 channels_last, normalised; labels (B,); positions (B,) in the training set.
        """
        generator = self.generator(seed, epoch)
        offsets = _offsets(self.num_train, self.crop, generator).to(self.device, non_blocking=True)
        mirrored = (torch.rand(self.num_train, generator=generator) < 0.5).to(self.device, non_blocking=True)
        for batch, whole in enumerate(self.epoch_order(batch_size, epoch, seed)):
            own = self.own_part(len(whole))
            indices = whole[own]
            part = slice(batch * batch_size + own.start, batch * batch_size + own.stop)
            images = self._images.index_select(0, indices)
            if self.crop:
                images = _padded_crop(images, self.crop, offsets[:, part])
            if self.flip:
                images = torch.where(mirrored[part, None, None, None], images.flip(3), images)
            yield self._normalised(images), self.labels[indices], indices

    def own_part(self, count: int) -> slice:
        """This process's part of a training batch of ``count`` images, which is under way from now on."""
        return slice(0, count) if self._group is None else self._group.take(count)

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
            images = _padded_crop(images, self.crop, offsets[:, indices])
        return self._normalised(images.flip(3) if flipped else images)

    def view_offsets(self, view: int, seed: int) -> Tensor | None:
        """Where each training image is cropped in one fixed view, (2, num_train); None in the plain first view."""
        if view == 0 or self.crop == 0:
            return None
        return _offsets(self.num_train, self.crop, _generator(seed, view, _VIEWS)).to(self.device)

    def fingerprint(self) -> str:
        """Tells sets of training images apart: of the labels, and of some hundred images over the whole set."""
        some = torch.linspace(0, self.num_train - 1, min(self.num_train, 512), device=self.device).long()
        described = hashlib.sha256(repr((self._images.shape, self.flip, self.crop)).encode())
        for tensor in (self.labels, self._images.index_select(0, some), self._scale, self._shift):
            described.update(tensor.cpu().contiguous().numpy().tobytes())
        return described.hexdigest()[:16]

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images, or this process's part of them, in their own order: images (B, 3, H, W) as in
        `train_batches`, labels (B,)."""
        images, labels = self._validation
        own = slice(None) if self._group is None else self._group.stretch(len(labels))
        return self._plain_batches(images[own], labels[own], batch_size)

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
        return torch.randperm(self.num_train, generator=_generator(seed, epoch, _ORDER))

    def _parts(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        for batch in range(self.num_batches(batch_size)):
            yield order[batch * batch_size : (batch + 1) * batch_size]

    def _plain_batches(self, images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            yield self._normalised(images[part]), labels[part]

    def _normalised(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 (B, 3, H, W) channels_last; grey is expanded by the broadcast."""
        scaled = torch.addcmul(self._shift, images.float(), self._scale)
        return scaled.contiguous(memory_format=torch.channels_last)

    def _send(self, split: ImageSplit) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            # Ray's shared memory is read-only, which torch warns about; nothing here writes to these tensors.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(split.images).to(self.device), torch.from_numpy(split.labels).to(self.device)


def shifted(
    features: Tensor,
    cells: int,
    generator: torch.Generator,
    whole: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """Each feature map of a batch shifted by up to ``cells`` cells in both directions, zeros moving in.

    Args:
        features: (B, C, H, W); its memory format is kept.
        cells: the greatest shift, >= 1.
        generator: a stream of the host, as `DeviceData.generator` gives it.
        whole: how many images the batch has, where these are only the ``own`` part of it.
        own: which of the batch's images these are.
    """
    count, channels, height, width = features.shape
    offsets = (_offsets(whole or count, cells, generator)[:, own] - cells).to(features.device, non_blocking=True)
    rows, rows_inside = _moved_axis(offsets[0], height)
    columns, columns_inside = _moved_axis(offsets[1], width)
    # With the channels last a cell is one run of memory, so that this one gather is all the copying there is.
    image = torch.arange(count, device=features.device)[:, None, None]
    cell = (image * height + rows[:, :, None]) * width + columns[:, None, :]
    cells_of_all = features.permute(0, 2, 3, 1).reshape(-1, channels)
    inside = (rows_inside[:, :, None] & columns_inside[:, None, :]).view(-1, 1)
    moved = cells_of_all.index_select(0, cell.flatten()).mul_(inside)
    moved = moved.view(count, height, width, channels).permute(0, 3, 1, 2)
    return moved if features.is_contiguous(memory_format=torch.channels_last) else moved.contiguous()


def _moved_axis(offsets: Tensor, extent: int) -> tuple[Tensor, Tensor]:
    """For every image (B,) and position of one axis, where it is read from and whether that is inside: (B, extent)."""
    source = torch.arange(extent, device=offsets.device) + offsets[:, None]
    return source.clamp(0, extent - 1), (source >= 0) & (source < extent)


def _padded_crop(images: Tensor, padding: int, offsets: Tensor) -> Tensor:
    """The window at ``offsets`` (2, B), row and column in [0, 2 * padding], of each zero-padded image (B, C, H, W).

    All windows of all images are one view without memory, from which one gather takes one window an image.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    return windows[torch.arange(len(images), device=images.device), offsets[0], offsets[1]]


def _offsets(count: int, padding: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2 * padding + 1, (2, count), generator=generator)


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """A stream for one purpose in one epoch; neighbouring numbers give unrelated streams."""
    state = np.random.SeedSequence([seed, epoch, purpose]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
