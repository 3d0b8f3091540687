"""Whether a block can stand in for a unit, and if not, why, in words for the user."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from rlsearch.errors import suggestion
from rlsearch.replacement.blocks import BLOCKS, BlockKind
from rlsearch.replacement.layers import ComposedLayer
from rlsearch.replacement.projection import num_map_terms
from rlsearch.replacement.single import SingleParts, SingleUnit, single_candidates
from rlsearch.replacement.skip import Skip
from rlsearch.replacement.units import NORMS, Unit

_PLACES = ("preceding", "succeeding")

Shape = tuple[int, ...]


class MadeTensor(NamedTuple):
    """One tensor of a unit that is made.

    Attributes:
        layer: the name in the unit of the layer that it belongs to.
        name: its name in that layer.
        uses: which of the two sources it is made from.
        mapped: whether their channels are mapped first, because they have another shape.
    """

    layer: str
    name: str
    uses: tuple[bool, bool] = (True, True)
    mapped: bool = False

    @property
    def label(self) -> str:
        """Its name in the unit."""
        return _join(self.layer, self.name)


class Fit(NamedTuple):
    """How a block fits a unit.

    Attributes:
        reason: why it does not, beginning with the unit's name; None if it does.
        made: the tensors that it makes.
        kept: the names in the unit of the tensors that stay its own.
        single: what is left of the unit under ``operator: single``; None under ``same``.
    """

    reason: str | None
    made: tuple[MadeTensor, ...] = ()
    kept: tuple[str, ...] = ()
    single: SingleParts | None = None


def fits(
    model: nn.Module,
    units: Sequence[Unit],
    unit_name: str,
    block: str,
    options: Mapping[str, Any] | None = None,
    sources: tuple[str, str] | None = None,
) -> str | None:
    """None if ``block`` can stand in for the unit, else the reason in words. Nothing is run or changed.

    That its sources must keep their own parameters depends on the whole policy; `rlsearch.replacement.plan` checks it.

    Args:
        model: the untouched model.
        units: of that model, from `rlsearch.find_units`.
        unit_name: which of them.
        block: a name in `BLOCKS`.
        options: the block's; defaults stand for those that are not named.
        sources: the units to borrow from, where they are not its neighbours in the chain.
    """
    known = {unit.name: unit for unit in units}
    if unit_name not in known:
        return f"{unit_name}: unknown unit{suggestion(unit_name, known)}"
    if block not in BLOCKS:
        return f"{unit_name}: unknown block {block!r}{suggestion(block, BLOCKS)}"
    problems = BLOCKS[block].option_problems(options or {})
    if problems:
        return f"{unit_name}: {'; '.join(problems)}"
    unit = known[unit_name]
    resolved = BLOCKS[block].resolve(options or {})
    return examine(model, units, unit, BLOCKS[block], resolved, sources or unit.sources).reason


def examine(
    model: nn.Module,
    units: Sequence[Unit],
    unit: Unit,
    kind: BlockKind,
    options: Mapping[str, Any],
    sources: tuple[str, str] | None,
) -> Fit:
    """How ``kind`` with its resolved ``options`` fits ``unit`` if it borrows from ``sources``."""
    if not kind.needs_sources:
        return Fit(_skip_problem(unit))
    if sources is None:
        return Fit(_place_problem(units, unit))
    if options["operator"] == "same":
        return _examine_tensors(model, unit, kind, options, sources, None)
    candidates = single_candidates(model.get_submodule(unit.name), unit)
    if isinstance(candidates, str):
        return Fit(f"{unit.name}: {candidates}")
    found = [_examine_tensors(model, unit, kind, options, sources, parts) for parts in candidates]
    return next((fit for fit in found if fit.reason is None), found[0])


def is_replaced(module: nn.Module) -> bool:
    """Whether a block stands in for the module, or for a part of it."""
    return any(isinstance(part, (Skip, SingleUnit, ComposedLayer)) for part in module.modules())


def _skip_problem(unit: Unit) -> str | None:
    if unit.input_shape is None or unit.output_shape is None:
        return f"{unit.name}: its input or its output is not a single tensor, so that skip cannot stand in for it"
    if unit.input_shape == unit.output_shape:
        return None
    return f"{unit.name}: its input {unit.input_shape} and its output {unit.output_shape} must have one shape for skip"


def _place_problem(units: Sequence[Unit], unit: Unit) -> str:
    alike = [other.name for other in units if (other.chain, other.role) == (unit.chain, unit.role)]
    role = "" if unit.role == "block" else f" for the role {unit.role}"
    place, missing = ("first", "preceding") if alike[0] == unit.name else ("last", "succeeding")
    return f"{unit.name}: is the {place} unit of its chain {unit.chain}{role}: it has no {missing} unit to borrow from"


def _examine_tensors(
    model: nn.Module,
    unit: Unit,
    kind: BlockKind,
    options: Mapping[str, Any],
    sources: tuple[str, str],
    parts: SingleParts | None,
) -> Fit:
    """Which tensors of a unit can be made from its sources, and what stands against it."""
    made: list[MadeTensor] = []
    kept: list[str] = []
    problems: list[str] = []
    misfits: list[str] = []
    module = model.get_submodule(unit.name)
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for layer_name, layer in _layers(module, parts):
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, NORMS) and options["norms"] == "own":
            kept += [_join(layer_name, name) for name in names]
            continue
        if names and isinstance(layer, nn.RNNBase):
            return Fit(
                f"{unit.name}: {layer_name or 'it'} is a {type(layer).__name__}, whose parameters cannot be made"
            )
        for name in names:
            if uses[id(getattr(layer, name))] > 1:
                label = _join(layer_name, name)
                return Fit(f"{unit.name}: {label} is tied to another tensor of the unit, which making it would undo")
            found = _examine_tensor(model, unit.name, sources, layer_name, name, kind, options)
            if isinstance(found, MadeTensor):
                made.append(found)
            else:
                misfits += [found.reason] * found.misfit
                if found.misfit and options["boundary"] == "keep":
                    kept.append(_join(layer_name, name))
                else:
                    problems.append(found.reason)
    if problems:
        remedy = "; use boundary: keep" if made and len(misfits) == len(problems) else ""
        return Fit(f"{unit.name}: {'; '.join(problems)}{remedy}")
    if not made:
        return Fit(f"{unit.name}: {'; '.join(misfits) or 'it has no parameter that could be made from its sources'}")
    return Fit(None, tuple(made), tuple(kept), parts)


class _Problem(NamedTuple):
    """Why a tensor cannot be made; ``misfit`` where it is for its sources' shapes."""

    reason: str
    misfit: bool


