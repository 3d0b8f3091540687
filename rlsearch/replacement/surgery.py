"""Putting a policy's blocks into a model: everything is checked first, then changed, and what was changed is told."""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlsearch.errors import SurgeryError, suggestion
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement.blocks import BLOCKS
from rlsearch.replacement.clock import install_clock, remove_clock
from rlsearch.replacement.fitting import Fit, examine, is_replaced
from rlsearch.replacement.layers import ComposedLayer, Made, become_composed, become_plain, mixing_modules
from rlsearch.replacement.mixings import Target
from rlsearch.replacement.single import build_single
from rlsearch.replacement.skip import Skip
from rlsearch.replacement.sources import overlaps, sources_of
from rlsearch.replacement.units import Unit, count_elements, find_units


@dataclass(frozen=True)
class PlannedUnit:
    """One replacement that can be made.

    Attributes:
        unit: what is replaced.
        block: by what.
        options: all of the block's options, none of them left to be decided.
        sources: the units that it borrows from; None for a block that borrows nothing.
        fit: which tensors are made, and which stay.
    """

    unit: Unit
    block: str
    options: Mapping[str, Any]
    sources: tuple[str, str] | None
    fit: Fit


@dataclass(frozen=True)
class SurgeryPlan:
    """The replacements of a policy, all of them possible, in forward order.

    Attributes:
        replacements: one a unit.
        units: the names of all units of the model, in forward order; empty for a policy that replaces nothing.
    """

    replacements: tuple[PlannedUnit, ...]
    units: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplacedUnit:
    """What became of one unit.

    Attributes:
        unit: its name.
        block: what stands in for it.
        params_before: learnable parameters that it had.
        params_after: learnable parameters that it has now, those of the block included.
        sources: the units that it borrows from, if any.
        composed: the names in the unit of the tensors that are made from its sources.
        kept: the names in the unit of the tensors that stay its own.
    """

    unit: str
    block: str
    params_before: int
    params_after: int
    sources: tuple[str, str] | None
    composed: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class SurgeryReport:
    """What `apply_policy` changed.

    Attributes:
        replaced: the replaced units, in forward order; empty for a policy that replaces nothing.
        params_before: learnable parameters of the model, before.
        params_after: the same, after.
        units: the names of all units that the model had, in forward order; empty for a policy that replaces nothing.
    """

    replaced: tuple[ReplacedUnit, ...]
    params_before: int
    params_after: int
    units: tuple[str, ...] = ()


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
    return plan_untouched(model, policy, find_units(model, example_input) if units is None else units)


def plan_untouched(
    model: nn.Module, policy: Policy, units: Sequence[Unit], known: dict[Hashable, PlannedUnit] | None = None
) -> SurgeryPlan:
    """As `plan`, for a model that is known to be untouched: what is said of its policies one after the other then takes
    no walk through all of it.

    Args:
        model: an untouched model.
        policy: as in `plan`.
        units: of the model.
        known: replacements that were planned for this model before; new ones are added. Equal ones are then the same
            object, and take no second look at the model.

    Raises:
        SurgeryError: as `plan`.
    """
    known = {} if known is None else known
    planned: list[PlannedUnit] = []
    by_name = {unit.name: unit for unit in units}
    problems = _policy_problems(policy)
    replaced = {item.unit for item in policy.replacements}
    for item in policy.replacements:
        found = _plan_unit(model, by_name, item, replaced, known)
        if isinstance(found, PlannedUnit):
            planned.append(found)
        else:
            problems += found
    if problems:
        raise SurgeryError(_message(policy, problems))
    position = {name: index for index, name in enumerate(by_name)}
    return SurgeryPlan(tuple(sorted(planned, key=lambda item: position[item.unit.name])), tuple(position))


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
    found = plan(model, policy, units, example_input)
    before = learnable_params(model)
    replaced = []
    for step, module in [(step, build_unit(model, step)) for step in found.replacements]:
        name = step.unit.name
        record = ReplacedUnit(
            unit=name,
            block=step.block,
            params_before=learnable_params(model.get_submodule(name)),
            params_after=learnable_params(module),
            sources=step.sources,
            composed=tuple(tensor.label for tensor in step.fit.made),
            kept=step.fit.kept,
        )
        model.set_submodule(name, module)
        replaced.append(record)
    return SurgeryReport(tuple(replaced), before, learnable_params(model), found.units)


