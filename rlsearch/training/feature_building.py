"""Making a cache of features: running the dropped prefix over the views of the images, and timing that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.learn_drop import Dropper, FeatureCache
from rlsearch.learn_drop.feature_store import Key, Places
from rlsearch.learn_drop.feature_times import cache_times, probe_cache
from rlsearch.learn_drop.features import FeatureForm
from rlsearch.learn_drop.payoff import CacheTimes
from rlsearch.training.augmentation import shifted
from rlsearch.training.device_data import DeviceData
from rlsearch.training.feature_key import feature_key
from rlsearch.training.feature_views import Views
from rlsearch.training.loop import autocast


@dataclass(frozen=True)
class FeatureBuilder:
    """What features are made from, at whatever cut the dropper has.

    Attributes:
        data: the images on the device.
        model: what is trained.
        dropper: has the prefix.
        batch_size: images a pass; as many as a step of this process has, so that one pass fits where a step did.
        seed: of the fixed crops.
        precision: ``fp32`` or ``bf16``.
    """

    data: DeviceData
    model: nn.Module
    dropper: Dropper
    batch_size: int
    seed: int
    precision: str

    def run(self, inputs: Tensor, start: int = 0) -> Tensor:
        """The dropped prefix from segment ``start`` on, as a training step would run it."""
        self.dropper.train_mode()
        with autocast(self.precision, self.data.device):
            return self.dropper.prefix(inputs, start)

    def form(self) -> tuple[FeatureForm, Views]:
        """What is to be kept at this cut, as one image through the prefix shows it."""
        sample = self.run(self.data.view(torch.zeros(1, dtype=torch.int64, device=self.data.device)))
        views = Views.of(self.data, tuple(sample.shape[1:]))
        return views.form(self.data, sample), views

    def built(self, form: FeatureForm, views: Views, places: Places, key: Key) -> FeatureCache | None:
        """A new cache, from the images; None where there is room nowhere.

        Raises:
            MemoryError, OSError, RuntimeError: memory or disk ran out on the way, or the model fails; nothing is left.
        """
        store = places.opened(form.num_bytes)
        if store is None:
            return None
        cache = FeatureCache(form, store, self.data.device)
        try:
            views.fill(cache, self.data, self.run, self.seed, self.batch_size)
            store.commit(form.num_bytes, key)
        except BaseException:
            cache.close()
            raise
        return cache

    def moved(self, old: FeatureCache, form: FeatureForm, start: int, places: Places, key: Key) -> FeatureCache | None:
        """As `built`, from the features of the cut ``start``; these are used up."""
        return old.moved(lambda features: self.run(features, start), form, self.batch_size, places, key)

    def times(
        self, old: FeatureCache | None, form: FeatureForm, views: Views, start: int, places: Places, tier: str
    ) -> CacheTimes:
        """The times of one batch, with a small cache where the whole one would lie, scaled to all images.

        Raises:
            MemoryError: there is no room even for that.
        """
        count = min(self.batch_size, form.num_images)
        indices = torch.arange(count, device=self.data.device)
        generator = self.data.generator(self.seed, 0)
        with probe_cache(form, count, places, tier) as probe:
            return cache_times(
                probe,
                form.num_images,
                run=lambda: self.run(self.data.view(indices)),
                advance=None if old is None else lambda: self.run(old.read(0, 0, count), start),
                read=lambda: cropped(probe.batch(indices, torch.zeros_like(indices)), views, generator),
            )

    def key(self, form: FeatureForm, views: Views, places: Places) -> dict[str, Any]:
        """What a file must be of; nothing where there can be no file, since the weights are hashed for it."""
        if "file" not in places.room:
            return {}
        self.dropper.train_mode()
        return feature_key(form, views, self.data, self.model, run=places.run, cut=self.dropper.cut, seed=self.seed)


def cropped(
    features: Tensor, views: Views, generator: torch.Generator, whole: int | None = None, own: slice = slice(None)
) -> Tensor:
    """A batch of stored features (B, *shape), or the ``own`` part of a ``whole`` one, shifted at random where that
    stands in for a crop of the images."""
    return shifted(features, views.cells, generator, whole, own) if views.cells else features
