"""Putting a policy's blocks into a model: everything is checked first, then changed, and what was changed is told."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlsearch.errors import SurgeryError, suggestion
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement.blocks import BLOCKS, Target
from rlsearch.replacement.fitting import Fit, examine, is_replaced
from rlsearch.replacement.layers import ComposedLayer, Skip, become_composed, become_plain
from rlsearch.replacement.mixings import Mixing
from rlsearch.replacement.units import Unit, count_elements, find_units


@dataclass(frozen=True)
class PlannedUnit:
    """One replacement that can be made.

    Attributes:
        unit: what is replaced.
        block: by what.
        options: all of the block's options.
        fit: which tensors are made, and which stay.
    """

    unit: Unit
    block: str
    options: Mapping[str, Any]
    fit: Fit


@dataclass(frozen=True)
class SurgeryPlan:
    """The replacements of a policy, all of them possible, in forward order."""

    replacements: tuple[PlannedUnit, ...]


@dataclass(frozen=True)
class ReplacedUnit:
    """What became of one unit.

    Attributes:
        unit: its name.
        block: what stands in for it.
        params_before: learnable parameters that it had.
        params_after: learnable parameters that it has now, those of the block included.
        composed: the names in the unit of the tensors that are made from its sources.
        kept: the names in the unit of the tensors that stay its own.
    """

    unit: str
    block: str
    params_before: int
    params_after: int
    composed: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class SurgeryReport:
    """What `apply_policy` changed.

    Attributes:
        replaced: the replaced units, in forward order; empty for a policy that replaces nothing.
        params_before: learnable parameters of the model, before.
        params_after: the same, after.
    """

    replaced: tuple[ReplacedUnit, ...]
    params_before: int
    params_after: int


def plan(
    model: nn.Module, policy: Policy, units: Sequence[Unit] | None = None, example_input: Tensor | None = None
) -> SurgeryPlan:
    """Checks a policy against a model, changing neither.

    Args:
        model: an untouched model.
        policy: what is to be replaced by what; its Learn&Drop settings play no part.
        units: of the model, where they are at hand; else they are found.
        example_input: for finding them, see `rlsearch.find_units`.

    Raises:
        SurgeryError: replacements that cannot be made, all of them at once, each with its reason.
        ModelError: the units of the model cannot be found.
    """
    if not policy.replacements:
        return SurgeryPlan(())
    if is_replaced(model):
        raise SurgeryError(
            f"{type(model).__name__} has replaced units already; apply the whole policy to a newly built model"
        )
    units = find_units(model, example_input) if units is None else units
    planned: list[PlannedUnit] = []
    problems = _source_problems(policy, units)
    for item in policy.replacements:
        found = _plan_unit(model, units, item)
        if isinstance(found, PlannedUnit):
            planned.append(found)
        else:
            problems += found
    if problems:
        raise SurgeryError(_message(policy, problems))
    position = {unit.name: index for index, unit in enumerate(units)}
    return SurgeryPlan(tuple(sorted(planned, key=lambda item: position[item.unit.name])))


def apply_policy(
    model: nn.Module,
    policy: Policy,
    example_input: Tensor | None = None,
    *,
    units: Sequence[Unit] | None = None,
) -> SurgeryReport:
    """Puts the blocks of a policy into a model, in place. Everything is checked before anything is changed.

    A replaced unit's module is a new one, so that the old one stays whole for whoever holds it; what the unit keeps
    (norm layers, tensors that do not fit) are the same tensors. Build optimizers afterwards.

    Args:
        model: an untouched model, on any device.
        policy: what is replaced by what.
        example_input: for finding the units, see `rlsearch.find_units`.
        units: of the model, where they are at hand.

    Raises:
        SurgeryError: replacements that cannot be made, all of them at once; the model is as it was.
        ModelError: the units of the model cannot be found.
    """
    steps = plan(model, policy, units, example_input).replacements
    before = learnable_params(model)
    replaced = []
    for step, module in [(step, _build(model, step)) for step in steps]:
        name = step.unit.name
        record = ReplacedUnit(
            unit=name,
            block=step.block,
            params_before=learnable_params(model.get_submodule(name)),
            params_after=learnable_params(module),
            composed=tuple(f"{layer}.{tensor}" if layer else tensor for layer, tensor in step.fit.composed),
            kept=step.fit.kept,
        )
        model.set_submodule(name, module)
        replaced.append(record)
    return SurgeryReport(tuple(replaced), before, learnable_params(model))


def materialize(model: nn.Module) -> nn.Module:
    """A copy of the model as a plain module tree: made tensors are ordinary parameters, skipped units ``nn.Identity``.

    Its outputs are those of ``model``, and its ``state_dict`` has no key that the untouched model does not have.
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, ComposedLayer):
            become_plain(module)
        elif isinstance(module, Skip):
            plain.set_submodule(name, nn.Identity().train(module.training))
    return plain


