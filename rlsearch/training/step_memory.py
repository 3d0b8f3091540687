"""The most memory that a training step holds at once, put together from what its segments hold.

The order is that of `rlsearch.training.loop`, from the second step on: the gradients of the step before are there while
the next batch is made, and gone when its forward pass begins. Reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsearch.training.segment_cost import SegmentCost
from rlsearch.training.storages import block_bytes

# The sum of the losses, and in the backward pass the loss and the gradient that it starts from: a block each.
_SCALAR = block_bytes(1)


@dataclass(frozen=True)
class _Place:
    """What lies around one segment.

    Attributes:
        kept: bytes that the segments before it keep, its input left out.
        input_held: whether its input is there after its forward pass, whether or not it keeps it itself.
    """

    kept: int
    input_held: bool


def step_peak(
    costs: Sequence[SegmentCost],
    *,
    resident: int,
    gradients: int,
    batch: int,
    labels: int,
    prefix: Sequence[SegmentCost] = (),
) -> int:
    """Bytes at the peak of a step.

    Args:
        costs: of the segments that learn, in forward order, and of the loss. A borrowed parameter is named by the place
            of the segment whose own it is, below 0 where that does not learn, and something more.
        resident: what is there all the time: parameters, buffers, the optimizer's state.
        gradients: of all parameters that learn.
        batch: the images, or the stored features that stand for them.
        labels: of the batch.
        prefix: the costs of the segments that have left, where the step runs them.
    """
    logits = next(cost.output_bytes for cost in reversed(costs[:-1]) if not cost.is_identity) if costs[1:] else batch
    resident += labels
    base = resident + _SCALAR
    # The next batch is made while the last one is still there.
    start = base + gradients + 2 * batch + labels
    before, features = _prefix_peak(prefix, base, batch)
    if prefix:
        base, resident = base + batch, resident + batch
    forward, places = _forward_peak(costs, base, features, input_held=not prefix)
    backward = _backward_peak(costs, places, resident + 3 * _SCALAR, logits)
    return max(start, before, forward, backward)


def _prefix_peak(prefix: Sequence[SegmentCost], base: int, batch: int) -> tuple[int, int]:
    """The peak of segments that run without gradients beside the images, and the size of what they give."""
    peak, held, size = 0, batch, batch
    for cost in prefix:
        peak = max(peak, base + held + cost.forward_peak)
        if not cost.is_identity:
            size = cost.output_bytes
            held = batch + size
    return peak, size


def _forward_peak(costs: Sequence[SegmentCost], base: int, size: int, input_held: bool) -> tuple[int, list[_Place]]:
    """The peak of the forward pass and the loss, and what lies around every segment afterwards."""
    peak = casts = 0
    # What is kept, the tensor between two segments left out: its size, and whether it is kept too.
    kept, is_held = 0, input_held
    places = []
    for index, cost in enumerate(costs):
        is_loss = index == len(costs) - 1
        places.append(_Place(kept, is_held or is_loss))
        peak = max(peak, base + kept + size + casts + cost.forward_peak)
        casts += cost.cast_bytes
        is_held = is_held or cost.saves_input
        kept += cost.interior_bytes
        if not cost.is_identity:
            kept += size * is_held
            size, is_held = cost.output_bytes, cost.saves_output
    return peak, places


def _backward_peak(costs: Sequence[SegmentCost], places: Sequence[_Place], base: int, logits: int) -> int:
    """The peak of the backward pass; the gradient of a parameter that several segments use is made by the first."""
    peak = gradients = 0
    early = [0] * len(costs)
    made: set[tuple[int, str]] = set()
    for index in reversed(range(len(costs))):
        cost, place = costs[index], places[index]
        if not cost.learns:
            break
        held = cost.backward_peak_input_held if place.input_held else cost.backward_peak
        # The logits stay until the step's end; the last segments count them as their input or output.
        is_counted = index == len(costs) - 1 or (index == len(costs) - 2 and cost.saves_output)
        peak = max(peak, base + place.kept + held + gradients + (0 if is_counted else logits))
        gradients += cost.own_gradients - early[index]
        for name, num_bytes in cost.borrowed_gradients.items():
            owner = name[0]
            if 0 <= owner < index and name not in made:
                made.add(name)
                early[owner] += num_bytes
                gradients += num_bytes
    return peak
