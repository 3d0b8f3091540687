"""The cost of one segment of a model, read off one forward and backward pass on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.replacement.clock import Clock
from rlsearch.training.loop import autocast
from rlsearch.training.storages import Storages, block_bytes, peak_bytes

Events = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class SegmentCost:
    """What one segment costs for a whole batch, with the blocks that a policy puts into it.

    Bytes are whole blocks of the allocator. Those of the segment's input and output are in none of them but the peaks:
    a tensor between two segments is counted by who adds them up.

    Attributes:
        forward_flops: operations of the forward pass, on average over the passes of units that learn in some only.
        backward_flops: operations of the backward pass, on average; without the gradient of the input where none is
            needed.
        interior_bytes: saved for backward, without the segment's input and output.
        cast_bytes: copies of parameters in lower precision that nothing saves, but autocast keeps until its end.
        output_bytes: the size of the output.
        saves_input: whether the input is kept for the backward pass.
        saves_output: whether the output is.
        is_identity: whether the output is the input itself (a skipped unit).
        learns: whether the output takes a gradient: something in the segment learns, or the input takes one.
        forward_peak: the most that the forward pass holds at once, its input left out and its output not.
        backward_peak: the most that the backward pass holds at once, from the output's gradient on: what is saved and
            not yet given up, the input and the output among it, temporary tensors, and gradients, the input's too.
        backward_peak_input_held: the same where the input is there all the time, for whoever else holds it.
        borrowed_gradients: bytes of the gradients of parameters of other segments, by a number and a
            name that the caller gave.
        own_gradients: bytes of those of the segment's own; not measured, since segments that are alike in all else may
            differ in it.
    """

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    interior_bytes: int = 0
    cast_bytes: int = 0
    output_bytes: int = 0
    saves_input: bool = False
    saves_output: bool = False
    is_identity: bool = False
    learns: bool = False
    forward_peak: int = 0
    backward_peak: int = 0
    backward_peak_input_held: int = 0
    borrowed_gradients: Mapping[tuple[int, str], int] = field(default_factory=dict)
    own_gradients: int = 0


def measure(
    module: nn.Module,
    inputs: Tensor,
    *,
    precision: str,
    known: Sequence[Tensor],
    borrowed: Mapping[tuple[int, str], Tensor],
    learned_before: Sequence[Tensor] = (),
    early: Sequence[Tensor] = (),
) -> SegmentCost:
    """What ``module`` costs on fake ``inputs``, under the caller's fake mode.

    Units with a `Clock` learn in some passes only. Operations are those of an average pass, since what the passes of
    one unit cost does not depend on those of another; what is kept is that of a pass in which all of them learn.

    Args:
        module: in training mode.
        inputs: (B, ...); it requires a gradient where the segment before it learns.
        precision: ``fp32`` or ``bf16``.
        known: the parameters and buffers of the whole model; what is kept of them takes no further memory.
        borrowed: parameters that may not be the module's own, but get a gradient through it.
        learned_before: others that have their gradient already when the backward pass comes here.
        early: parameters of its own that do.
    """
    clocks: dict[int, list[Clock]] = {}
    for part in module.modules():
        if isinstance(part, Clock):
            clocks.setdefault(part.period, []).append(part)

    def run() -> SegmentCost:
        own = {id(parameter) for parameter in module.parameters()}
        others = [parameter for parameter in learned_before if id(parameter) not in own]
        return _run(module, inputs, precision, known, borrowed, [*others, *early])

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


def measure_inference(module: nn.Module, inputs: Tensor, *, precision: str, known: Sequence[Tensor]) -> SegmentCost:
    """What a segment costs that has left training: its forward pass in eval mode, by which nothing is saved.

    The arguments are those of `measure`.
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Autocast keeps its copies of what takes gradients only.
    for parameter in learning:
        parameter.requires_grad_(False)
    module.eval()
    with torch.no_grad():
        cost = _run(module, inputs, precision, known, {}, ())
    module.train()
    for parameter in learning:
        parameter.requires_grad_(True)
    return cost


