"""The batches that a training loop of somebody else's is given, and what it does with each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlsearch.errors import DataError


class LoopBatch:
    """One batch in the hands of the loop.

    Args:
        inputs: as the loop has them.
        targets: as they were when the loop got them.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets
        self._version = inputs._version
        self._calls = 0
        self._other_calls = 0
        self._was_spoilt = False

    @property
    def was_changed(self) -> bool:
        """Whether the inputs were written to since the loop has them."""
        return self.inputs._version != self._version

    def holds(self, inputs: Tensor) -> bool:
        """Whether ``inputs`` are this batch, or a copy of it (in another memory format, say)."""
        own = self.inputs
        if inputs is own:
            return True
        same_kind = (inputs.shape, inputs.dtype, inputs.device) == (own.shape, own.dtype, own.device)
        return same_kind and torch.equal(inputs, own)

    def is_due(self, inputs: Tensor) -> bool:
        """Counts a call of the dropper; whether it is the one to be recorded."""
        if not self.holds(inputs):
            self._other_calls += 1
            return False
        self._calls += 1
        if self._calls == 1:
            self._was_spoilt = self.was_changed
        return self._calls == 1 and not self._was_spoilt

    def fault(self) -> str:
        """Why this batch could not be recorded, if so."""
        if self._was_spoilt:
            return "inputs were changed in place before dropper(inputs); change images in the data set only"
        if self._calls > 1:
            return f"dropper(inputs) was called {self._calls} times with one batch"
        if self._calls == 1:
            return ""
        if self._other_calls:
            return "dropper() was not called with inputs as batches() gave them; change images in the data set only"
        return "dropper(inputs) was not called with every batch"


def pairs(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's inputs and targets, on the device.

    Raises:
        DataError: a batch is no such pair.
    """
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and [isinstance(part, Tensor) for part in batch] == [True, True]):
            raise DataError(
                f"batches() takes a loader whose batches are pairs (inputs, targets) of tensors, got {_said(batch)}; "
                "with any other, loop over the loader itself and choose LearnDrop(features='recompute')"
            )
        inputs, targets = batch
        if not (inputs.ndim and targets.ndim and len(inputs) == len(targets)):
            raise DataError(
                f"batches(): inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} must have one row an image"
            )
        yield _sent(inputs, device), _sent(targets, device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=values.is_pinned())


def _said(batch: object) -> str:
    name = type(batch).__name__
    return (
        f"a {name} of ({', '.join(type(part).__name__ for part in batch)})"
        if isinstance(batch, (tuple, list))
        else f"a {name}"
    )
