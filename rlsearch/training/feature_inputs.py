"""What the learning part of a network is fed with: augmented images, or the stored outputs of the dropped prefix."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlsearch.learn_drop import Dropper, FeatureCache
from rlsearch.learn_drop.features import available_bytes, num_bytes
from rlsearch.training.device_data import DeviceData, shifted
from rlsearch.training.loop import autocast

_LOG = logging.getLogger(__name__)

# Memory that a cache leaves free: the training itself still needs some.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class CacheWork:
    """Forward passes that were made to fill a cache: ``num_images`` through the segments from ``start`` to ``end``."""

    num_images: int
    start: int
    end: int


class TrainingInputs:
    """Batches for the part of the network that still learns.

    Features are stored for two views an image where the data are flipped (plain and mirrored, in turn by epoch), else
    for one; the padded crop is made on the stored features, by whole cells (METHODS: reconstruction).

    Args:
        data: the images on the device.
        model: what is trained.
        dropper: decides the cut; None where nothing is ever dropped.
        batch_size: images a step.
        seed: of order and augmentation.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(
        self, data: DeviceData, model: nn.Module, dropper: Dropper | None, batch_size: int, seed: int, precision: str
    ) -> None:
        self._data = data
        self._model = model
        self._dropper = dropper
        self._batch_size = batch_size
        self._seed = seed
        self._precision = precision
        self._cache: FeatureCache | None = None
        self._cached_cut = 0
        self._wants_cache = dropper is not None and dropper.settings.features == "stored"

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        return self._data.num_batches(self._batch_size)

    @property
    def stored(self) -> bool:
        """Whether the dropped prefix is read from memory rather than run."""
        return self._cache is not None

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of every step of an epoch; the images' order depends on seed and epoch alone."""
        if self._cache is None:
            for images, labels, _ in self._data.train_batches(self._batch_size, epoch, self._seed):
                yield images, labels
            return
        cells = self._crop_cells(self._cache)
        generator = self._data.generator(self._seed, epoch)
        for indices in self._data.epoch_order(self._batch_size, epoch, self._seed):
            views = (indices + epoch) % self._cache.num_views
            features = self._cache.batch(indices, views)
            yield shifted(features, cells, generator) if cells else features, self._data.labels[indices]

    def forward(self, inputs: Tensor) -> Tensor:
        """What `batches` yields, to logits."""
        if self._dropper is None:
            logits: Tensor = self._model(inputs)
            return logits
        return self._dropper.suffix(inputs) if self.stored else self._dropper.forward(inputs)

    def follow_cut(self) -> CacheWork | None:
        """Builds the cache, or moves it to where the cut is now; falls back to running the prefix if memory is short.

        Returns:
            the forward passes that it took, or None where nothing was to be done.
        """
        if self._dropper is None or not self._wants_cache or self._dropper.cut == self._cached_cut:
            return None
        start, end = self._cached_cut, self._dropper.cut
        sample = self._run(self._data.view(torch.zeros(1, dtype=torch.int64, device=self._data.device)), 0)
        num_views = 2 if self._data.flip else 1
        needed = num_bytes(self._data.num_train, num_views, tuple(sample.shape[1:]), sample.dtype)
        free = available_bytes(self._data.device)
        if needed > _MEMORY_SHARE * free:
            _LOG.warning(
                "stored features need %.2f GB and %.2f GB are free: the dropped prefix runs at every step instead",
                needed / 1e9,
                free / 1e9,
            )
            self._cache, self._wants_cache = None, False
            return None
        if self._cache is None:
            start = 0
            self._cache = self._built(tuple(sample.shape[1:]), num_views, sample.dtype)
        else:
            self._cache = self._cache.advanced(
                lambda features: self._run(features, start), tuple(sample.shape[1:]), self._batch_size
            )
        self._cached_cut = end
        return CacheWork(self._data.num_train * num_views, start, end)

    def _built(self, shape: tuple[int, ...], num_views: int, dtype: torch.dtype) -> FeatureCache:
        cache = FeatureCache(self._data.num_train, num_views, shape, dtype, self._data.device)
        for view in range(num_views):
            for start in range(0, self._data.num_train, self._batch_size):
                end = min(start + self._batch_size, self._data.num_train)
                indices = torch.arange(start, end, device=self._data.device)
                cache.write(view, start, self._run(self._data.view(indices, flipped=view == 1), 0))
        return cache

    def _run(self, inputs: Tensor, start: int) -> Tensor:
        """The dropped prefix from segment ``start`` on, as a training step would run it."""
        assert self._dropper is not None  # only called once there is a cut
        self._dropper.train_mode()
        with autocast(self._precision, self._data.device):
            return self._dropper.prefix(inputs, start)

    def _crop_cells(self, cache: FeatureCache) -> int:
        """The padded crop in cells of the feature map: as many pixels as a cell covers make one."""
        if len(cache.feature_shape) != 3:
            return 0
        return round(self._data.crop * cache.feature_shape[-1] / self._data.input_shape[-1])
