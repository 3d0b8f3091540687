"""Whether two ways to run a training step give the same, tried without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rlsearch.training.loop import Step

# A step's loss and its gradients, in the optimizer's order.
Outcome: TypeAlias = tuple[Tensor, list[Tensor]]

# How far losses and gradients may lie apart, relative to their size: other orders of additions, and in bf16 other
# places where sums are rounded to 8 bits.
_TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes within the block leave no trace in the model's buffers and in the random generators."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        for buffer, content in buffers:
            buffer.copy_(content)
        torch.set_rng_state(host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def outcome(step: Step, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> Outcome:
    """What one pass gives: copies, which later passes leave alone."""
    loss = step(inputs, labels).clone()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return loss, [p.grad.detach().clone() for p in parameters if p.grad is not None]


def agree(first: Outcome, second: Outcome, precision: str) -> bool:
    """Whether loss and gradients are the same up to rounding."""
    (loss, gradients), (other_loss, other_gradients) = first, second
    if [g.shape for g in gradients] != [g.shape for g in other_gradients]:
        return False
    tolerance = _TOLERANCES[precision]
    apart = _norm([ours - theirs for ours, theirs in zip(gradients, other_gradients, strict=True)])
    same_loss = (loss - other_loss).abs() <= tolerance * loss.abs()
    return bool(same_loss and apart <= tolerance * _norm(gradients))


def _norm(tensors: list[Tensor]) -> Tensor:
    """Of all of them as one vector."""
    return torch.nn.utils.get_total_norm(tensors)
