"""One pass over a loader, recorded: the features and the target of every image, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rlsearch.learn_drop.feature_store import Places
from rlsearch.learn_drop.features import FeatureCache, FeatureForm, Module

Autocast = Callable[[], AbstractContextManager[None]]


class UnfitError(Exception):
    """What is to be recorded cannot be read again as it came; the message says why."""


class RecordedView:
    """One random view of each image. Which image is which is not known: a pass has an order of its own, so that rows of
    different views do not belong together, and an epoch reads one view whole.

    Args:
        features: one view, still empty.
        targets: the same for the targets.
        batch_size: images a batch.
        autocast: the mixed precision in which the features are made.

    Attributes:
        num_images: how many are recorded.
    """

    def __init__(self, features: FeatureCache, targets: FeatureCache, batch_size: int, autocast: Autocast) -> None:
        self.num_images = 0
        self.batch_size = batch_size
        self.autocast = autocast
        self._features = features
        self._targets = targets

    @classmethod
    def opened(cls, forms: Sequence[FeatureForm], places: Places, batch_size: int) -> RecordedView:
        """An empty view, for features and targets of these two ``forms``, recorded under the present autocast.

        Raises:
            MemoryError: there is room nowhere; nothing is left.
        """
        caches: list[FeatureCache] = []
        for form, name in zip(forms, ("features", "targets"), strict=True):
            # Files have names of their own, though they are of one run.
            where = replace(places, run=f"{places.run}-{name}")
            store = where.opened(form.num_bytes)
            if store is None:
                for cache in caches:
                    cache.close()
                raise MemoryError(f"stored features found no room ({'; '.join(places.refused)})")
            caches.append(FeatureCache(form, store, places.device))
        features, targets = caches
        return cls(features, targets, batch_size, current_autocast(places.device))

    @property
    def form(self) -> FeatureForm:
        """Of the features."""
        return self._features.form

    @property
    def tier(self) -> str:
        """Where the features lie."""
        return self._features.store.tier

    def write(self, features: Tensor, targets: Tensor) -> None:
        """Adds a batch: features (B, *shape) and targets (B, *target shape).

        Raises:
            UnfitError: they are of another shape or type than those before, or there are more than there were to be.
        """
        for cache, values, name in ((self._features, features, "outputs"), (self._targets, targets, "targets")):
            form, shape = cache.form, tuple(values.shape[1:])
            if (shape, values.dtype) != (form.shape, form.dtype):
                raise UnfitError(
                    f"the {name} of one batch are of shape {shape} ({values.dtype}), and those of another of "
                    f"{form.shape} ({form.dtype})"
                )
        if self.num_images + len(features) > self.form.num_images:
            raise UnfitError(f"the loader gave more than the {self.form.num_images} images that its length stands for")
        self._features.write(0, self.num_images, features)
        self._targets.write(0, self.num_images, targets)
        self.num_images += len(features)

    def finish(self) -> None:
        """The pass is over: this is all there is.

        Raises:
            OSError: a file cannot be completed.
        """
        self._features = _trimmed(self._features, self.num_images)
        self._targets = _trimmed(self._targets, self.num_images)

    def first(self, count: int) -> Tensor:
        """A copy of the first features, (count, *shape), on the device."""
        return self._features.read(0, 0, count)

    def moved_form(self, module: Module) -> FeatureForm:
        """What `move` will leave, as one image shows it."""
        with self.autocast():
            sample = module(self.first(1))
        return replace(self.form, shape=tuple(sample.shape[1:]), dtype=sample.dtype)

    def move(self, module: Module, places: Places) -> None:
        """Replaces the features by what ``module`` makes of them, in the precision in which they were recorded.

        Raises:
            MemoryError: there is room nowhere.
            MemoryError, OSError, RuntimeError: memory or disk ran out on the way, or the module fails; whatever it was,
                the view is used up.
        """
        form = self.moved_form(module)
        where = replace(places, run=f"{places.run}-features")
        with self.autocast():
            cache = self._features.moved(module, form, self.batch_size, where, {})
        if cache is None:
            raise MemoryError(f"stored features found no room ({'; '.join(places.refused)})")
        self._features = cache

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and targets of all images, each once, in a new order that torch's default generator draws.

        A last batch of one image is left out: batch norm cannot train on it.
        """
        order = torch.randperm(self.num_images, device="cpu")
        yield from zip(
            self._features.batches(_positions(self._features, order, self.batch_size)),
            self._targets.batches(_positions(self._targets, order, self.batch_size)),
            strict=True,
        )

    def close(self) -> None:
        """Gives memory and files back."""
        self._features.close()
        self._targets.close()


def current_autocast(device: torch.device) -> Autocast:
    """Makes the mixed precision that is in force now, or its absence, whenever it is called."""
    return partial(
        torch.autocast,
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
    )


def _trimmed(cache: FeatureCache, num_images: int) -> FeatureCache:
    form = replace(cache.form, num_images=num_images)
    cache.store.commit(form.num_bytes, {})
    return FeatureCache(form, cache.store, cache.device)


def _positions(cache: FeatureCache, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and views of every batch, where the cache looks its rows up."""
    for indices in order.to(cache.store.buffer.device).split(batch_size):
        if len(indices) > 1 or batch_size == 1:
            yield indices, torch.zeros_like(indices)
