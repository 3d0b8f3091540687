"""What a policy costs, known without training it and without allocating anything.

Every segment of the model (see `rlsearch.model_graph`) is run once on fake tensors, forward and backward, for every
block that a policy puts into it or into a part of it; segments that are alike share what was measured (see `kinds`). A
policy's cost is then put together: operations are a sum, and the peak of a step's memory follows from what each segment
keeps and from the most that it holds while it runs (see `step_memory`). Both are exact: operations are counted as
`torch.utils.flop_counter` counts them on the whole model's real step, bytes as the storages come and go in it.

Method: reconstruction; the papers publish what they save, not how to predict it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlsearch.errors import ConfigError, Problem, suggestion
from rlsearch.model_graph import Segment
from rlsearch.policy import Policy
from rlsearch.replacement import PlannedUnit, Unit, fits
from rlsearch.training.measured_segments import MeasuredSegments
from rlsearch.training.segment_cost import SegmentCost
from rlsearch.training.sizes import Sizes
from rlsearch.training.step_memory import step_peak
from rlsearch.training.storages import block_bytes

# Tensors of a parameter's size that each optimizer keeps beside the parameter and its gradient, and single numbers.
OPTIMIZER_STATES = {"sgd": (1, 0), "adamw": (2, 1)}


@dataclass(frozen=True)
class Cost:
    """What one policy costs.

    Attributes:
        params: learnable parameters after surgery, by unique storage.
        params_total: parameters of the materialised model.
        memory: predicted bytes at the peak of a training step, as a CUDA allocator counts them: parameters and buffers,
            gradients, optimizer state, the input batch, what is saved for the backward pass and what is there for a
            moment. Work space of the kernels and the libraries is not in it, so that it is the same on every machine.
        forward_flops: floating-point operations of the forward pass of one training image.
        step_flops: the same, forward and backward.
    """

    params: int
    params_total: int
    memory: int
    forward_flops: float
    step_flops: float


@dataclass(frozen=True)
class LayerCost:
    """What one segment (the stem, a unit, the head) has of a model's cost.

    Attributes:
        name: of the segment.
        params: learnable parameters.
        forward_flops: floating-point operations of the forward pass of one training image.
        step_flops: the same, forward and backward.
        saved: bytes that it saves for its backward pass, its output with them where that is saved.
        held: bytes of its parameters and buffers and the optimizer's state; gradients come as what is saved goes.
    """

    name: str
    params: int
    forward_flops: float
    step_flops: float
    saved: int
    held: int


@dataclass(frozen=True)
class CutCost:
    """What a step costs behind a cut.

    Attributes:
        memory: bytes at its peak, as in `Cost.memory`, where it runs the dropped segments.
        memory_stored: the same where it reads their output from where it is stored; what lies there is not in it.
        step_flops: operations of one image, the dropped segments' forward pass with them.
        step_flops_stored: the same without.
    """

    memory: int
    memory_stored: int
    step_flops: float
    step_flops_stored: float


class CostModel:
    """The costs of all policies of one model, at one input shape, batch size, optimizer and precision.

    Args:
        model: an untouched model; it is neither changed nor run.
        input_shape: (C, H, W) of one image.
        batch_size: images a step.
        optimizer: ``sgd`` or ``adamw``.
        precision: ``fp32`` or ``bf16``.

    Attributes:
        units: the model's units, in forward order.
        segments: the model's segments; one alone where its forward pass cannot be traced.

    Raises:
        ConfigError: an optimizer that is unknown, or sizes that are not positive.
        ModelError: the model cannot be run at that input shape, gives no logits, or has no unit.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        batch_size: int,
        optimizer: str = "sgd",
        precision: str = "fp32",
    ) -> None:
        _check(input_shape, batch_size, optimizer)
        self._batch_size = batch_size
        self._states = OPTIMIZER_STATES[optimizer]
        self._measured = MeasuredSegments(model, (batch_size, *input_shape), precision)
        self.units: tuple[Unit, ...] = self._measured.units
        self.segments: tuple[Segment, ...] = self._measured.segments

    def cost(self, policy: Policy) -> Cost:
        """What ``policy`` costs at the start of its training, before any layer is dropped.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        steps = self.plan(policy)
        costs, sizes = self._measured.training(steps), self._measured.sizes(steps)
        forward, step = self._image_flops(costs)
        return Cost(
            params=sizes.learnable,
            params_total=sizes.total,
            memory=self._peak(costs, sizes, sizes, self._measured.input_bytes(0)),
            forward_flops=forward,
            step_flops=step,
        )

    def plan(self, policy: Policy) -> tuple[PlannedUnit, ...]:
        """The policy's replacements in forward order, each with the sources that it borrows from.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        return self._measured.plan(policy)

    def fits(self, unit: str, block: str, options: Mapping[str, Any] | None = None) -> str | None:
        """None if ``block`` can stand in for ``unit``, else the reason in words."""
        return fits(self._measured.model, self.units, unit, block, options)

    def image_flops(self, policy: Policy, cut: int) -> tuple[float, float]:
        """Operations of one image in the segments from ``cut`` on: forward, and forward with backward."""
        return self._image_flops(self._measured.training(self.plan(policy), cut))

    def memory_at(self, policy: Policy, cut: int, learning: Sizes, *, stored: bool = False) -> int:
        """Bytes at the peak of a training step in which the segments before ``cut`` do not learn, counted as in
        `Cost.memory`.

        Args:
            policy: what is replaced by what.
            cut: how many segments have left; at 0 the result is `Cost.memory`.
            learning: the sizes of the model as it trains: which parameters still learn it knows best, since those that
                a layer after the cut holds too go on learning.
            stored: whether the step reads the dropped segments' output from where it is stored; else it runs them, from
                a batch of images.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        steps = self.plan(policy)
        costs, sizes = self._measured.training(steps, cut), self._measured.sizes(steps)
        if cut == 0 or stored:
            return self._peak(costs, sizes, learning, self._measured.input_bytes(cut))
        prefix = self._measured.inference(steps, cut)
        return self._peak(costs, sizes, learning, self._measured.input_bytes(0), prefix)

    def layers(self, policy: Policy) -> tuple[LayerCost, ...]:
        """What each segment has of the cost, in forward order, before any is dropped.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        steps = self.plan(policy)
        costs, sizes = self._measured.training(steps), self._measured.segment_sizes(steps)
        found = []
        for index, (cost, size) in enumerate(zip(costs, sizes, strict=False)):
            is_kept = cost.saves_output or costs[index + 1].saves_input
            forward, step = self._image_flops([cost])
            found.append(
                LayerCost(
                    name=self.segments[index].name,
                    params=size.learnable,
                    forward_flops=forward,
                    step_flops=step,
                    saved=cost.interior_bytes + cost.output_bytes * (is_kept and not cost.is_identity),
                    held=size.fixed_bytes + self._state_bytes(size),
                )
            )
        return tuple(found)

    def at_cuts(self, policy: Policy) -> list[CutCost]:
        """What a step costs once the first segments have left, for every number of them, none included.

        A parameter that several segments hold counts as learning in each.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        sizes = self._measured.segment_sizes(self.plan(policy))
        found = []
        for cut in range(len(self.segments)):
            learning = sum(sizes[cut:], Sizes())
            prefix, step = self.forward_flops(policy, 0, cut), self.image_flops(policy, cut)[1]
            memory, stored = (self.memory_at(policy, cut, learning, stored=stored) for stored in (False, True))
            found.append(CutCost(memory, stored, step + prefix, step))
        return found

    def forward_flops(self, policy: Policy, start: int, end: int) -> float:
        """Operations of one image's forward pass through the segments from ``start`` up to ``end``."""
        return self._image_flops(self._measured.training(self.plan(policy))[start:end])[0]

    def _peak(
        self,
        costs: Sequence[SegmentCost],
        sizes: Sizes,
        learning: Sizes,
        batch: int,
        prefix: Sequence[SegmentCost] = (),
    ) -> int:
        """Bytes at the peak of a step whose optimizer holds its state for what is ``learning``."""
        return step_peak(
            costs,
            resident=sizes.fixed_bytes + self._state_bytes(learning),
            gradients=learning.learnable_bytes,
            batch=batch,
            labels=block_bytes(8 * self._batch_size),
            prefix=prefix,
        )

    def _state_bytes(self, learning: Sizes) -> int:
        """Bytes of the optimizer's state."""
        tensors, numbers = self._states
        return tensors * learning.learnable_bytes + numbers * learning.learnable_tensors * block_bytes(4)

    def _image_flops(self, costs: Sequence[SegmentCost]) -> tuple[float, float]:
        forward = sum(item.forward_flops for item in costs)
        backward = sum(item.backward_flops for item in costs)
        return forward / self._batch_size, (forward + backward) / self._batch_size


