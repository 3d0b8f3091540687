"""Whether a training step fits into the memory of its device, known before it is made."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlsearch.errors import OutOfMemoryError
from rlsearch.learn_drop.feature_store import available_bytes
from rlsearch.policy import Policy
from rlsearch.training.cost import CostModel

# A batch norm in training mode refuses one value a channel.
_LEAST_BATCH = 2
# torch gives each of its cuBLAS handles a work space, 32 MiB on GPUs of compute capability 9.0 and 8.125 MiB on others
# (aten/src/ATen/cuda/CublasHandlePool.cpp). A training has two: the thread that runs the forward pass has one, the
# thread that runs the backward pass another.
_HANDLES = 2
_WORKSPACE, _WORKSPACE_HOPPER = 8 * 2**20 + 2**17, 32 * 2**20


def library_bytes(device: torch.device) -> int:
    """What torch's libraries take of a device's memory beside the tensors of a training step; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return _HANDLES * (_WORKSPACE_HOPPER if is_hopper else _WORKSPACE)


def largest_batch(needed: Callable[[int], int], room: int, below: int) -> int:
    """The greatest number of images a step whose memory fits; 0 where not even two do.

    Args:
        needed: from images a step to bytes; it grows with them.
        room: bytes that there are.
        below: a number of images that does not fit.
    """
    fits, too_many = _LEAST_BATCH, below
    if fits >= too_many or needed(fits) > room:
        return 0
    sizes = {fits: needed(fits), too_many: needed(too_many)}
    guessed = False
    while too_many - fits > 1:
        # Memory is nearly a straight line: a guess on it is at most a few images off. What follows one halves the rest.
        slope = (sizes[too_many] - sizes[fits]) / (too_many - fits)
        guess = fits + int((room - sizes[fits]) / slope) if slope > 0 else fits
        middle = (fits + too_many) // 2 if guessed else guess
        middle = min(max(middle, fits + 1), too_many - 1)
        guessed = not guessed
        sizes[middle] = needed(middle)
        if sizes[middle] <= room:
            fits = middle
        else:
            too_many = middle
    return fits


class MemoryFit:
    """What a training step needs of its device, beside what the device has.

    Args:
        costs: the costs of the model by images a step.
        policy: what is trained.
        batch_size: images a step.
        device: where.
    """

    def __init__(
        self, costs: Callable[[int], CostModel], policy: Policy, batch_size: int, device: torch.device
    ) -> None:
        self._costs = costs
        self._policy = policy
        self._batch_size = batch_size
        self._device = device
        self._room = 0

    def check(self, room: int | None = None) -> None:
        """To be called before the model is on its device.

        Args:
            room: bytes that may be taken; None: what is free now.

        Raises:
            OutOfMemoryError: a step needs more.
        """
        self._room = available_bytes(self._device) if room is None else room
        if self._needed(self._batch_size) > self._room:
            raise OutOfMemoryError(self.told())

    def told(self) -> str:
        """The need, the room that there was, and the greatest batch that would do, in words."""
        needed = self._needed(self._batch_size)
        sizes = (
            f"a training step of {self._batch_size} images needs {_gigabytes(needed)} (predicted), and "
            f"{_gigabytes(self._room)} of {'GPU ' * (self._device.type == 'cuda')}memory were free at its start"
        )
        if needed <= self._room:
            return f"{sizes}, which others may have taken since: use a smaller batch_size"
        greatest = largest_batch(self._needed, self._room, self._batch_size)
        if not greatest:
            return f"{sizes}, too little for {_LEAST_BATCH} images: use a smaller model or smaller images"
        return f"{sizes}: the greatest batch_size that fits is {greatest}"

    def _needed(self, batch_size: int) -> int:
        return self._costs(batch_size).cost(self._policy).memory + library_bytes(self._device)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