def materialize(model: nn.Module) -> nn.Module:
    """A copy of the model as a plain module tree: made tensors are ordinary parameters, skipped units ``nn.Identity``.

    Its outputs are those of ``model``. Where every block has the structure of its unit (``operator: same``, no skip),
    it is of the untouched architecture, and its ``state_dict`` loads there; else it is a smaller one.
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        remove_clock(module)
        if isinstance(module, ComposedLayer):
            become_plain(module)
        elif isinstance(module, Skip) and not module.returns_pair:
            plain.set_submodule(name, nn.Identity().train(module.training))
    return plain


def learnable_params(model: nn.Module) -> int:
    """Parameters that take a gradient, each part of a storage once."""
    return count_elements([parameter for parameter in model.parameters() if parameter.requires_grad])


def total_params(model: nn.Module) -> int:
    """Parameters of the materialised model, each part of a storage once; what blocks learn is not among them."""
    learned_by_blocks = mixing_modules(model)
    parts = [part for part in model.modules() if part not in learned_by_blocks]
    own = [parameter for part in parts for parameter in part.parameters(recurse=False)]
    return count_elements(own) + sum(part.num_composed for part in parts if isinstance(part, ComposedLayer))


def _plan_unit(
    model: nn.Module,
    units: Mapping[str, Unit],
    item: Replacement,
    replaced: Collection[str],
    known: dict[Hashable, PlannedUnit],
) -> PlannedUnit | list[str]:
    """One replacement, or what stands against it."""
    problems = []
    if item.unit not in units:
        problems.append(f"{item.unit}: unknown unit{suggestion(item.unit, units)}")
    if item.block not in BLOCKS:
        problems.append(f"{item.unit}: unknown block {item.block!r}{suggestion(item.block, BLOCKS)}")
        return problems
    kind = BLOCKS[item.block]
    problems += [f"{item.unit}: {problem}" for problem in kind.option_problems(item.options)]
    if problems:
        return problems
    unit, options = units[item.unit], kind.resolve(item.options)
    every = tuple(units.values())
    sources = sources_of(every, unit, options["sources"], replaced) if kind.needs_sources else None
    if sources is None and unit.sources is not None and kind.needs_sources:
        return [f"{unit.name}: on one side no unit of its chain owns its parameters; replace fewer of {unit.chain}"]
    problems = _source_problems(unit, sources or (), replaced)
    key = unit.name, item.block, tuple(sorted(options.items())), sources
    if not problems and key in known:
        return known[key]
    options = _decided(model, options)
    fit = examine(model, every, unit, kind, options, sources)
    problems += [fit.reason] if fit.reason else []
    if problems:
        return problems
    known[key] = PlannedUnit(unit, item.block, options, sources, fit)
    return known[key]


def _decided(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with ``init: auto`` decided: behind a batch norm the scale of a weight plays no part, elsewhere the
    variance of what it makes should stay."""
    if options.get("init") == "auto":
        has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        options["init"] = "half" if has_batch_norm else "rms"
    return options


def _source_problems(unit: Unit, sources: Sequence[str], replaced: Collection[str]) -> list[str]:
    """Sources that do not own their parameters."""
    return [
        f"{unit.name}: borrows from {source}, which is itself replaced{_in(source, other)}; replace one of the two, "
        "or use sources: nearest"
        for source in sources
        for other in sorted(replaced)
        if overlaps(source, other)
    ]


def _in(source: str, replaced: str) -> str:
    if source == replaced:
        return ""
    return f" in part ({replaced})" if replaced.startswith(source) else f" as a part of {replaced}"


def _policy_problems(policy: Policy) -> list[str]:
    """Units named twice, and units that are parts of others."""
    problems = []
    names: list[str] = []
    for item in policy.replacements:
        if item.unit in names:
            problems.append(f"{item.unit}: is replaced twice; keep one of the two")
        problems += [
            f"{max(item.unit, other, key=len)}: is a part of {min(item.unit, other, key=len)}, which is replaced too; "
            "keep one of the two"
            for other in names
            if other != item.unit and overlaps(item.unit, other)
        ]
        names.append(item.unit)
    return problems


def _message(policy: Policy, problems: Sequence[str]) -> str:
    made_for = f" (made for model {policy.model.name!r})" if policy.model is not None else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"policy{made_for}: {count}", *(f"  - {problem}" for problem in problems)])


def build_unit(model: nn.Module, step: PlannedUnit) -> nn.Module:
    """The module that stands in for a unit; the model is left as it is, and shares with it the tensors that stay."""
    original = model.get_submodule(step.unit.name)
    if step.sources is None:
        return Skip(isinstance(original, nn.MultiheadAttention)).train(original.training)
    sources = [model.get_submodule(source) for source in step.sources]
    targets = _targets(original, sources, step.fit)
    mixings, clock = BLOCKS[step.block].make(targets, step.options)
    # The copy shares its tensors with the original: those that it keeps are the same parameters as before.
    tensors = [*original.parameters(), *original.buffers()]
    unit = copy.deepcopy(original, {id(tensor): tensor for tensor in tensors})
    by_layer: dict[str, dict[str, Made]] = {}
    for tensor, target, mixing in zip(step.fit.made, targets, mixings, strict=True):
        by_layer.setdefault(tensor.layer, {})[tensor.name] = Made(mixing, tensor.uses, target.own.numel())
    for layer_name, made in by_layer.items():
        previous, succeeding = (source.get_submodule(layer_name) for source in sources)
        become_composed(unit.get_submodule(layer_name), (previous, succeeding), made)
    if step.fit.single is not None:
        unit = build_single(unit, step.fit.single)
    if clock is not None:
        install_clock(unit, clock)
    return unit


def _targets(unit: nn.Module, sources: Sequence[nn.Module], fit: Fit) -> list[Target]:
    """The tensors that are to be made, with what the unit and its sources have there."""
    targets = []
    for layer, name, uses, mapped in fit.made:
        own = getattr(unit.get_submodule(layer), name).detach()
        previous, succeeding = (
            getattr(source.get_submodule(layer), name).detach() if used else None
            for source, used in zip(sources, uses, strict=True)
        )
        targets.append(Target(layer, name, own, previous, succeeding, mapped))
    return targets
