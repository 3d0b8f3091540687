"""The valid replacements that are least of what adds up over replaced units: exact, by dynamic programming.

Parameters add up so: what a unit's stand-in has follows from the unit, the variant and the two units that it borrows
from, and `rlsearch.search.unit_group` says which of them go together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rlsearch.model_graph import fake_copy
from rlsearch.replacement import BLOCKS, PlannedUnit, Unit
from rlsearch.replacement.fitting import examine
from rlsearch.replacement.signature import module_signature
from rlsearch.replacement.surgery import build_unit
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.unit_group import Gap, UnitGroup
from rlsearch.search.variants import Variant
from rlsearch.training.sizes import SharedStorage, Sizes

Price = Callable[[str, str, tuple[str, str] | None], float]
"""What replacing a unit, by name, adds: with this variant, by name, and these sources where it borrows."""


@dataclass(frozen=True)
class Choice:
    """Replacements, and what they add up to.

    Attributes:
        value: the sum of their prices.
        blocks: the name of a variant by that of its unit.
    """

    value: float
    blocks: Mapping[str, str]

    def __add__(self, other: Choice) -> Choice:
        return Choice(self.value + other.value, {**self.blocks, **other.blocks})


_NOTHING = Choice(0.0, {})
_Choices = list[Choice | None]
"""The cheapest choice by how many units it replaces; None where there is none of so many."""


def cheapest(policies: PolicySpace, price: Price) -> Choice:
    """The cheapest of all sets of replacements that the space offers; of equal ones that which replaces least."""
    found: _Choices = [_NOTHING]
    for group in policies.groups:
        found = _joined(found, _cheapest_of(group, policies.max_replaced, price), policies.max_replaced)
    return min((choice for choice in found if choice is not None), key=lambda choice: choice.value)


def _cheapest_of(group: UnitGroup, most: int, price: Price) -> _Choices:
    """Over the owners from front to back, as `UnitGroup.ways` counts."""
    reached: dict[int, _Choices] = {-1: [_NOTHING]}
    last = -1
    for gap in group.gaps(most):
        between: _Choices = [*[None] * len(gap.variants), _cheapest_between(gap, group, price)]
        reached[gap.behind] = _lower(reached.get(gap.behind, []), _joined(reached[gap.before], between, most))
        last = gap.behind
    return reached[last]


def _cheapest_between(gap: Gap, group: UnitGroup, price: Price) -> Choice:
    """Within a gap every unit chooses for itself."""
    total = _NOTHING
    for unit, variants in gap.variants.items():
        prices = {name: price(unit, name, gap.sources if group.borrows(name) else None) for name in variants}
        name = min(prices, key=prices.__getitem__)
        total += Choice(prices[name], {unit: name})
    return total


def _joined(first: _Choices, second: _Choices, most: int) -> _Choices:
    """The cheapest of both together, by how many units they replace in all."""
    found: _Choices = [None] * min(len(first) + len(second) - 1, most + 1)
    for i, one in enumerate(first):
        for j, other in enumerate(second[: len(found) - i]):
            if one is None or other is None:
                continue
            known = found[i + j]
            if known is None or one.value + other.value < known.value:
                found[i + j] = one + other
    return found


def _lower(first: _Choices, second: _Choices) -> _Choices:
    """The cheaper of two, for every number of units."""
    found = [*first, *[None] * (len(second) - len(first))]
    for i, other in enumerate(second):
        known = found[i]
        if other is not None and (known is None or other.value < known.value):
            found[i] = other
    return found


class SizePrices:
    """How far a replaced unit changes the sizes of a model.

    Args:
        model: the untouched model; it is neither changed nor run.
        units: of that model.
        variants: what may stand in for them, by name.

    Attributes:
        dense: the sizes of the untouched model.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], variants: Mapping[str, Variant]) -> None:
        self._mode, self._model = fake_copy(model)
        self._units = {unit.name: unit for unit in units}
        self._variants = variants
        # Units that are alike share a number: in a deep chain a unit has hundreds of pairs of sources.
        numbers: dict[Hashable, int] = {}
        self._kind = {unit.name: numbers.setdefault(self._signature(unit), len(numbers)) for unit in units}
        self._known: dict[Hashable, Sizes] = {}
        self.dense = Sizes.of(self._model)

    def add_up(self, names: Sequence[str]) -> bool:
        """Whether the changes of these units add up: none of them holds a tensor that others hold too."""
        shared = SharedStorage(self._model)
        return not any(shared.has(self._model.get_submodule(name)) for name in names)

    def change(self, unit: str, variant: str, sources: tuple[str, str] | None) -> Sizes:
        """The sizes of what stands in for a unit, less those of the unit."""
        key = (variant, *(self._kind[name] for name in (unit, *(sources or ()))))
        if key not in self._known:
            step = self._plan(self._units[unit], self._variants[variant], sources)
            with self._mode:
                built = build_unit(self._model, step)
            self._known[key] = Sizes.of(built) - Sizes.of(self._model.get_submodule(unit))
        return self._known[key]

    def _signature(self, unit: Unit) -> Hashable:
        return module_signature(self._model.get_submodule(unit.name)), unit.role, unit.input_shape, unit.output_shape

    def _plan(self, unit: Unit, variant: Variant, sources: tuple[str, str] | None) -> PlannedUnit:
        kind = BLOCKS[variant.block]
        options = kind.resolve(variant.options)
        if "init" in options:
            options["init"] = "half"  # where a and b start plays no part, but would have to be computed
        units = list(self._units.values())
        fit = examine(self._model, units, unit, kind, options, sources)
        return PlannedUnit(unit, variant.block, options, sources, fit)
