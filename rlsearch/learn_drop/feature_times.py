"""How long a cache of features takes to fill and to read, measured on a few batches, on the device that trains."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rlsearch.learn_drop.feature_store import Places
from rlsearch.learn_drop.features import FeatureCache, FeatureForm
from rlsearch.learn_drop.payoff import CacheTimes, pays_off

_LOG = logging.getLogger(__name__)

_TIMED_BATCHES = 3


@contextmanager
def probe_cache(form: FeatureForm, count: int, places: Places, tier: str) -> Iterator[FeatureCache]:
    """A cache of ``count`` images, of the form and in the place of a whole one; nothing of it is left afterwards.

    Raises:
        MemoryError: there is no room even for that.
    """
    small = replace(form, num_images=count)
    store = places.opened(small.num_bytes, (tier,))
    if store is None:
        raise MemoryError(f"no room for one batch: {'; '.join(places.refused)}")
    probe = FeatureCache(small, store, places.device)
    try:
        yield probe
    finally:
        probe.close()


def cache_times(
    probe: FeatureCache,
    num_images: int,
    *,
    run: Callable[[], Tensor],
    advance: Callable[[], Tensor] | None,
    read: Callable[[], Tensor],
) -> CacheTimes:
    """The times of one batch, scaled to ``num_images``.

    Args:
        probe: a cache of one batch of images, of the form and in the place of the whole one. A file as small as this
            stays in the system's memory, so that slow disks are judged too kindly.
        num_images: of the whole cache.
        run: the dropped prefix over the batch, from the images on.
        advance: what has to run before a batch can be written: the same from the features of the old cut on; None: as
            ``run``, from the images.
        read: the batch, as a step reads it.
    """
    device, batches = probe.device, num_images / probe.form.num_images
    features = run()
    prefix = seconds(run, device)
    fill = prefix if advance is None else seconds(advance, device)
    fill += seconds(lambda: probe.write(0, 0, features), device)
    return CacheTimes(prefix * batches, fill * batches * probe.form.num_views, seconds(read, device) * batches)


def worth_storing(times: CacheTimes, remaining_epochs: int) -> bool:
    """As `pays_off`, and says so in the log."""
    pays = pays_off(times, remaining_epochs)
    verb = "stores" if pays else "recomputes"
    _LOG.info("features: auto %s them, %d epochs left: %s", verb, remaining_epochs, times)
    return pays


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of ``work``, after one call that warms up; the device is waited for."""
    times = []
    for _ in range(1 + _TIMED_BATCHES):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
