"""The cost of one segment of a model, read off one forward and backward pass on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rlsearch.training.loop import autocast


@dataclass(frozen=True)
class SegmentCost:
    """What one segment costs for a whole batch, with the blocks that a policy puts into it.

    Attributes:
        forward_flops: operations of the forward pass.
        backward_flops: operations of the backward pass; without the gradient of the input where none is needed.
        interior_bytes: saved for backward, without the segment's input and output.
        output_bytes: the size of the output.
        saves_input: whether the input is kept for the backward pass.
        saves_output: whether the output is.
        is_identity: whether the output is the input itself (a skipped unit).
    """

    forward_flops: int
    backward_flops: int
    interior_bytes: int
    output_bytes: int
    saves_input: bool
    saves_output: bool
    is_identity: bool


def measure(
    module: nn.Module, inputs: Tensor, *, precision: str, parameters: Sequence[Tensor], is_last: bool
) -> SegmentCost:
    """Runs ``module`` forward and backward on fake ``inputs``, under the caller's fake mode.

    Args:
        module: in training mode.
        inputs: (B, ...); it requires a gradient where the segment before it learns.
        precision: ``fp32`` or ``bf16``.
        parameters: of the whole model; what is kept of them takes no further memory.
        is_last: whether the loss follows, whose own saved tensors are then counted with the segment's.
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[_storage(tensor)] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast(precision, inputs.device):
            # A fresh alias: in-place operations may not be applied to a leaf that requires a gradient.
            outputs = module(inputs.view_as(inputs))
        forward = counter.get_total_flops()
        value = F.cross_entropy(outputs.float(), _labels(outputs)) if is_last else outputs
        if value.requires_grad:
            value.backward(torch.ones_like(value))
    known = {_storage(tensor) for tensor in parameters}
    boundary = {_storage(inputs), _storage(outputs)}
    interior = [t for key, t in saved.items() if key not in known and key not in boundary]
    for parameter in parameters:
        parameter.grad = None
    return SegmentCost(
        forward_flops=forward,
        backward_flops=counter.get_total_flops() - forward,
        interior_bytes=sum(tensor.untyped_storage().nbytes() for tensor in interior),
        output_bytes=outputs.untyped_storage().nbytes(),
        saves_input=_storage(inputs) in saved,
        saves_output=_storage(outputs) in saved,
        is_identity=_storage(inputs) == _storage(outputs),
    )


def saved_bytes(costs: Sequence[SegmentCost], input_bytes: int) -> int:
    """What is kept for the backward pass of consecutive segments; a tensor between two of them counts once.

    The first segment's input, a batch of images or features of ``input_bytes``, is there in any case.
    """
    total = input_bytes
    # The tensor that the next segment reads: its size, and whether it is counted already.
    size, counted = input_bytes, True
    for cost in costs:
        if cost.saves_input and not counted:
            total += size
            counted = True
        total += cost.interior_bytes
        if not cost.is_identity:
            size, counted = cost.output_bytes, cost.saves_output
            total += size if counted else 0
    return total


def _labels(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[0], dtype=torch.int64)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
