"""Which replacements go together among the units of one chain and role: one rule, to offer policies and to count them.

A unit borrows from units that keep their own parameters (*owners*), so that what it may be replaced by depends on
nothing but the owners next to it on either side; between two consecutive owners everything is replaced. Units of
different chains or roles never concern each other: `rlsearch.search.check` refuses a space whose roles overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlsearch.replacement import Unit
from rlsearch.search.variants import Variant

Fits = Callable[[str, Variant, tuple[str, str] | None], bool]
"""Whether a variant fits a unit, by name, with these sources; None where it needs none."""


@dataclass(frozen=True)
class Gap:
    """Units next to each other that are all replaced, between two owners or an end of the chain.

    Attributes:
        before: the place of the owner before them; -1 for none.
        behind: the place of the owner behind them; one behind the last unit for none.
        variants: by the name of each unit between, those that may replace it; at least one.
        sources: the names of both owners; None where one is missing, and nothing between borrows.
    """

    before: int
    behind: int
    variants: Mapping[str, tuple[str, ...]]
    sources: tuple[str, str] | None


class UnitGroup:
    """The units of one chain and role.

    What stays valid when replacements are taken back is all that counts as valid. A variant with ``sources: nearest``
    must therefore fit with every nearer pair of sources too; without that, which policies can be reached would depend
    on the order in which units are decided. In chains whose units are alike it makes no difference.

    Args:
        units: in forward order.
        matched: the names of those that may be replaced; others are always owners.
        variants: what they may be replaced by, by name.
        fits: asked once for every unit, variant and pair of sources that comes up.

    Attributes:
        variants: the names of the variants that fit each matched unit when nothing else is replaced; units that take
            none are left out.
    """

    def __init__(
        self, units: Sequence[Unit], matched: Collection[str], variants: Mapping[str, Variant], fits: Fits
    ) -> None:
        self._units = tuple(units)
        self._places = {unit.name: place for place, unit in enumerate(units)}
        self._variants = variants
        self._sources = {name: variant.sources for name, variant in variants.items()}
        self._fits = fits
        self._known: dict[tuple[int, str, int, int], bool] = {}
        self._between: dict[tuple[int, int, int], tuple[str, ...]] = {}
        self._gaps: dict[int, list[Gap]] = {}
        self.variants: dict[str, tuple[str, ...]] = {}
        for place, unit in enumerate(units):
            if unit.name in matched and (found := self._holding(place, tuple(variants), place - 1, place + 1)):
                self.variants[unit.name] = found

    def offered(self, unit: str, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """The variants that may replace ``unit``, an owner until now, beside those chosen (by unit) already.

        None where one of those could no longer borrow: its source would be replaced, or the next one does not fit.
        """
        place = self._places[unit]
        before, behind = place - 1, place + 1
        while before >= 0 and self._units[before].name in chosen:
            before -= 1
        while behind < len(self._units) and self._units[behind].name in chosen:
            behind += 1
        for other in range(before + 1, behind):
            if other != place and not self._holds(other, chosen[self._units[other].name], before, behind):
                return ()
        return self._offered(place, before, behind)

    def borrows(self, variant: str) -> bool:
        """Whether a variant, by name, needs sources."""
        return self._sources[variant] is not None

    def ways(self, most: int) -> list[int]:
        """In how many valid ways 0, 1, …, at most ``most`` units can be replaced.

        Dynamic programming over owners from front to back: `reached` holds, for each unit and for the end of the chain,
        the ways for all that stands before it, if it is itself an owner.
        """
        reached = [[0] for _ in range(len(self._units) + 1)]
        for gap in self.gaps(most):
            between = math.prod(len(variants) for variants in gap.variants.values())
            earlier = [1] if gap.before < 0 else reached[gap.before]
            found = times(earlier, [0] * len(gap.variants) + [between], most)
            reached[gap.behind] = plus(reached[gap.behind], found)
        return reached[-1]

    def gaps(self, most: int) -> Sequence[Gap]:
        """All valid gaps of at most ``most`` units, empty ones too; those that end at one owner before all that begin
        there."""
        if most not in self._gaps:
            self._gaps[most] = list(self._find_gaps(most))
        return self._gaps[most]

    def _find_gaps(self, most: int) -> Iterator[Gap]:
        for behind in range(len(self._units) + 1):
            # A wider gap between two owners leaves each unit in it fewer variants: after the first that has none, no
            # wider one has any.
            for before in range(behind - 1, max(-2, behind - most - 2), -1):
                gap = self._gap(before, behind)
                if not all(gap.variants.values()):
                    break
                yield gap

    def _gap(self, before: int, behind: int) -> Gap:
        names = [unit.name for unit in self._units]
        variants = {names[place]: self._offered(place, before, behind) for place in range(before + 1, behind)}
        is_open = before < 0 or behind == len(names)
        return Gap(before, behind, variants, None if is_open else (names[before], names[behind]))

    def _offered(self, place: int, before: int, behind: int) -> tuple[str, ...]:
        key = (place, before, behind)
        if key not in self._between:
            self._between[key] = self._holding(place, self.variants.get(self._units[place].name, ()), before, behind)
        return self._between[key]

    def _holding(self, place: int, variants: Sequence[str], before: int, behind: int) -> tuple[str, ...]:
        return tuple(variant for variant in variants if self._holds(place, variant, before, behind))

    def _holds(self, place: int, variant: str, before: int, behind: int) -> bool:
        """Whether a variant may replace a unit between these two owners; -1, or one behind the last unit, is none."""
        if self._sources[variant] is None:
            before, behind = -1, len(self._units)  # what is around it does not matter
        key = (place, variant, before, behind)
        if key not in self._known:
            self._known[key] = self._examine(place, self._variants[variant], before, behind)
        return self._known[key]

    def _examine(self, place: int, variant: Variant, before: int, behind: int) -> bool:
        unit = self._units[place]
        if self._sources[variant.name] is None:
            return self._fits(unit.name, variant, None)
        if before < 0 or behind == len(self._units):
            return False
        sources = (self._units[before].name, self._units[behind].name)
        if self._sources[variant.name] == "adjacent":
            return unit.sources == sources and self._fits(unit.name, variant, sources)
        return (
            self._fits(unit.name, variant, sources)
            and (before == place - 1 or self._holds(place, variant.name, before + 1, behind))
            and (behind == place + 1 or self._holds(place, variant.name, before, behind - 1))
        )


def plus(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The sum of two polynomials, by their coefficients."""
    length = max(len(first), len(second))
    return [sum(p[i] for p in (first, second) if i < len(p)) for i in range(length)]


def times(first: Sequence[int], second: Sequence[int], degree: int) -> list[int]:
    """The product of two polynomials, without the powers above ``degree``."""
    product = [0] * min(len(first) + len(second) - 1, degree + 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            if i + j <= degree:
                product[i + j] += a * b
    return product
