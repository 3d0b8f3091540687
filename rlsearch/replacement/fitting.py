"""Whether a block can stand in for a unit, and if not, why, in words for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from rlsearch.errors import suggestion
from rlsearch.replacement.blocks import BLOCKS, BlockKind
from rlsearch.replacement.layers import COMPOSED, ComposedLayer, Skip
from rlsearch.replacement.units import NORMS, Unit

_PLACES = ("preceding", "succeeding")


class Fit(NamedTuple):
    """How a block fits a unit.

    Attributes:
        reason: why it does not, beginning with the unit's name; None if it does.
        composed: the tensors that it makes, as (name of the layer in the unit, ``weight`` or ``bias``).
        kept: the names in the unit of the tensors that stay its own.
    """

    reason: str | None
    composed: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()


def fits(
    model: nn.Module, units: Sequence[Unit], unit_name: str, block: str, options: Mapping[str, Any] | None = None
) -> str | None:
    """None if ``block`` can stand in for the unit, else the reason in words. Nothing is run or changed.

    That its sources must keep their own parameters depends on the whole policy; `rlsearch.replacement.plan` checks it.

    Args:
        model: the untouched model.
        units: of that model, from `rlsearch.find_units`.
        unit_name: which of them.
        block: a name in `BLOCKS`.
        options: the block's; defaults stand for those that are not named.
    """
    known = {unit.name: unit for unit in units}
    if unit_name not in known:
        return f"{unit_name}: unknown unit{suggestion(unit_name, known)}"
    if block not in BLOCKS:
        return f"{unit_name}: unknown block {block!r}{suggestion(block, BLOCKS)}"
    problems = BLOCKS[block].option_problems(options or {})
    if problems:
        return f"{unit_name}: {'; '.join(problems)}"
    return examine(model, units, known[unit_name], BLOCKS[block], BLOCKS[block].resolve(options or {})).reason


def examine(model: nn.Module, units: Sequence[Unit], unit: Unit, kind: BlockKind, options: Mapping[str, Any]) -> Fit:
    """How ``kind`` with its resolved ``options`` fits ``unit``."""
    reason = _whole_unit_problem(model, units, unit, kind)
    if reason is None and kind.needs_sources:
        return _examine_tensors(model, unit, kind, options)
    return Fit(reason and f"{unit.name}: {reason}")


def is_replaced(module: nn.Module) -> bool:
    """Whether a block stands in for the module, or for a part of it."""
    return any(isinstance(part, (Skip, ComposedLayer)) for part in module.modules())


def _whole_unit_problem(model: nn.Module, units: Sequence[Unit], unit: Unit, kind: BlockKind) -> str | None:
    if not kind.needs_sources:
        if unit.input_shape is None or unit.output_shape is None:
            return f"its input or its output is not a single tensor, so that {kind.name} cannot stand in for it"
        if unit.input_shape != unit.output_shape:
            return (
                f"its input {unit.input_shape} and its output {unit.output_shape} must have one shape for {kind.name}"
            )
        return None
    if unit.sources is None:
        first = next(other for other in units if other.chain == unit.chain) == unit
        place, missing = ("first", "preceding") if first else ("last", "succeeding")
        return f"is the {place} unit of its chain {unit.chain}: it has no {missing} unit to borrow from"
    return None


def _examine_tensors(model: nn.Module, unit: Unit, kind: BlockKind, options: Mapping[str, Any]) -> Fit:
    """Which tensors of a unit can be made from its sources, and what stands against it."""
    composed: list[tuple[str, str]] = []
    kept: list[str] = []
    misfits: list[str] = []
    module = model.get_submodule(unit.name)
    for layer_name, layer in module.named_modules():
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, NORMS):
            kept += [_join(layer_name, name) for name in names]
            continue
        if names and type(layer) not in COMPOSED:
            return Fit(f"{unit.name}: {_unknown_layer(layer_name, layer, names, kind)}")
        for name in names:
            misfit = _misfit(model, unit, layer_name, name)
            problem = kind.tensor_problem(getattr(layer, name).shape, options)
            if misfit is None and problem:
                return Fit(f"{unit.name}: {_join(layer_name, name)}: {problem}")
            if misfit is None:
                composed.append((layer_name, name))
            else:
                misfits.append(misfit)
                kept.append(_join(layer_name, name))
    if misfits and options["boundary"] == "strict":
        remedy = "; use boundary: keep" if composed else ""
        return Fit(f"{unit.name}: {'; '.join(misfits)}{remedy}")
    if not composed:
        return Fit(
            f"{unit.name}: {'; '.join(misfits) or 'it has no nn.Conv2d or nn.Linear whose tensors could be made'}"
        )
    return Fit(None, tuple(composed), tuple(kept))


def _misfit(model: nn.Module, unit: Unit, layer_name: str, name: str) -> str | None:
    """Why a tensor cannot be made from the tensors of its name in the sources, or None."""
    assert unit.sources is not None  # checked before any tensor is looked at
    own = _find(model, unit.name, layer_name, name)
    for place, source in zip(_PLACES, unit.sources, strict=True):
        other = _find(model, source, layer_name, name)
        label = _join(layer_name, name)
        if other is None:
            return f"{label} is {own}, its {place} source {source} has none"
        if other != own:
            return f"{label} is {own}, its {place} source {source} has {other}"
    return None


def _find(model: nn.Module, unit: str, layer_name: str, name: str) -> tuple[int, ...] | None:
    """The shape of a plain layer's own tensor, or None where there is none."""
    try:
        layer = model.get_submodule(_join(unit, layer_name))
    except AttributeError:
        return None
    tensor = layer._parameters.get(name) if type(layer) in COMPOSED else None
    return None if tensor is None else tuple(tensor.shape)


def _unknown_layer(layer_name: str, layer: nn.Module, names: Sequence[str], kind: BlockKind) -> str:
    place = layer_name or "it"
    return (
        f"{place} is a {type(layer).__name__} with parameters of its own ({', '.join(names)}), and {kind.name} can "
        "make those of nn.Conv2d and nn.Linear only (norms keep theirs); use skip, or leave the unit as it is"
    )


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
