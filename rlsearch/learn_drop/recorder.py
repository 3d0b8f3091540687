"""Stored features for a training loop that is not ours: recorded while it trains, then read instead of the images.

We know neither the images nor how they are augmented, only the batches that go by. So after a cut the next passes over
the loader train as ever, and what the dropped prefix gives is kept beside the targets; each pass is one more random
view of every image. Later epochs read these views in turn.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsearch.config import typed
from rlsearch.errors import ConfigError, DataError, Problem
from rlsearch.learn_drop.feature_store import TIERS, Places, first_line, is_shortage, places_now
from rlsearch.learn_drop.feature_times import cache_times, probe_cache, worth_storing
from rlsearch.learn_drop.features import FeatureForm, Module
from rlsearch.learn_drop.loop_batch import LoopBatch, pairs
from rlsearch.learn_drop.payoff import CacheTimes
from rlsearch.learn_drop.recorded_view import RecordedView, UnfitError

_LOG = logging.getLogger(__name__)

# Inputs, and how many segments they have behind them, to the features at the cut.
Prefix = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class PassPlan:
    """What a pass over the loader starts from.

    Attributes:
        views: how many views are to be recorded in all.
        folder: for files; None: there are to be none.
        device: that trains.
        epoch: epochs done.
        epochs_left: this one included.
        cut: how many segments are dropped.
        is_fixed: whether these give the same for the same images for ever.
    """

    views: int
    folder: Path | None
    device: torch.device
    epoch: int
    epochs_left: int
    cut: int
    is_fixed: bool


class Recorder:
    """Gives a loop its batches, and records or reads features where that is wanted; see `Dropper.batches`.

    Where memory or disk run out, a warning is logged and the prefix runs at every step until the cut moves again. Where
    the loop is not one whose features can be recorded, it runs so for good. Training is never disturbed.

    Args:
        features: ``recompute``, ``stored`` or ``auto``, as in `LearnDrop`.
    """

    def __init__(self, features: str) -> None:
        self._features = features
        self._cut = 0  # the cut that the views, or the decision against them, are for
        self._wanted = False  # whether features are to be stored at this cut
        self._views: list[RecordedView] = []
        self._recording: _Recording | None = None  # the pass that is being recorded
        self._reading: LoopBatch | None = None  # the stored batch that the loop has now
        self._image_shape: tuple[int, ...] = ()
        self._prefix_seconds = 0.0  # to run the prefix over all images once, where it was measured
        self._last_pass: tuple[int, int] | None = None  # the epoch and the loader of the last whole pass

    @property
    def tier(self) -> str | None:
        """Where recorded features lie, one of `TIERS`; None where there are none."""
        return self._views[0].tier if self._views else None

    def batches(self, loader: Iterable[Any], plan: PassPlan, prefix: Prefix) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of a pass, on the device; what is wrong with the arguments is said at once.

        Raises:
            ConfigError, DataError: see `Dropper.batches`.
        """
        _check_plan(plan)
        num_batches = self._num_batches(loader)
        self._check_same_loader(loader, plan.epoch)
        return self._batches(loader, num_batches, plan, prefix)

    def features(self, inputs: Tensor, cut: int, prefix: Prefix) -> Tensor:
        """What the learning part takes: read off ``inputs`` if they are stored features, else run, and recorded where
        that is due.

        Raises:
            DataError: stored features were changed on their way.
        """
        if self._views and self._is_stored(inputs):
            return prefix(inputs, self._cut)
        this = self._recording
        batch = this.batch if this else None
        is_due = batch is not None and batch.is_due(inputs)
        features = prefix(inputs, 0)
        if this and batch and is_due:
            self._record(this, batch, features, cut, prefix)
        return features

    def reset(self) -> None:
        """Forgets what is recorded; recording starts anew."""
        self._release()
        self._cut, self._wanted, self._last_pass = 0, False, None

    def close(self) -> None:
        """Gives memory and files back, for good: from then on the prefix runs."""
        self._release()
        self._features = "recompute"
        self._wanted = False

    def _batches(
        self, loader: Iterable[Any], num_batches: int | None, plan: PassPlan, prefix: Prefix
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self._interrupt()
        self._follow(plan, prefix)
        missing = max(0, plan.views - len(self._views))
        if missing and num_batches is not None and self._wanted and plan.epochs_left > missing:
            yield from self._recorded(loader, _Recording(plan, num_batches, missing))
        elif self._views:
            yield from self._read()
        else:
            yield from pairs(loader, plan.device)
        self._last_pass = plan.epoch, id(loader)

    def _recorded(self, loader: Iterable[Any], this: _Recording) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass over the loader, whose features `features` records."""
        self._recording = this
        try:
            for inputs, targets in pairs(loader, this.plan.device):
                # The loop may write to its targets.
                this.batch = batch = LoopBatch(inputs, targets.clone())
                yield inputs, targets
                if self._recording is this and (fault := batch.fault()):
                    self._give_up(fault)
            if self._recording is this:
                self._finish(this)
        finally:
            if self._recording is this:
                self._interrupt()

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass over the view whose turn it is."""
        view = self._views.pop(0)
        self._views.append(view)
        batch = None
        try:
            for features, targets in view.batches():
                self._reading = batch = LoopBatch(features, targets)
                yield features, targets
                if view not in self._views:  # it was closed
                    return
        finally:
            if self._reading is batch:
                self._reading = None

    def _record(self, this: _Recording, batch: LoopBatch, features: Tensor, cut: int, prefix: Prefix) -> None:
        if cut != self._cut:
            self._interrupt("the cut moved within it")
            return
        try:
            if this.view is None:
                this.view = self._opened(this, batch, features, prefix)
            if this.view is None:
                self._release()
            else:
                this.view.write(features, batch.targets)
        except UnfitError as unfit:
            self._give_up(str(unfit))
        except (MemoryError, OSError, RuntimeError) as error:
            self._recompute(error)

    def _opened(self, this: _Recording, batch: LoopBatch, features: Tensor, prefix: Prefix) -> RecordedView | None:
        """A view to record into; None where that does not pay off.

        Raises:
            MemoryError: there is no room for all views that are missing.
        """
        inputs = batch.inputs
        capacity = self._views[0].num_images if self._views else len(inputs) * this.num_batches
        kept = features, batch.targets
        forms = [FeatureForm(capacity, 1, tuple(values.shape[1:]), values.dtype) for values in kept]
        places = places_now(this.plan.device, this.plan.folder, secrets.token_hex(8))
        needed = this.missing * sum(form.num_bytes for form in forms)
        tier = places.tier_of(needed)
        if tier is None:
            raise MemoryError(places.too_small(needed))
        self._image_shape = tuple(inputs.shape[1:])
        if self._features == "auto" and not self._views:
            times = _times(forms[0], len(inputs), places, tier, run=lambda: prefix(inputs, 0), advance=lambda: features)
            self._prefix_seconds = times.prefix_seconds
            times = replace(times, build_seconds=times.build_seconds * this.missing)
            self._wanted = worth_storing(times, this.plan.epochs_left - this.missing)
            if not self._wanted:
                return None
        return RecordedView.opened(forms, _from(tier, places), len(inputs))

    def _finish(self, this: _Recording) -> None:
        """Keeps the view of a pass that went through to its end."""
        view, self._recording = this.view, None
        if view is None:  # the loader was empty
            return
        if self._views and view.num_images != self._views[0].num_images:
            view.close()
            before = self._views[0].num_images
            self._give_up(f"one pass over the loader gave {view.num_images} images, and one before it {before}")
            return
        try:
            view.finish()
        except OSError as error:
            view.close()
            self._recompute(error)
            return
        self._views.append(view)
        if this.missing == 1:
            _LOG.info("features: %d views of %d images are stored", len(self._views), view.num_images)

    def _follow(self, plan: PassPlan, prefix: Prefix) -> None:
        """Moves what is recorded to where the cut is now."""
        if plan.cut == self._cut:
            return
        old, self._cut = self._cut, plan.cut
        if self._features != "recompute" and not plan.is_fixed:
            self._give_up("the dropped layers share parameters or statistics with layers that learn on")
        self._wanted = self._features != "recompute"
        if not self._views:
            if self._wanted and plan.epochs_left <= plan.views:
                _LOG.info("features: %d epochs are left, too few to record %d views", plan.epochs_left, plan.views)
            return
        try:
            self._move(plan, lambda features: prefix(features, old))
        except (MemoryError, OSError, RuntimeError) as error:
            self._recompute(error)

    def _move(self, plan: PassPlan, module: Module) -> None:
        """As `_follow`; ``module`` leads from the old cut to the new one.

        Raises:
            MemoryError, OSError, RuntimeError: memory or disk ran out, or the module fails.
        """
        if self._features == "auto" and not self._moving_pays(plan, module):
            self._release()
            self._wanted = False
            return
        for view in self._views:
            view.move(module, places_now(plan.device, plan.folder, secrets.token_hex(8)))

    def _moving_pays(self, plan: PassPlan, module: Module) -> bool:
        view = self._views[0]
        count = min(view.batch_size, view.num_images)
        form = view.moved_form(module)
        places = places_now(plan.device, plan.folder, secrets.token_hex(8))
        tier = places.tier_of(form.num_bytes) or view.tier

        def advance() -> Tensor:
            with view.autocast():
                return module(view.first(count))

        times = _times(form, count, places, tier, run=advance, advance=advance)
        # There are no images at hand, but what the prefix took up to the old cut is known.
        self._prefix_seconds += times.prefix_seconds
        times = CacheTimes(self._prefix_seconds, times.build_seconds * len(self._views), times.read_seconds)
        missing = max(0, plan.views - len(self._views))
        return worth_storing(times, max(0, plan.epochs_left - missing))

    def _is_stored(self, inputs: Tensor) -> bool:
        """Whether these are the stored features that the loop was given, rather than images of its own."""
        if self._reading is not None and self._reading.holds(inputs):
            if self._reading.was_changed:
                raise DataError(
                    "dropper(inputs): these stored features were changed in place since batches() gave them, by the "
                    "loop or by the model in an earlier call; call the dropper once a batch, and change images in the "
                    "data set only"
                )
            return True
        shape = tuple(inputs.shape[1:])
        if shape == self._views[0].form.shape != self._image_shape:
            raise DataError(
                "dropper(inputs): inputs are stored features, but not the batch that batches() gave last; pass them on "
                "as they are, within their pass, and change images in the data set only"
            )
        return False

    def _num_batches(self, loader: Iterable[Any]) -> int | None:
        """The loader's length, where it is needed and known."""
        if self._features == "recompute":
            return None
        try:
            return len(loader)  # type: ignore[arg-type]  # that is the question
        except (TypeError, NotImplementedError):
            pass
        what = f"this {type(loader).__name__} has no length (as with an IterableDataset)"
        if self._features == "stored":
            raise DataError(
                f"batches(): {what}, so that the room for stored features is not known; give it, or its data set, a "
                "__len__, or choose LearnDrop(features='recompute')"
            )
        _LOG.info("features: %s: the dropped prefix runs at every step", what)
        self.close()
        return None

    def _check_same_loader(self, loader: Iterable[Any], epoch: int) -> None:
        """Another loader in the same epoch would be given, or would leave, features of the wrong images."""
        if self._features == "recompute" or self._last_pass is None:
            return
        last_epoch, last_loader = self._last_pass
        if last_epoch == epoch and last_loader != id(loader):
            raise DataError(
                "batches(): another loader had its pass in this epoch; give it the training loader alone, evaluate "
                "with the model itself, and call end_epoch() after each epoch"
            )

    def _interrupt(self, why: str = "it was left early") -> None:
        """Throws away what the pass in progress, if any, has recorded; the next pass tries again."""
        this, self._recording = self._recording, None
        if this is None:
            return
        if this.view is not None:
            this.view.close()
        _LOG.warning("features: a pass was not recorded to its end (%s); the next pass is recorded instead", why)

    def _give_up(self, why: str) -> None:
        self.close()
        _LOG.warning("features: they cannot be recorded: %s; the dropped prefix runs at every step instead", why)

    def _recompute(self, error: BaseException) -> None:
        """Goes on without stored features, as far as the error is one of memory or disk; the next cut tries again."""
        self._release()
        self._wanted = False
        if not is_shortage(error):
            raise error
        _LOG.warning("features: %s: the dropped prefix runs at every step instead", first_line(error))

    def _release(self) -> None:
        this, self._recording, self._reading = self._recording, None, None
        views, self._views = self._views, []
        for view in [*views, *([this.view] if this and this.view else [])]:
            view.close()


@dataclass
class _Recording:
    """A pass that is being recorded: what it started from, the batch that the loop has now, and what is recorded."""

    plan: PassPlan
    num_batches: int
    missing: int
    batch: LoopBatch | None = None
    view: RecordedView | None = None


def _check_plan(plan: PassPlan) -> None:
    problems: list[Problem] = []
    views = typed(plan.views, int, "views", problems)
    if views is not None and views < 1:
        problems.append(Problem("views", f"must be at least 1, got {plan.views}"))
    if plan.folder is not None and not plan.folder.is_dir():
        problems.append(Problem("scratch", f"there is no folder {plan.folder}"))
    if problems:
        raise ConfigError(problems, "batches")


def _from(tier: str, places: Places) -> Places:
    """These places from a tier downwards."""
    allowed = TIERS[TIERS.index(tier) :]
    return replace(places, room={name: room for name, room in places.room.items() if name in allowed})


def _times(
    form: FeatureForm,
    count: int,
    places: Places,
    tier: str,
    *,
    run: Callable[[], Tensor],
    advance: Callable[[], Tensor],
) -> CacheTimes:
    """The times of one view, from a batch of ``count`` images."""
    with probe_cache(form, count, places, tier) as probe:
        rows = torch.arange(count, device=probe.store.buffer.device)
        return cache_times(
            probe,
            form.num_images,
            run=run,
            advance=advance,
            read=lambda: probe.batch(rows, torch.zeros_like(rows)),
        )
