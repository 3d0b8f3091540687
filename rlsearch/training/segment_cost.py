"""The cost of one segment of a model, read off one forward and backward pass on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rlsearch.replacement.clock import Clock
from rlsearch.training.loop import autocast


@dataclass(frozen=True)
class SegmentCost:
    """What one segment costs for a whole batch, with the blocks that a policy puts into it.

    Attributes:
        forward_flops: operations of the forward pass, on average over the passes of units that learn in some only.
        backward_flops: operations of the backward pass, on average; without the gradient of the input where none is
            needed.
        interior_bytes: saved for backward, without the segment's input and output.
        output_bytes: the size of the output.
        saves_input: whether the input is kept for the backward pass.
        saves_output: whether the output is.
        is_identity: whether the output is the input itself (a skipped unit).
        learns: whether the output takes a gradient: something in the segment learns, or the input takes one.
    """

    forward_flops: float
    backward_flops: float
    interior_bytes: int
    output_bytes: int
    saves_input: bool
    saves_output: bool
    is_identity: bool
    learns: bool


def measure(
    module: nn.Module, inputs: Tensor, *, precision: str, parameters: Sequence[Tensor], is_last: bool
) -> SegmentCost:
    """What ``module`` costs on fake ``inputs``, under the caller's fake mode.

    Units with a `Clock` learn in some passes only. Operations are those of an average pass, since what the passes of
    one unit cost does not depend on those of another; what is kept is that of a pass in which all of them learn.

    Args:
        module: in training mode.
        inputs: (B, ...); it requires a gradient where the segment before it learns.
        precision: ``fp32`` or ``bf16``.
        parameters: of the whole model; what is kept of them takes no further memory.
        is_last: whether the loss follows, whose own saved tensors are then counted with the segment's.
    """
    clocks: dict[int, list[Clock]] = {}
    for part in module.modules():
        if isinstance(part, Clock):
            clocks.setdefault(part.period, []).append(part)

    def run() -> SegmentCost:
        return _run(module, inputs, precision=precision, parameters=parameters, is_last=is_last)

    _set_passes(clocks, None)
    learning = run()
    forward, backward = learning.forward_flops, learning.backward_flops
    for period in clocks:
        _set_passes(clocks, resting=period)
        other = run()
        share = (period - 1) / period
        forward -= share * (learning.forward_flops - other.forward_flops)
        backward -= share * (learning.backward_flops - other.backward_flops)
    return replace(learning, forward_flops=forward, backward_flops=backward)


def _set_passes(clocks: Mapping[int, Sequence[Clock]], resting: int | None) -> None:
    """Brings every clock to a pass that learns; those of the period ``resting`` to one that does not."""
    for period, alike in clocks.items():
        for clock in alike:
            clock.set_extra_state(1 if period == resting else 0)


def _run(
    module: nn.Module, inputs: Tensor, *, precision: str, parameters: Sequence[Tensor], is_last: bool
) -> SegmentCost:
    """Runs ``module`` forward and backward once."""
    # In-place operations may not be applied to a leaf that requires a gradient; in the model it would be none.
    inputs = inputs.clone()
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[_storage(tensor)] = tensor
        return tensor

    counter = _FlopCounter()
    with counter:
        # Forward alone: what a block saves while its backward runs is gone when that is done.
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast(precision, inputs.device):
                outputs = module(inputs)
            forward = counter.flops
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
        backward_flops=counter.flops - forward,
        interior_bytes=sum(tensor.untyped_storage().nbytes() for tensor in interior),
        output_bytes=outputs.untyped_storage().nbytes(),
        saves_input=_storage(inputs) in saved,
        saves_output=_storage(outputs) in saved,
        is_identity=_storage(inputs) == _storage(outputs),
        learns=outputs.requires_grad,
    )


class _FlopCounter(TorchDispatchMode):
    """Counts as `torch.utils.flop_counter.FlopCounterMode` does, by the same formulas, but not module by module, which
    takes that one as long again.

    torch has formulas for attention too, on the CPU as on CUDA. It counts the weight gradient of a convolution in
    groups as that of a dense one, which is more than is computed.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Operations that are made of others do not come here: autograd has taken them apart.
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def saved_bytes(costs: Sequence[SegmentCost], input_bytes: int, *, is_batch: bool = True) -> int:
    """What is kept for the backward pass of consecutive segments; a tensor between two of them counts once.

    Args:
        costs: of the segments.
        input_bytes: of the first segment's input.
        is_batch: whether that input is what the step was given (images, or stored features), which is there in any
            case; else segments that do not learn made it in the step, and it is gone unless it is kept.
    """
    total = input_bytes if is_batch else 0
    # The tensor that the next segment reads: its size, and whether it is counted already.
    size, counted = input_bytes, is_batch
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