_MODELS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], CostModel]] = weakref.WeakKeyDictionary()


def estimate_cost(
    model: nn.Module, policy: Policy, input_shape: Sequence[int], batch_size: int, optimizer: str = "sgd"
) -> Cost:
    """What training ``model`` with ``policy`` costs a step, in float32; nothing is trained, allocated or changed.

    The first call for a model looks at all of it; further policies of the same model take milliseconds.

    Args:
        model: the untouched model, on any device (``meta`` too).
        policy: what is replaced by what.
        input_shape: (C, H, W) of one image.
        batch_size: images a step.
        optimizer: ``sgd`` or ``adamw``.

    Raises:
        ConfigError: an optimizer that is unknown, or sizes that are not positive.
        ModelError: the model cannot be run at that input shape, or has no unit.
        SurgeryError: the policy cannot be applied to the model.
    """
    # The structure is part of the key: a model may have been changed since the last call.
    structure = tuple((name, type(module)) for name, module in model.named_modules())
    key = (tuple(input_shape), batch_size, optimizer, structure)
    models = _MODELS.setdefault(model, {})
    if key not in models:
        models[key] = CostModel(model, input_shape, batch_size, optimizer)
    return models[key].cost(policy)


def _check(input_shape: Sequence[int], batch_size: int, optimizer: str) -> None:
    problems = []
    if any(extent < 1 for extent in input_shape):
        problems.append(Problem("input_shape", f"must be positive numbers (C, H, W), got {tuple(input_shape)}"))
    if batch_size < 1:
        problems.append(Problem("batch_size", f"must be at least 1, got {batch_size}"))
    if optimizer not in OPTIMIZER_STATES:
        problems.append(Problem("optimizer", f"unknown value {optimizer!r}{suggestion(optimizer, OPTIMIZER_STATES)}"))
    if problems:
        raise ConfigError(problems, "estimate_cost")