def learnable_params(model: nn.Module) -> int:
    """Parameters that take a gradient, each part of a storage once."""
    return count_elements([parameter for parameter in model.parameters() if parameter.requires_grad])


def total_params(model: nn.Module) -> int:
    """Parameters of the materialised model, each part of a storage once; what blocks learn is not among them."""
    parts = [part for part in model.modules() if not isinstance(part, Mixing)]
    own = [parameter for part in parts for parameter in part.parameters(recurse=False)]
    return count_elements(own) + sum(part.num_composed for part in parts if isinstance(part, ComposedLayer))


def _plan_unit(model: nn.Module, units: Sequence[Unit], item: Replacement) -> PlannedUnit | list[str]:
    """One replacement, or what stands against it."""
    known = {unit.name: unit for unit in units}
    problems = []
    if item.unit not in known:
        problems.append(f"{item.unit}: unknown unit{suggestion(item.unit, known)}")
    if item.block not in BLOCKS:
        problems.append(f"{item.unit}: unknown block {item.block!r}{suggestion(item.block, BLOCKS)}")
        return problems
    kind = BLOCKS[item.block]
    problems += [f"{item.unit}: {problem}" for problem in kind.option_problems(item.options)]
    if problems:
        return problems
    options = kind.resolve(item.options)
    fit = examine(model, units, known[item.unit], kind, options)
    return [fit.reason] if fit.reason else PlannedUnit(known[item.unit], item.block, options, fit)


def _source_problems(policy: Policy, units: Sequence[Unit]) -> list[str]:
    """Units named twice, and units that would borrow from a unit that owns no parameters itself."""
    known = {unit.name: unit for unit in units}
    blocks: dict[str, str] = {}
    problems = []
    for item in policy.replacements:
        if item.unit in blocks:
            problems.append(f"{item.unit}: is replaced twice; keep one of the two")
        blocks[item.unit] = item.block
    for name, block in blocks.items():
        unit = known.get(name)
        if unit is None or unit.sources is None or block not in BLOCKS or not BLOCKS[block].needs_sources:
            continue
        problems += [
            f"{name}: borrows from {source}, which is itself replaced (by {blocks[source]}); replace one of the two"
            for source in unit.sources
            if source in blocks
        ]
    return problems


def _message(policy: Policy, problems: Sequence[str]) -> str:
    made_for = f" (made for model {policy.model.name!r})" if policy.model is not None else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"policy{made_for}: {count}", *(f"  - {problem}" for problem in problems)])


def _build(model: nn.Module, step: PlannedUnit) -> nn.Module:
    """The module that stands in for a unit."""
    original = model.get_submodule(step.unit.name)
    kind = BLOCKS[step.block]
    if kind.make is None:
        return Skip().train(original.training)
    assert step.unit.sources is not None  # the plan has checked that
    sources = [model.get_submodule(source) for source in step.unit.sources]
    mixings = dict(zip(step.fit.composed, kind.make(_targets(original, sources, step.fit), step.options), strict=True))
    # The copy shares its tensors with the original: those that it keeps are the same parameters as before.
    tensors = [*original.parameters(), *original.buffers()]
    unit = copy.deepcopy(original, {id(tensor): tensor for tensor in tensors})
    registered: set[nn.Module] = set()
    for layer_name in dict.fromkeys(layer for layer, _ in step.fit.composed):
        previous, succeeding = (source.get_submodule(layer_name) for source in sources)
        made = {tensor: mixing for (layer, tensor), mixing in mixings.items() if layer == layer_name}
        become_composed(unit.get_submodule(layer_name), (previous, succeeding), made, registered)
    return unit


def _targets(unit: nn.Module, sources: Sequence[nn.Module], fit: Fit) -> list[Target]:
    """The tensors that are to be made, with what the unit and its sources have there."""
    places = (unit, *sources)
    return [
        Target(*(getattr(place.get_submodule(layer), tensor).detach() for place in places))
        for layer, tensor in fit.composed
    ]
