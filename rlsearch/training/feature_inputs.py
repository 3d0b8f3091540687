"""What the learning part of a network is fed with: augmented images, or the stored outputs of the dropped prefix."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from rlsearch.errors import ConfigError, Problem
from rlsearch.learn_drop import Dropper, FeatureCache
from rlsearch.learn_drop.feature_store import Key, Places, first_line, is_shortage, places_now
from rlsearch.learn_drop.feature_times import worth_storing
from rlsearch.learn_drop.features import FeatureForm
from rlsearch.policy import LearnDrop
from rlsearch.training.data import ImageData
from rlsearch.training.device_data import DeviceData
from rlsearch.training.distributed import Group, largest_share
from rlsearch.training.feature_building import FeatureBuilder, cropped
from rlsearch.training.feature_views import Views
from rlsearch.training.image_batches import ImageBatches

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


def check_features(learn_drop: LearnDrop | None, data: ImageData | ImageBatches) -> None:
    """Features are stored of a few fixed views of images in memory; a streamed set's prefix is run at every step.

    Raises:
        ConfigError: features are to be stored of a streamed set.
    """
    if learn_drop is not None and learn_drop.features == "stored" and data.is_streamed:
        raise ConfigError([Problem("learn_drop.features", not_of_a_stream(data.name))], "trial")


def not_of_a_stream(name: str) -> str:
    """Why ``features: stored`` does not go with the data of this name, and what does."""
    return f"'stored' needs images in memory, but {name!r} is streamed; set recompute or auto, or data.stream to false"


@dataclass(frozen=True)
class CacheWork:
    """Forward passes that were made to fill a cache: ``num_images`` through the segments from ``start`` to ``end``."""

    num_images: int
    start: int
    end: int


@dataclass(frozen=True)
class _Plan:
    """A cache that is to be made: of what, where, from which cut on; or one that was ``found``."""

    form: FeatureForm
    places: Places
    key: Key
    start: int
    found: FeatureCache | None = None


class TrainingInputs:
    """Batches for the part of the network that still learns.

    `Views` says which views are stored. Where they do not fit, or memory or disk run out while they are made, a warning
    is logged and training goes on from the images, as with ``recompute``; the next cut tries again.

    Args:
        data: the images; features are stored only of those that are in memory.
        model: what is trained.
        dropper: decides the cut; None where nothing is ever dropped.
        batch_size: images a step.
        seed: of order and augmentation.
        precision: ``fp32`` or ``bf16``.
        scratch: a folder for features that fit into no memory; None: they are not written to files.
        run: names this training among those that use ``scratch``; the same after a resume.
        group: the processes that train together, where there are several. Each stores all features, for any image may
            fall to any of them; they store, or do not, all alike.
    """

    def __init__(
        self,
        data: ImageBatches,
        model: nn.Module,
        dropper: Dropper | None,
        batch_size: int,
        seed: int,
        precision: str,
        *,
        scratch: Path | None = None,
        run: str = "",
        group: Group | None = None,
    ) -> None:
        self._data = data
        self._model = model
        self._dropper = dropper
        self._batch_size = batch_size
        self._seed = seed
        self._precision = precision
        self._scratch = scratch
        self._group = group
        own_run = run if group is None else f"{run} {group.rank}"
        self._run_name = hashlib.sha256(own_run.encode()).hexdigest()[:16]
        # What stored features are made from.
        self._images = data if isinstance(data, DeviceData) else None
        self._features = "recompute" if dropper is None or self._images is None else dropper.settings.features
        self._cache: FeatureCache | None = None
        self._views = Views(1, 0, cropped=False)
        self._cut = 0  # the cut that the cache, or the decision against one, is for
        self._was_stored_at: int | None = None  # as read from a checkpoint, until the cache is there again

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        return self._data.num_batches(self._batch_size)

    @property
    def stored(self) -> bool:
        """Whether the dropped prefix is read from where it is stored rather than run."""
        return self._cache is not None

    @property
    def cache(self) -> FeatureCache | None:
        """The stored features, where they are stored."""
        return self._cache

    @property
    def stored_bytes(self) -> int:
        """Bytes of the device's memory that stored features take."""
        return self._cache.store.num_bytes if self._cache and self._cache.store.tier == "device" else 0

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of every step of an epoch from ``start_step`` on; they depend on seed and epoch alone."""
        cache = self._cache
        if cache is None:
            for images, labels, _ in self._data.train_batches(self._batch_size, epoch, self._seed, start_step):
                yield images, labels
            return
        # Reading takes a hundredth of a step, and how features are shifted is drawn batch by batch.
        yield from islice(self._stored_batches(cache, epoch), start_step, None)

    def _stored_batches(self, cache: FeatureCache, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        data = self._in_memory
        generator = data.generator(self._seed, epoch)
        # Rows are looked up where the features lie.
        order = data.epoch_order if cache.store.tier == "device" else data.host_order
        arguments = self._batch_size, epoch, self._seed
        parts = (indices[data.own_part(len(indices))] for indices in order(*arguments))
        positions = ((indices, (indices + epoch) % self._views.number) for indices in parts)
        for indices, features in zip(data.epoch_order(*arguments), cache.batches(positions), strict=True):
            own = data.own_part(len(indices))
            yield cropped(features, self._views, generator, len(indices), own), data.labels[indices[own]]

    def forward(self, inputs: Tensor) -> Tensor:
        """What `batches` yields, to logits."""
        if self._dropper is None:
            logits: Tensor = self._model(inputs)
            return logits
        return self._dropper.suffix(inputs) if self.stored else self._dropper(inputs)

    def follow_cut(self, remaining_epochs: int | None = None) -> CacheWork | None:
        """Builds the cache, or moves it to where the cut is now, if that is wanted.

        Args:
            remaining_epochs: of the whole training, for ``auto``; None: unknown, and ``auto`` stores what fits.

        Returns:
            the forward passes that it took (not those few that ``auto`` measures), or None where none were made. Those
            of a killed process, whose file is taken up, are told again: its training counts what a straight one does.
        """
        dropper = self._dropper
        if dropper is None or self._features == "recompute" or dropper.cut == self._cut:
            return None
        start = self._cut if self._cache is not None else 0
        self._cut = dropper.cut
        own_batch = self._batch_size if self._group is None else largest_share(self._batch_size, self._group.size)
        builder = FeatureBuilder(self._in_memory, self._model, dropper, own_batch, self._seed, self._precision)
        was_stored = self._was_stored_at == self._cut
        self._was_stored_at = None
        plan = self._agreed(lambda: self._plan(builder, start, None if was_stored else remaining_epochs))
        return None if plan is None else self._agreed(lambda: self._carried_out(plan, builder))

    def state_dict(self) -> dict[str, Any]:
        """The cut, and whether the features at it are stored: a resume must not decide again from times of its own."""
        waiting = self._was_stored_at
        return {"cut": self._cut if waiting is None else waiting, "stored": self.stored or waiting is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the decision back; the next `follow_cut` fills the cache again."""
        self._cut = 0 if state["stored"] else state["cut"]
        self._was_stored_at = state["cut"] if state["stored"] else None

    def close(self) -> None:
        """Gives the memory and the file of stored features back; `batches` gives images from then on."""
        if self._cache is not None:
            self._cache.close()
        self._cache = None

    @property
    def _in_memory(self) -> DeviceData:
        assert self._images is not None  # nothing is stored of a streamed set
        return self._images

    def _agreed(self, attempt: Callable[[], Result | None]) -> Result | None:
        """What an attempt gives; nothing, and nothing is stored any more, where it fails or gives nothing in any of the
        processes."""
        result = None
        try:
            result = attempt()
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            self._recompute(f"stored features could not be made ({first_line(error)})")
        if self._group is not None and not self._group.all_true(result is not None):
            result = None
        if result is None:
            self.close()
        return result

    def _plan(self, builder: FeatureBuilder, start: int, remaining_epochs: int | None) -> _Plan | None:
        """The cache that is to be at the new cut; None where there is to be none."""
        form, views = builder.form()
        if (views.number, views.cropped) != (self._views.number, self._views.cropped):
            # Other views than those that were stored (the cut left the feature maps) are made from the images.
            self.close()
            start = 0
        self._views = views
        sharers = 1 if self._group is None else self._group.local_size
        places = places_now(self._data.device, self._scratch, self._run_name, sharers)
        key = builder.key(form, views, places)
        found = self._found(form, places, key) if self._cache is None else None
        if found is not None:
            return _Plan(form, places, key, 0, found)
        tier = self._tier(form, places)
        if tier is None:
            self._recompute(places.too_small(form.num_bytes))
            return None
        # Of several processes the first one takes the times, and decides for all.
        if self._features == "auto" and remaining_epochs is not None and (self._group is None or self._group.rank == 0):
            times = builder.times(self._cache, form, views, start, places, tier)
            if not worth_storing(times, remaining_epochs):
                return None
        return _Plan(form, places, key, start)

    def _carried_out(self, plan: _Plan, builder: FeatureBuilder) -> CacheWork | None:
        """Makes the cache; None where it found no room after all."""
        old, self._cache = self._cache, plan.found
        if plan.found is None and old is None:
            self._cache = builder.built(plan.form, self._views, plan.places, plan.key)
        elif old is not None:
            self._cache = builder.moved(old, plan.form, plan.start, plan.places, plan.key)
        if self._cache is None:
            self._recompute(f"stored features found no room ({'; '.join(plan.places.refused)})")
            return None
        processes = 1 if self._group is None else self._group.size  # each runs the prefix over all images
        return CacheWork(processes * plan.form.num_images * plan.form.num_views, plan.start, self._cut)

    def _tier(self, form: FeatureForm, places: Places) -> str | None:
        """Where the cache would lie."""
        tier = places.tier_of(form.num_bytes)
        if tier is None and self._cache is not None and form.num_bytes <= self._cache.form.num_bytes:
            return self._cache.store.tier
        return tier

    def _found(self, form: FeatureForm, places: Places, key: Key) -> FeatureCache | None:
        """The file that this run's interrupted process left, if it is there; memory is better, where it fits."""
        if places.tier_of(form.num_bytes) not in (None, "file"):
            return None
        store = places.found(form.num_bytes, key)
        return None if store is None else FeatureCache(form, store, self._data.device)

    def _recompute(self, why: str) -> None:
        self.close()
        _LOG.warning("%s: the dropped prefix runs at every step instead", why)