def _layers(module: nn.Module, parts: SingleParts | None) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose tensors are asked about, with their names in the unit."""
    if parts is None:
        yield from module.named_modules()
        return
    for name in (parts.layer, parts.norm):
        if name is not None:
            yield name, module.get_submodule(name)


def _examine_tensor(
    model: nn.Module,
    unit: str,
    sources: tuple[str, str],
    layer: str,
    name: str,
    kind: BlockKind,
    options: Mapping[str, Any],
) -> MadeTensor | _Problem:
    """How one tensor is made."""
    own = _shape(model, unit, unit, layer, name)
    assert own is not None  # it was listed
    others = [_shape(model, unit, source, layer, name) for source in sources]
    fitting = [other == own or (kind.maps_channels and _can_be_mapped(other, own)) for other in others]
    label = _join(layer, name)
    if all(fitting):
        return _affordable(MadeTensor(layer, name), own, others, kind, options)
    if options["boundary"] == "one_sided" and any(fitting):
        return _affordable(MadeTensor(layer, name, (fitting[0], fitting[1])), own, others, kind, options)
    if options["boundary"] == "project" and all(_can_be_mapped(other, own) for other in others):
        return _affordable(MadeTensor(layer, name, mapped=True), own, others, kind, options)
    return _Problem(_misfit(label, own, sources, others, fitting), misfit=True)


def _affordable(
    made: MadeTensor, own: Shape, others: Sequence[Shape | None], kind: BlockKind, options: Mapping[str, Any]
) -> MadeTensor | _Problem:
    """The tensor, if less is learned for it than it has itself."""
    used = [other for other, uses in zip(others, made.uses, strict=True) if uses and other is not None]
    if made.mapped and not kind.maps_channels:
        rank_name = "boundary_rank"
        learned = sum(num_map_terms(other, own, options[rank_name]) for other in used if other != own)
    else:
        rank_name = "rank"
        learned = kind.num_learned(own, used, options)
    size = math.prod(own)
    if learned == 0 or learned < size:
        return made
    reason = f"{made.label}: {rank_name} {options[rank_name]} learns {learned} numbers in place of its {size}"
    return _Problem(f"{reason}; use a smaller {rank_name}", misfit=False)


def _misfit(
    label: str, own: Shape, sources: Sequence[str], others: Sequence[Shape | None], fitting: Sequence[bool]
) -> str:
    """In what the sources differ."""
    differing = [
        f"its {place} source {source} has {'none' if other is None else other}"
        for place, source, other, fine in zip(_PLACES, sources, others, fitting, strict=True)
        if not fine
    ]
    return f"{label} is {own}, {' and '.join(differing)}"


def _can_be_mapped(other: Shape | None, own: Shape) -> bool:
    """Whether the two differ in their channels alone."""
    return other is not None and len(other) == len(own) and other[2:] == own[2:]


def _shape(model: nn.Module, unit: str, source: str, layer: str, name: str) -> Shape | None:
    """The shape of a tensor in the unit ``source``; None where that has no such layer of the class that ``unit`` has
    there, or no such tensor in it."""
    try:
        found = model.get_submodule(_join(source, layer))
    except AttributeError:
        return None
    if type(found) is not type(model.get_submodule(_join(unit, layer))):
        return None
    tensor = found._parameters.get(name)
    return None if tensor is None else tuple(tensor.shape)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
