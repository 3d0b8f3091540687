"""The segments of a model, each measured once for all that are alike, with any units of it replaced."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.model_graph import Segment, fake_copy, outermost, split
from rlsearch.policy import Policy
from rlsearch.replacement import PlannedUnit, Unit, find_units, plan
from rlsearch.replacement.fitting import is_replaced
from rlsearch.replacement.surgery import build_unit, plan_untouched
from rlsearch.training.kinds import Kinds
from rlsearch.training.loop import autocast
from rlsearch.training.segment_cost import SegmentCost, measure, measure_inference
from rlsearch.training.sizes import SharedStorage, Sizes
from rlsearch.training.storages import block_bytes


class MeasuredSegments:
    """What the segments of a model cost for one batch, whatever a policy puts into them.

    Args:
        model: an untouched model; it is neither changed nor run.
        batch_shape: (B, C, H, W) of the images of a step.
        precision: ``fp32`` or ``bf16``.

    Attributes:
        model: a copy of the model on fake tensors.
        units: the model's units, in forward order.
        segments: the model's segments; one alone where its forward pass cannot be traced.
        dense: the sizes of the untouched model.

    Raises:
        ModelError: the model cannot be run at that input shape, gives no logits, or has no unit.
    """

    def __init__(self, model: nn.Module, batch_shape: Sequence[int], precision: str) -> None:
        self._precision = precision
        self._mode, self.model = fake_copy(model)
        self.model.train()
        self._is_replaced = is_replaced(self.model)
        # Two images: a batch norm in training mode refuses one value a channel.
        with self._mode:
            example = torch.empty(2, *batch_shape[1:])
        self.units: tuple[Unit, ...] = tuple(find_units(self.model, example))
        self._holders = outermost([unit.name for unit in self.units])
        self.segments: tuple[Segment, ...] = _segments(self.model, list(dict.fromkeys(self._holders.values())))
        self._segment_of = {name: index for index, segment in enumerate(self.segments) for name in segment.units}
        self._inputs = self._segment_inputs(batch_shape)
        self.dense = Sizes.of(self.model)
        self._segment_sizes = [Sizes.of(segment.module) for segment in self.segments]
        self._shared = SharedStorage(self.model)
        self._tensors = [*self.model.parameters(), *self.model.buffers()]
        self._kinds = Kinds(self.model, self.units)
        self._segment_kinds = [
            self._kinds.of_segment(segment.module, inputs)
            for segment, inputs in zip(self.segments, self._inputs, strict=False)
        ]
        # Filled as policies ask for them.
        self._costs: dict[Hashable, SegmentCost] = {}
        self._in_place: dict[Hashable, SegmentCost] = {}
        self._planned: dict[Hashable, PlannedUnit] = {}
        self._sharing: dict[str, bool] = {}
        self._changes: dict[int, Sizes] = {}
        self._differences: dict[Hashable, Sizes] = {}

    def plan(self, policy: Policy) -> tuple[PlannedUnit, ...]:
        """The policy's replacements in forward order, each with the sources that it borrows from.

        Raises:
            SurgeryError: the policy cannot be applied to this model.
        """
        if self._is_replaced:
            return plan(self.model, policy, self.units).replacements
        return plan_untouched(self.model, policy, self.units, self._planned).replacements

    def sizes(self, steps: Sequence[PlannedUnit]) -> Sizes:
        """The sizes of the model with the planned units in it."""
        if any(self._shares(step.unit.name) for step in steps):
            with self._placed(steps):
                return Sizes.of(self.model)
        return sum((self._difference(step) for step in steps), self.dense)

    def input_bytes(self, index: int) -> int:
        """Bytes of a segment's input."""
        shape, _, dtype = self._inputs[index]
        return block_bytes(math.prod(shape) * dtype.itemsize)

    def training(self, steps: Sequence[PlannedUnit], cut: int = 0) -> list[SegmentCost]:
        """What the segments from ``cut`` on cost a step with the planned units in them, and behind them the loss.

        Those before ``cut`` do not learn: the first behind it has no use for the gradient of its input (it may come
        after units that are left out).
        """
        by_segment = self._by_segment(steps)
        costs: list[SegmentCost] = []
        for index in range(cut, len(self.segments)):
            costs.append(self._cost_in_place(index, cut, by_segment.get(index, ()), bool(costs) and costs[-1].learns))
        for place, names in _early(costs).items():
            needs = place > 0 and costs[place - 1].learns
            costs[place] = self._cost_in_place(place + cut, cut, by_segment.get(place + cut, ()), needs, tuple(names))
        return [*costs, self._loss_cost(costs[-1].learns)]

    def _cost_in_place(
        self,
        index: int,
        cut: int,
        steps: Sequence[PlannedUnit],
        needs_input_gradient: bool,
        early: tuple[str, ...] = (),
    ) -> SegmentCost:
        """A segment's cost with what depends on which segment it is; see `training`."""
        # Steps are the same objects wherever they are equal: their ids say it all, and quickly.
        key = index, cut, tuple(map(id, steps)), needs_input_gradient, early
        if key not in self._in_place:
            cost = self._training_cost(index, steps, needs_input_gradient, early)
            own = sum((self._difference(step) for step in steps), self._segment_sizes[index])
            borrowed = {self._place(steps, name, cut): size for name, size in cost.borrowed_gradients.items()}
            self._in_place[key] = replace(cost, own_gradients=own.learnable_bytes, borrowed_gradients=borrowed)
        return self._in_place[key]

    def segment_sizes(self, steps: Sequence[PlannedUnit]) -> list[Sizes]:
        """The sizes of each segment by itself, with the planned units in it."""
        by_segment = self._by_segment(steps)
        return [
            sum((self._difference(step) for step in by_segment.get(index, ())), sizes)
            for index, sizes in enumerate(self._segment_sizes)
        ]

    def inference(self, steps: Sequence[PlannedUnit], end: int) -> list[SegmentCost]:
        """What the segments before ``end`` hold when they run without learning."""
        by_segment = self._by_segment(steps)
        return [self._inference_cost(index, by_segment.get(index, ())) for index in range(end)]

    def _by_segment(self, steps: Sequence[PlannedUnit]) -> dict[int, list[PlannedUnit]]:
        """The planned units, which are in forward order, by the segment that they are in."""
        found: dict[int, list[PlannedUnit]] = {}
        for step in steps:
            found.setdefault(self._segment_of[self._holders[step.unit.name]], []).append(step)
        return found

    def _key(self, index: int, steps: Sequence[PlannedUnit], setting: Hashable) -> Hashable:
        """Equal for all segments and units that are alike."""
        places = []
        for step in steps:
            holder = self._holders[step.unit.name]
            # Where a unit is in its segment, whatever the names there.
            place = self.segments[index].units.index(holder), step.unit.name.removeprefix(holder)
            places.append((place, self._kinds.of_measurement(step)))
        return self._segment_kinds[index], tuple(places), setting

    def _relative(self, index: int, steps: Sequence[PlannedUnit], name: str) -> Hashable:
        """Where a parameter is that a segment learns, its own or a borrowed one, whatever the names there."""
        places = [(place, unit) for place, unit in enumerate(self.segments[index].units)]
        places += [(-1 - number, source) for number, step in enumerate(steps) for source in (step.sources or ())[:1]]
        return next((place, name.removeprefix(unit)) for place, unit in places if name.startswith(f"{unit}."))

    def _training_cost(
        self, index: int, steps: Sequence[PlannedUnit], needs_input_gradient: bool, early: Sequence[str] = ()
    ) -> SegmentCost:
        """Where the parameters named ``early`` have a gradient when the backward pass comes to their segment."""
        names = [self._relative(index, steps, name) for name in early]
        key = self._key(index, steps, (needs_input_gradient, *names))
        if key not in self._costs:
            module = self.segments[index].module
            with self._placed(steps, module) as known, self._mode:
                self._costs[key] = measure(
                    module,
                    self._empty(index, needs_input_gradient),
                    precision=self._precision,
                    known=known,
                    borrowed=self._borrowed(steps),
                    learned_before=self._succeeding(steps),
                    early=[self.model.get_parameter(name) for name in early],
                )
        return self._costs[key]

    def _inference_cost(self, index: int, steps: Sequence[PlannedUnit]) -> SegmentCost:
        key = self._key(index, steps, "inference")
        if key not in self._costs:
            module = self.segments[index].module
            with self._placed(steps, module) as known, self._mode:
                self._costs[key] = measure_inference(module, self._empty(index), precision=self._precision, known=known)
        return self._costs[key]

    def _loss_cost(self, learns: bool) -> SegmentCost:
        key = ("loss", learns)
        if key not in self._costs:
            with self._mode:
                logits = self._empty(len(self.segments), learns)
                labels = torch.zeros(len(logits), dtype=torch.int64)
                self._costs[key] = measure(
                    _Loss(labels), logits, precision=self._precision, known=[labels], borrowed={}
                )
        return self._costs[key]

    def _empty(self, index: int, requires_grad: bool = False) -> Tensor:
        """An input of a segment."""
        shape, stride, dtype = self._inputs[index]
        return torch.empty_strided(shape, stride, dtype=dtype, requires_grad=requires_grad)

    def _borrowed(self, steps: Sequence[PlannedUnit]) -> dict[tuple[int, str], Tensor]:
        """The parameters of the preceding sources, by the number of the step and their name in the source."""
        return {
            (number, name): parameter
            for number, step in enumerate(steps)
            for source in (step.sources or ())[:1]
            for name, parameter in self.model.get_submodule(source).named_parameters()
        }

    def _succeeding(self, steps: Sequence[PlannedUnit]) -> list[Tensor]:
        """The parameters of the succeeding sources: their own segment's backward pass came before."""
        sources = [source for step in steps for source in (step.sources or ())[1:]]
        return [parameter for source in sources for parameter in self.model.get_submodule(source).parameters()]

    def _place(self, steps: Sequence[PlannedUnit], name: tuple[int, str], cut: int) -> tuple[int, str]:
        """From a name of `_borrowed` the place of the parameter's segment behind the cut, and its name in the model."""
        number, inner = name
        sources = steps[number].sources
        assert sources is not None  # it borrows
        return self._segment_of[self._holders[sources[0]]] - cut, f"{sources[0]}.{inner}"

    def _shares(self, unit: str) -> bool:
        """Whether a tensor of a unit is held outside of it too."""
        if unit not in self._sharing:
            self._sharing[unit] = self._shared.has(self.model.get_submodule(unit))
        return self._sharing[unit]

    def _difference(self, step: PlannedUnit) -> Sizes:
        """What a planned unit changes in the model's sizes, by itself."""
        if id(step) in self._changes:
            return self._changes[id(step)]
        key = self._kinds.of_step(step)
        if key not in self._differences:
            with self._placed([step]):
                pass  # that is where it is noted
        self._changes[id(step)] = self._differences[key]
        return self._differences[key]

    @contextmanager
    def _placed(self, steps: Sequence[PlannedUnit], segment: nn.Module | None = None) -> Iterator[list[Tensor]]:
        """Puts what stands in for the planned units into the model and into a segment of it, and the units back.

        Yields:
            the parameters and buffers of the model and of what was put in.
        """
        with self._mode:
            built = [_build(self.model, step) for step in steps]
        names = [step.unit.name for step in steps]
        originals = [self.model.get_submodule(name) for name in names]
        for step, module, original in zip(steps, built, originals, strict=True):
            # What is built has to be looked at once: for what it measures, and for what it holds.
            key = self._kinds.of_step(step)
            if key not in self._differences:
                self._differences[key] = Sizes.of(module) - Sizes.of(original)
        roots = [self.model] if segment is None else [self.model, segment]
        try:
            _set_submodules(roots, names, built)
            yield [*self._tensors, *(t for module in built for t in [*module.parameters(), *module.buffers()])]
        finally:
            _set_submodules(roots, names, originals)

    def _segment_inputs(self, batch_shape: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
        """Shape, strides and type of every segment's input batch, and of the logits."""
        inputs = []
        with self._mode, torch.no_grad(), autocast(self._precision, torch.device("cpu")):
            features = torch.empty(tuple(batch_shape))
            for segment in self.segments:
                inputs.append((tuple(features.shape), features.stride(), features.dtype))
                features = segment.module(features)
        if not isinstance(features, Tensor) or features.dim() != 2:
            given = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ModelError(f"{type(self.model).__name__} must give logits (images, classes), it gives {given}")
        return [*inputs, (tuple(features.shape), features.stride(), features.dtype)]


def _early(costs: Sequence[SegmentCost]) -> dict[int, list[str]]:
    """By the place of a segment the parameters that it learns, its own or borrowed ones, whose gradient was begun in
    the backward pass of a later one: its own part is added to that."""
    found: dict[int, list[str]] = {}
    begun: set[tuple[int, str]] = set()
    for place in reversed(range(len(costs))):
        borrowed = {name for name in costs[place].borrowed_gradients if 0 <= name[0] < place}
        found[place] = sorted(name for owner, name in begun if owner == place or (owner, name) in borrowed)
        begun |= borrowed
    return {place: names for place, names in found.items() if names}


class _Loss(nn.Module):
    """What follows the model in a training step."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self._labels = labels

    def forward(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self._labels)


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
