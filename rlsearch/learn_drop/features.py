"""The outputs of a dropped prefix, kept so that it need not run again.

Storing them is our reading of Learn&Drop's "reducing the number of operations performed by the network in the forward
propagation" (arXiv 2604.23403): reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsearch.learn_drop.feature_store import TIERS, FeatureStore, Key, Places

Module = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeatureForm:
    """What is kept.

    Attributes:
        num_images: how many images there are.
        num_views: V, of each.
        shape: of one image's features, (C, H, W) or anything else.
        dtype: of the features.
    """

    num_images: int
    num_views: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The memory that a cache takes."""
        return self.num_images * self.num_views * math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one image's features as they lie in memory: channels last."""
        return (*self.shape[1:], self.shape[0]) if len(self.shape) == 3 else self.shape


class FeatureCache:
    """V fixed views an image of a prefix's output, in device memory, pinned host memory or a file.

    Four-dimensional features are kept with the channels last, so that a gathered batch is in the layout that
    convolutions are fastest in, with no copy.

    Args:
        form: what is kept.
        store: where; of at least ``form.num_bytes``.
        device: that trains.
    """

    def __init__(self, form: FeatureForm, store: FeatureStore, device: torch.device) -> None:
        self.form = form
        self.store = store
        self.device = device
        # One row a view and image, all images of a view in a row of rows.
        content = store.buffer[: form.num_bytes].view(form.dtype)
        self._rows = content.view(form.num_views * form.num_images, *form.stored_shape)

    def write(self, view: int, start: int, features: Tensor) -> None:
        """Keeps ``features`` (B, *shape) of one view, from image ``start`` on."""
        if features.ndim == 4:
            features = features.permute(0, 2, 3, 1)
        first = view * self.form.num_images + start
        # To page-locked memory the copy need not be waited for before the store is committed.
        self._rows[first : first + len(features)].copy_(features, non_blocking=self.store.tier == "pinned")

    def read(self, view: int, start: int, end: int) -> Tensor:
        """A copy of the features of one view, from image ``start`` to before ``end``, on the device."""
        first = view * self.form.num_images
        return self._loaded(self._rows[first + start : first + end].to(self.device, copy=True))

    def batch(self, indices: Tensor, views: Tensor) -> Tensor:
        """The features of ``indices`` (B,), each in its view of ``views`` (B,): (B, *shape), on the device.

        The indices are best where the features lie: on the device for its memory, else on the host.
        """
        rows = (views * self.form.num_images + indices).to(self._rows.device)
        return self._loaded(self._rows.index_select(0, rows).to(self.device))

    def batches(self, positions: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """The batches of ``positions`` (indices and views, as in `batch`), in turn.

        From host memory to a GPU, each is gathered and sent on its way while the device works on the one before.
        """
        if self.device.type == "cuda" and self.store.tier != "device":
            yield from self._prefetched(positions)
            return
        for indices, views in positions:
            yield self.batch(indices, views)

    def moved(
        self, module: Module, form: FeatureForm, batch_size: int, places: Places, key: Key
    ) -> FeatureCache | None:
        """The cache after the cut has moved on: ``module`` leads from the old cut to the new one.

        The images are not needed again. Where there is no room for old and new beside each other, the new features are
        written over the old ones if they are not larger; if they are, the new cache lies a tier further down. The old
        cache is used up, also where this fails.

        Returns:
            the new cache, or None where there is room nowhere; the old one is closed in both cases.
        """
        here = TIERS.index(self.store.tier)
        store = places.opened(form.num_bytes, TIERS[: here + 1])
        in_place = store is None and form.num_bytes <= self.form.num_bytes
        if in_place:
            store = self.store
            store.begin()
        elif store is None:
            store = places.opened(form.num_bytes, TIERS[here + 1 :])
        if store is None:
            self.close()
            return None
        new = FeatureCache(form, store, self.device)
        try:
            for view in range(form.num_views):
                for start in range(0, form.num_images, batch_size):
                    end = min(start + batch_size, form.num_images)
                    # In place this never overtakes what is still to be read: a new row ends where its old one ends,
                    # or before.
                    new.write(view, start, module(self.read(view, start, end)))
            if not in_place:
                self.close()
            store.commit(form.num_bytes, key)
        except BaseException:
            self.close()
            new.close()
            raise
        return new

    def close(self) -> None:
        """Gives memory and file back."""
        self._rows = torch.empty(0)
        self.store.close()

    def _loaded(self, values: Tensor) -> Tensor:
        return values.permute(0, 3, 1, 2) if len(self.form.shape) == 3 else values

    def _prefetched(self, positions: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """As `batches`, one batch ahead, through two page-locked buffers and a stream of its own."""
        stream = torch.cuda.Stream(self.device)
        buffers: list[Tensor | None] = [None, None]
        sent = [torch.cuda.Event(), torch.cuda.Event()]
        waiting: tuple[Tensor, torch.cuda.Event] | None = None
        for turn, (indices, views) in enumerate(positions):
            rows = (views * self.form.num_images + indices).cpu()
            buffer = buffers[turn % 2]
            if buffer is None or len(buffer) < len(rows):
                shape = (len(rows), *self.form.stored_shape)
                buffer = buffers[turn % 2] = torch.empty(shape, dtype=self.form.dtype, pin_memory=True)
            sent[turn % 2].synchronize()  # the batch before the last one has left this buffer
            part = buffer[: len(rows)]
            torch.index_select(self._rows, 0, rows, out=part)
            with torch.cuda.stream(stream):
                arriving = part.to(self.device, non_blocking=True)
                sent[turn % 2].record(stream)
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = arriving, sent[turn % 2]
        if waiting is not None:
            yield self._arrived(*waiting)

    def _arrived(self, values: Tensor, sent: torch.cuda.Event) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(sent)
        # The allocator may not give this memory to the copying stream again while the training stream reads it.
        values.record_stream(current)
        return self._loaded(values)