def _set_passes(clocks: Mapping[int, Sequence[Clock]], resting: int | None) -> None:
    """Brings every clock to a pass that learns; those of the period ``resting`` to one that does not."""
    for period, alike in clocks.items():
        for clock in alike:
            clock.set_extra_state(1 if period == resting else 0)


def _run(
    module: nn.Module,
    inputs: Tensor,
    precision: str,
    known: Sequence[Tensor],
    borrowed: Mapping[tuple[int, str], Tensor],
    learned: Sequence[Tensor],
) -> SegmentCost:
    """Runs ``module`` forward and backward once, where ``learned`` have a gradient already."""
    own = {id(parameter) for parameter in module.parameters()}
    for parameter in learned:
        parameter.grad = torch.empty_like(parameter)
    seed = torch.ones(())
    gradients: list[Tensor] = []
    with Storages([*known, *(p.grad for p in learned if p.grad is not None), inputs, seed]) as log:
        with autocast(precision, inputs.device):
            features = _Entry.apply(inputs, gradients)
            outputs = module(features)
            ended, forward_flops = len(log.events), log.flops
        source, target = log.number(features), log.number(outputs)
        sizes = [block_bytes(tensor.untyped_storage().nbytes()) for tensor in (features, outputs)]
        learns = outputs.requires_grad
        end = _Exit.apply(outputs)
        scalar = log.number(end)
        # From here on the two are there only as far as the backward pass needs them.
        del features, outputs
        num_forward = len(log.events)
        if learns:
            end.backward(seed)
    cost = SegmentCost(
        forward_flops=forward_flops,
        backward_flops=log.flops - forward_flops,
        learns=learns,
        output_bytes=sizes[1],
        is_identity=source == target,
        borrowed_gradients={
            name: block_bytes(tensor.grad.untyped_storage().nbytes())
            for name, tensor in borrowed.items()
            if tensor.grad is not None and id(tensor) not in own
        },
    )
    for tensor in known:
        tensor.grad = None
    # The one number that the pass ended in is no part of the segment.
    split = ended, num_forward, len(log.events)
    parts = [[e for e in log.events[a:b] if e[0] != scalar] for a, b in zip((0, *split), split, strict=False)]
    return _with_memory(cost, parts, (source, target), (sizes[0], sizes[1]))


def _with_memory(
    cost: SegmentCost,
    parts: Sequence[Events],
    boundary: tuple[int | None, int | None],
    sizes: tuple[int, int],
) -> SegmentCost:
    """The cost with what the noted storages say.

    Args:
        cost: the rest of it.
        parts: what came and went in the forward pass, between the passes, and in the backward pass.
        boundary: the numbers of the input and the output.
        sizes: their bytes.
    """
    forward, between, backward = parts
    source, target = boundary
    before = [*forward, *between]
    interior = _alive(before, boundary)
    saves_input = _alive([event for event in before if event[0] == source]) > 0
    saves_output = not cost.is_identity and _alive([event for event in before if event[0] == target]) > 0
    start = interior + sizes[1] * saves_output
    return replace(
        cost,
        interior_bytes=interior,
        cast_bytes=_alive(forward, boundary) - interior,
        saves_input=saves_input,
        saves_output=saves_output,
        forward_peak=peak_bytes(event for event in forward if event[0] != source),
        backward_peak=peak_bytes(backward, start + sizes[0] * saves_input),
        backward_peak_input_held=sizes[0] + peak_bytes((event for event in backward if event[0] != source), start),
    )


def _alive(events: Events, without: Sequence[int | None] = ()) -> int:
    """Bytes that came and did not go."""
    return sum(num_bytes for number, num_bytes in events if number not in without)


class _Entry(torch.autograd.Function):
    """What a segment reads: no leaf, since in-place operations may not be applied to one that takes a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        # It is what the segment before starts from: it does not go with the backward pass.
        ctx.gradients.append(gradient)
        return None, None


class _Exit(torch.autograd.Function):
    """One number for a segment's output, whose gradient it makes anew, so that nobody else holds that."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor) -> Tensor:
        ctx.form = outputs.shape, outputs.stride(), outputs.dtype
        return outputs.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        shape, stride, dtype = ctx.form
        return torch.empty_strided(shape, stride, dtype=dtype)
