"""What a policy costs, known without training it and without allocating anything.

Every segment of the model (see `rlsearch.model_graph`) is run once on fake tensors, forward and backward, for every
block that a policy puts into it; a policy's cost is then a sum. The sum is exact: operations are counted as
`torch.utils.flop_counter` counts them on the whole model's real step, and an activation that two neighbouring segments
both keep is counted once.

Method: reconstruction; the papers publish what they save, not how to predict it.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from rlsearch.errors import ConfigError, ModelError, Problem, suggestion
from rlsearch.model_graph import Segment, fake_copy, split
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import Unit, apply_policy, find_units, fits, learnable_params, plan, total_params
from rlsearch.training.loop import autocast
from rlsearch.training.segment_cost import SegmentCost, measure, saved_bytes

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


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model; or, with replacements in one segment, how far they differ from the untouched model's."""

    learnable: int
    total: int
    learnable_bytes: int
    fixed_bytes: int

    def minus(self, other: _Sizes) -> _Sizes:
        return _Sizes(
            self.learnable - other.learnable,
            self.total - other.total,
            self.learnable_bytes - other.learnable_bytes,
            self.fixed_bytes - other.fixed_bytes,
        )


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
        ModelError: the model cannot be run at that input shape, or has no unit.
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
        # Two images: a batch norm in training mode refuses one value a channel.
        with self._mode:
            example = torch.empty(2, *input_shape)
        self.units: tuple[Unit, ...] = tuple(find_units(self._model, example))
        self.segments: tuple[Segment, ...] = _segments(self._model, [unit.name for unit in self.units])
        self._inputs = self._segment_inputs()
        self._dense = self._sizes(self._model)
        # Filled as policies ask for them.
        self._segment_costs: dict[tuple[int, str, bool], SegmentCost] = {}
        self._differences: dict[str, _Sizes] = {}

    def cost(self, policy: Policy) -> Cost:
        """What ``policy`` costs at the start of its training, before any layer is dropped.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        plan(self._model, policy, self.units)
        placed = [replacements for replacements in self._placed(policy) if replacements]
        differences = [self._difference(replacements) for replacements in placed]
        learnable_bytes = self._dense.learnable_bytes + sum(item.learnable_bytes for item in differences)
        fixed_bytes = self._dense.fixed_bytes + sum(item.fixed_bytes for item in differences)
        activations = saved_bytes(self._active(policy, 0), 4 * math.prod(self._batch_shape))
        forward, step = self.image_flops(policy, 0)
        return Cost(
            params=self._dense.learnable + sum(item.learnable for item in differences),
            params_total=self._dense.total + sum(item.total for item in differences),
            memory=fixed_bytes + learnable_bytes * (1 + self._states) + activations,
            forward_flops=forward,
            step_flops=step,
        )

    def fits(self, unit: str, block: str) -> str | None:
        """None if ``block`` can stand in for ``unit``, else the reason in words."""
        return fits(self._model, self.units, unit, block)

    def image_flops(self, policy: Policy, cut: int) -> tuple[float, float]:
        """Operations of one image in the segments from ``cut`` on: forward, and forward with backward."""
        costs = self._active(policy, cut)
        forward = sum(item.forward_flops for item in costs)
        backward = sum(item.backward_flops for item in costs)
        return forward / self._batch_shape[0], (forward + backward) / self._batch_shape[0]

    def forward_flops(self, policy: Policy, start: int, end: int) -> float:
        """Operations of one image's forward pass through the segments from ``start`` up to ``end``."""
        placed = self._placed(policy)
        costs = [self._segment_cost(index, placed[index], index > 0) for index in range(start, end)]
        return sum(item.forward_flops for item in costs) / self._batch_shape[0]

    def _active(self, policy: Policy, cut: int) -> list[SegmentCost]:
        """The costs of the segments that learn; the first of them has no use for the gradient of its input."""
        placed = self._placed(policy)
        return [self._segment_cost(index, placed[index], index > cut) for index in range(cut, len(self.segments))]

    def _placed(self, policy: Policy) -> list[tuple[Replacement, ...]]:
        """The policy's replacements, by segment."""
        by_unit = {item.unit: item for item in policy.replacements}
        return [tuple(by_unit[unit] for unit in segment.units if unit in by_unit) for segment in self.segments]

    def _segment_cost(
        self, index: int, replacements: tuple[Replacement, ...], needs_input_gradient: bool
    ) -> SegmentCost:
        key = (index, _key(replacements), needs_input_gradient)
        if key not in self._segment_costs:
            segment = self.segments[index]
            shape, dtype = self._inputs[index]
            originals = {item.unit: self._model.get_submodule(item.unit) for item in replacements}
            self._replace(replacements)
            for item in replacements:
                segment.module.set_submodule(item.unit, self._model.get_submodule(item.unit))
            with self._mode:
                self._segment_costs[key] = measure(
                    segment.module,
                    torch.empty(shape, dtype=dtype, requires_grad=needs_input_gradient),
                    precision=self._precision,
                    parameters=[*self._model.parameters(), *self._model.buffers()],
                    is_last=index == len(self.segments) - 1,
                )
            for name, original in originals.items():
                self._model.set_submodule(name, original)
                segment.module.set_submodule(name, original)
        return self._segment_costs[key]

    def _difference(self, replacements: tuple[Replacement, ...]) -> _Sizes:
        """What the replacements in one segment change in the model's sizes."""
        key = _key(replacements)
        if key not in self._differences:
            originals = {item.unit: self._model.get_submodule(item.unit) for item in replacements}
            self._replace(replacements)
            self._differences[key] = self._sizes(self._model).minus(self._dense)
            for name, original in originals.items():
                self._model.set_submodule(name, original)
        return self._differences[key]

    def _replace(self, replacements: tuple[Replacement, ...]) -> None:
        if replacements:
            with self._mode:
                apply_policy(self._model, Policy(replacements=replacements), units=self.units)

    def _sizes(self, model: nn.Module) -> _Sizes:
        return _Sizes(
            learnable_params(model),
            total_params(model),
            _bytes(p for p in model.parameters() if p.requires_grad),
            _bytes(model.parameters()) + _bytes(model.buffers()),
        )

    def _segment_inputs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every segment's input batch."""
        inputs = []
        with self._mode, torch.no_grad(), autocast(self._precision, torch.device("cpu")):
            features = torch.empty(self._batch_shape)
            for segment in self.segments:
                inputs.append((tuple(features.shape), features.dtype))
                features = segment.module(features)
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
        return tuple(split(model, names))
    except ModelError:
        # Its costs are still known, only not piece by piece: the whole model is one segment.
        return (Segment("model", model, tuple(names)),)


def _key(replacements: tuple[Replacement, ...]) -> str:
    return json.dumps([asdict(item) for item in replacements], sort_keys=True)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, shared storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
