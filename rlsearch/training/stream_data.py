"""The batches of a set that is too large for memory: decoded by workers ahead of time, the rest done on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlsearch.errors import DataError
from rlsearch.training.augmentation import RESIZED_CROPS, EpochAugmentation, random_stream
from rlsearch.training.data import ImageData
from rlsearch.training.device_data import DeviceData
from rlsearch.training.distributed import Group
from rlsearch.training.image_batches import ImageBatches
from rlsearch.training.image_stream import StreamSplit, epoch_order
from rlsearch.training.stream_reader import Batch, Skipped, read_batches


def open_images(data: ImageData, device: torch.device | str, group: Group | None = None) -> ImageBatches:
    """The images of ``data`` for a training on ``device``, perhaps by several processes: in memory, or streamed."""
    return (StreamData if data.is_streamed else DeviceData)(data, device, group)


class StreamData(ImageBatches):
    """The training and validation images, read from disk and decoded as they are needed.

    Args:
        data: what `rlsearch.training.data.load_data` returned, streamed.
        device: where training runs.
        group: as in `ImageBatches`; each process decodes its own parts alone.
    """

    def __init__(self, data: ImageData, device: torch.device | str, group: Group | None = None) -> None:
        device = torch.device(device)
        super().__init__(data, device, torch.from_numpy(data.train.labels).to(device), group)
        assert isinstance(data.train, StreamSplit)
        assert isinstance(data.validation, StreamSplit)
        self._train, self._validation = data.train, data.validation
        self._skipped, self._validation_skipped = Skipped(), Skipped()

    @property
    def num_bytes(self) -> int:
        """See `ImageBatches.num_bytes`; batches under way are a part of the training's memory."""
        return self.labels.nbytes

    @property
    def num_broken(self) -> int:
        """Images that could not be decoded, among those that were wanted so far."""
        return len(self._skipped.positions) + len(self._validation_skipped.positions)

    def train_batches(
        self, batch_size: int, epoch: int, seed: int, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `ImageBatches.train_batches`.

        Raises:
            DataError: an image cannot be decoded and is not to be skipped, no image of a batch can be, or a file was
                changed or removed since the set was opened.
        """
        order = epoch_order(self._train, epoch, seed)
        changes = EpochAugmentation.draw(
            self, order, self._image_shape, batch_size, seed=seed, epoch=epoch, device=self.device
        )
        # All of them are known before the first is under way: batches are read ahead.
        parts = [self._own(step, batch_size) for step in range(self.num_batches(batch_size))]
        regions = None
        if self._train.resized_crop:
            drawn = torch.rand(len(order), 4, generator=random_stream(seed, epoch, RESIZED_CROPS)).numpy()
            regions = [drawn[part] for part in parts]
        batches = [order[part].numpy() for part in parts]
        loaded = read_batches(self._train, batches, start=start_step, regions=regions, pin_memory=self._pins)
        for step, batch in zip(range(start_step, len(parts)), loaded, strict=True):
            part = self._own(step, batch_size)
            indices = order[part]
            if batch.broken:
                indices = self._filled(batch, indices)
            images = changes.moved(self._sent(batch.images), part)
            indices = self._sent(indices)
            yield changes.cut_out(self._normalised(images), part), self.labels[indices], indices
        self._skipped.tell()

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `ImageBatches.validation_batches`; errors are those of `train_batches`."""
        own = self._stretch(len(self._validation.labels))
        return self._streamed(self._validation, own, batch_size, self._validation_skipped)

    def _filled(self, batch: Batch, indices: Tensor) -> Tensor:
        """The positions of a batch with the broken ones replaced, and so are the images, in place.

        A batch of another size would be another step, and an epoch without a step would not fit the learning rates.
        """
        self._skipped.add(indices[list(batch.broken)].tolist(), batch.reason)
        sound = [place for place in range(len(indices)) if place not in batch.broken]
        if not sound:
            raise DataError(f"none of the {len(indices)} images of a batch can be decoded; one: {batch.reason}")
        stand_ins = [sound[number % len(sound)] for number in range(len(batch.broken))]
        batch.images[list(batch.broken)] = batch.images[stand_ins]
        filled = indices.clone()
        filled[list(batch.broken)] = indices[stand_ins]
        return filled
