"""What a policy costs, known without training it and without allocating anything.

Every segment of the model (see `rlsearch.model_graph`) is run once on fake tensors, forward and backward, for every
block that a policy puts into it or into a part of it; segments that are alike share what was measured (see `kinds`). A
policy's cost is then a sum. The sum is exact: operations are counted as
`torch.utils.flop_counter` counts them on the whole model's real step, and an activation that two neighbouring segments
both keep is counted once.

Method: reconstruction; the papers publish what they save, not how to predict it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.errors import ConfigError, ModelError, Problem, suggestion
from rlsearch.model_graph import Segment, fake_copy, outermost, split
from rlsearch.policy import Policy
from rlsearch.replacement import PlannedUnit, Unit, find_units, fits, plan
from rlsearch.replacement.fitting import is_replaced
from rlsearch.replacement.surgery import build_unit, plan_untouched
from rlsearch.training.kinds import Kinds
from rlsearch.training.loop import autocast
from rlsearch.training.segment_cost import SegmentCost, measure, saved_bytes
from rlsearch.training.sizes import SharedStorage, Sizes

# Tensors of a parameter's size that each optimizer keeps beside the parameter and its gradient.
OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}


@dataclass(frozen=True)
class Cost:
    """What one policy costs.

    Attributes:
        params: learnable parameters after surgery, by unique storage.
        params_total: parameters of the materialised model.
        memory: predicted bytes of a training step: parameters and buffers, gradients, optimizer state, saved
            activations, the input batch. Work space of the kernels and the allocator's slack are not in it.
        forward_flops: floating-point operations of the forward pass of one training image.
        step_flops: the same, forward and backward.
    """

    params: int
    params_total: int
    memory: int
    forward_flops: float
    step_flops: float


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
        self._batch_shape = (batch_size, *input_shape)
        self._states = OPTIMIZER_STATES[optimizer]
        self._precision = precision
        self._mode, self._model = fake_copy(model)
        self._model.train()
        self._is_replaced = is_replaced(self._model)
        # Two images: a batch norm in training mode refuses one value a channel.
        with self._mode:
            example = torch.empty(2, *input_shape)
        self.units: tuple[Unit, ...] = tuple(find_units(self._model, example))
        self._holders = outermost([unit.name for unit in self.units])
        self.segments: tuple[Segment, ...] = _segments(self._model, list(dict.fromkeys(self._holders.values())))
        self._inputs = self._segment_inputs()
        self._dense = Sizes.of(self._model)
        self._shared = SharedStorage(self._model)
        self._tensors = [*self._model.parameters(), *self._model.buffers()]
        self._kinds = Kinds(self._model, self.units)
        self._segment_kinds = [
            self._kinds.of_segment(segment.module, (inputs, segment is self.segments[-1]))
            for segment, inputs in zip(self.segments, self._inputs, strict=True)
        ]
        # Filled as policies ask for them.
        self._segment_costs: dict[Hashable, SegmentCost] = {}
        self._differences: dict[Hashable, Sizes] = {}

    def cost(self, policy: Policy) -> Cost:
        """What ``policy`` costs at the start of its training, before any layer is dropped.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        steps = self.plan(policy)
        costs = self._costs(steps, 0, len(self.segments), cut=0)
        sizes = self._dense + self._difference(steps)
        forward, step = self._image_flops(costs)
        return Cost(
            params=sizes.learnable,
            params_total=sizes.total,
            memory=self._memory(sizes.fixed_bytes, sizes.learnable_bytes, saved_bytes(costs, self._image_bytes)),
            forward_flops=forward,
            step_flops=step,
        )

    def plan(self, policy: Policy) -> tuple[PlannedUnit, ...]:
        """The policy's replacements in forward order, each with the sources that it borrows from.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        find = plan if self._is_replaced else plan_untouched
        return find(self._model, policy, self.units).replacements

    def fits(self, unit: str, block: str, options: Mapping[str, Any] | None = None) -> str | None:
        """None if ``block`` can stand in for ``unit``, else the reason in words."""
        return fits(self._model, self.units, unit, block, options)

    def image_flops(self, policy: Policy, cut: int) -> tuple[float, float]:
        """Operations of one image in the segments from ``cut`` on: forward, and forward with backward."""
        steps = self.plan(policy)
        return self._image_flops(self._costs(steps, cut, len(self.segments), cut))

    def memory_at(self, policy: Policy, cut: int, learnable_bytes: int, *, stored: bool = False) -> int:
        """Bytes of a training step in which the segments before ``cut`` do not learn, counted as in `Cost.memory`.

        Args:
            policy: what is replaced by what.
            cut: how many segments have left; at 0 the result is `Cost.memory`.
            learnable_bytes: of the parameters that still learn. Which these are the real model knows best: parameters
                that a layer after the cut holds too go on learning.
            stored: whether the step reads the dropped segments' output from where it is stored; else it runs them, from
                a batch of images.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        steps = self.plan(policy)
        costs = self._costs(steps, cut, len(self.segments), cut)
        shape, _, dtype = self._inputs[cut]
        features = math.prod(shape) * dtype.itemsize
        if cut == 0 or stored:
            saved = saved_bytes(costs, features)
        else:
            saved = self._image_bytes + saved_bytes(costs, features, is_batch=False)
        return self._memory((self._dense + self._difference(steps)).fixed_bytes, learnable_bytes, saved)

    def forward_flops(self, policy: Policy, start: int, end: int) -> float:
        """Operations of one image's forward pass through the segments from ``start`` up to ``end``."""
        steps = self.plan(policy)
        return self._image_flops(self._costs(steps, start, end, cut=0))[0]

    @property
    def _image_bytes(self) -> int:
        """Bytes of a batch of images."""
        return 4 * math.prod(self._batch_shape)

    def _memory(self, fixed_bytes: int, learnable_bytes: int, saved: int) -> int:
        """Parameters and buffers; a gradient and the optimizer's state of what learns; what is saved for backward."""
        return fixed_bytes + learnable_bytes * (1 + self._states) + saved

    def _image_flops(self, costs: Sequence[SegmentCost]) -> tuple[float, float]:
        forward = sum(item.forward_flops for item in costs)
        backward = sum(item.backward_flops for item in costs)
        return forward / self._batch_shape[0], (forward + backward) / self._batch_shape[0]

    def _costs(self, steps: Sequence[PlannedUnit], start: int, end: int, cut: int) -> list[SegmentCost]:
        """The costs of segments with the planned units in them, if those before ``cut`` do not learn: the first that
        does has no use for the gradient of its input (it may come after units that are left out)."""
        by_holder: dict[str, list[PlannedUnit]] = {}
        for step in steps:
            by_holder.setdefault(self._holders[step.unit.name], []).append(step)
        costs: list[SegmentCost] = []
        for index in range(start, end):
            holders = dict.fromkeys(self.segments[index].units)
            units = [step for holder in holders for step in by_holder.get(holder, ())]
            needs = costs[-1].learns if costs else index > cut
            costs.append(self._segment_cost(index, units, needs_input_gradient=index > cut and needs))
        return costs

    def _segment_cost(self, index: int, steps: Sequence[PlannedUnit], needs_input_gradient: bool) -> SegmentCost:
        """Measured once for all segments and units that are alike."""
        segment = self.segments[index]
        places = tuple((self._place(segment, step.unit.name), self._kinds.of_measurement(step)) for step in steps)
        key = (self._segment_kinds[index], places, needs_input_gradient)
        if key not in self._segment_costs:
            shape, stride, dtype = self._inputs[index]
            with self._placed(steps, segment.module) as modules, self._mode:
                self._segment_costs[key] = measure(
                    segment.module,
                    torch.empty_strided(shape, stride, dtype=dtype, requires_grad=needs_input_gradient),
                    precision=self._precision,
                    parameters=[*self._tensors, *(t for m in modules for t in [*m.parameters(), *m.buffers()])],
                    is_last=index == len(self.segments) - 1,
                )
        return self._segment_costs[key]

    def _place(self, segment: Segment, unit: str) -> tuple[int, str]:
        """Where a unit is in its segment, whatever the names there."""
        holder = self._holders[unit]
        return segment.units.index(holder), unit.removeprefix(holder)

    def _difference(self, steps: Sequence[PlannedUnit]) -> Sizes:
        """What the planned units change in the model's sizes."""
        originals = [self._model.get_submodule(step.unit.name) for step in steps]
        if any(self._shared.has(original) for original in originals):
            with self._placed(steps):
                return Sizes.of(self._model) - self._dense
        keys = [self._kinds.of_step(step) for step in steps]
        unknown = [step for step, key in zip(steps, keys, strict=True) if key not in self._differences]
        if unknown:
            with self._placed(unknown):
                pass  # that is where they are noted
        return sum((self._differences[key] for key in keys), Sizes())

    @contextmanager
    def _placed(self, steps: Sequence[PlannedUnit], segment: nn.Module | None = None) -> Iterator[list[nn.Module]]:
        """Puts what stands in for the planned units into the model and into a segment of it, and the units back."""
        with self._mode:
            built = [_build(self._model, step) for step in steps]
        names = [step.unit.name for step in steps]
        originals = [self._model.get_submodule(name) for name in names]
        for step, module, original in zip(steps, built, originals, strict=True):
            # What is built has to be looked at once: for what it measures, and for what it holds.
            key = self._kinds.of_step(step)
            if key not in self._differences:
                self._differences[key] = Sizes.of(module) - Sizes.of(original)
        roots = [self._model] if segment is None else [self._model, segment]
        try:
            _set_submodules(roots, names, built)
            yield built
        finally:
            _set_submodules(roots, names, originals)

    def _segment_inputs(self) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
        """Shape, strides and type of every segment's input batch."""
        inputs = []
        with self._mode, torch.no_grad(), autocast(self._precision, torch.device("cpu")):
            features = torch.empty(self._batch_shape)
            for segment in self.segments:
                inputs.append((tuple(features.shape), features.stride(), features.dtype))
                features = segment.module(features)
        if not isinstance(features, Tensor) or features.dim() != 2:
            given = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ModelError(f"{type(self._model).__name__} must give logits (images, classes), it gives {given}")
        return inputs


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


def _segments(model: nn.Module, names: Sequence[str]) -> tuple[Segment, ...]:
    try:
        segments = tuple(split(model, names))
    except ModelError:
        segments = ()
    if {unit for segment in segments for unit in segment.units} == set(names):
        return segments
    # Its costs are still known, only not piece by piece: the whole model is one segment.
    return (Segment("model", model, tuple(names)),)


def _build(model: nn.Module, step: PlannedUnit) -> nn.Module:
    """Where a and b start costs nothing, but would have to be computed."""
    options = dict(step.options)
    if "init" in options:
        options["init"] = "half"
    return build_unit(model, replace(step, options=options))


def _set_submodules(roots: Sequence[nn.Module], names: Sequence[str], modules: Sequence[nn.Module]) -> None:
    for name, module in zip(names, modules, strict=True):
        for root in roots:
            root.set_submodule(name, module)
