"""The most memory that training steps take: as predicted, and on CUDA as measured while they run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

from rlsearch.training.faster_step import PLAIN_STEPS

# Steps before the peak counts: the first ones let libraries choose their kernels.
_WARMUP_STEPS = 3

Batch = TypeVar("Batch")


class PeakMemory:
    """Bytes at the peak of steps of one kind.

    Args:
        device: where they run.
        apart: bytes that lie there all the time, and are no part of a step.

    Attributes:
        num_bytes: the peak, without what is apart.
    """

    def __init__(self, device: torch.device, apart: int) -> None:
        self.num_bytes = 0
        self._device = device
        self._apart = apart

    def watched(self, batches: Iterator[Batch], predicted: int) -> Iterator[Batch]:
        """The batches of the first epoch of steps of a kind; what the first plain steps take at most is noted.

        The peak counts anew once some steps have warmed the allocator up, and at the first step, so that an epoch of
        few does not report what came before it. No step waits for this.

        Args:
            batches: for the steps.
            predicted: bytes of a step; what is reported where nothing measures them.
        """
        self.num_bytes = predicted
        if self._device.type != "cuda":
            yield from batches
            return
        step = -1
        for step, batch in enumerate(batches):
            if step in (0, _WARMUP_STEPS):
                torch.cuda.reset_peak_memory_stats(self._device)
            if step == PLAIN_STEPS:
                self._note()
            yield batch
        if step < PLAIN_STEPS:
            self._note()

    def _note(self) -> None:
        self.num_bytes = torch.cuda.max_memory_allocated(self._device) - self._apart
