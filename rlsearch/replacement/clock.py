"""The option ``update_every``: units that learn in some training passes only.

In the others the unit's tensors are constants, so that the gradient of its weights, a third of a dense step, is not
computed and its input not kept (METHODS: (2 + 1/m) of 3 forward costs). Reconstruction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAME = "_clock"


class Clock(nn.Module):
    """Counts a unit's training passes, so that its pairs can learn in every ``period``-th only, the first included.

    Attributes:
        period: passes from one that learns to the next.
        learns: whether the present pass does; always so outside of training.
        hook_id: of the hook that drives it.
    """

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period
        self.learns = True
        self.hook_id = -1
        self._passes = 0

    def tick(self, training: bool) -> None:
        """To be called before each pass of the unit."""
        # A compiler would make a new program for every count: compiled units learn in every pass. And a pass that is
        # made once more during the backward pass, by activation checkpointing, is the one that it repeats.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        counts = training and torch.is_grad_enabled()
        self.learns = not counts or self._passes % self.period == 0
        self._passes += counts

    def get_extra_state(self) -> Tensor:
        """The count, so that a resumed training goes on in step."""
        return torch.tensor(self._passes)

    def set_extra_state(self, state: Any) -> None:
        """Takes what `get_extra_state` gave."""
        self._passes = int(state)


def install_clock(unit: nn.Module, clock: Clock) -> None:
    """Lets the passes of ``unit`` drive its clock, which one of its mixings has registered as a part of its state."""
    # In a tuple, a module is referred to without being registered: a unit may be an nn.Sequential that runs all it has.
    setattr(unit, _NAME, (clock,))
    handle = unit.register_forward_pre_hook(_tick)
    # A deep copy of the unit has a hook of its own under the same id.
    clock.hook_id = handle.id


def remove_clock(unit: nn.Module) -> None:
    """Undoes `install_clock`; nothing for other modules."""
    if _NAME in unit.__dict__:
        (clock,) = unit.__dict__.pop(_NAME)
        del unit._forward_pre_hooks[clock.hook_id]


def _tick(unit: nn.Module, _args: Any) -> None:
    (clock,) = unit.__dict__[_NAME]
    clock.tick(unit.training)
