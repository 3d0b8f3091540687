"""From which units a replaced unit borrows, given what else a policy replaces.

Reconstruction: the papers say "the layers before and after"; that these must own their parameters, and what "nearest"
means where they do not, is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rlsearch.replacement.units import Unit

SOURCES = ("adjacent", "nearest")


def overlaps(first: str, second: str) -> bool:
    """Whether two units, by name, are the same one or one is a part of the other."""
    return first == second or first.startswith(f"{second}.") or second.startswith(f"{first}.")


def sources_of(units: Sequence[Unit], unit: Unit, mode: str, replaced: Collection[str]) -> tuple[str, str] | None:
    """The names of the units that ``unit`` borrows from, the preceding and the succeeding one; None if one is missing.

    Args:
        units: of the model, in forward order.
        unit: one of them.
        mode: ``adjacent``: its neighbours in the chain, whatever becomes of them. ``nearest``: on either side the
            nearest unit of the same chain and role that owns its parameters.
        replaced: the names of all units that the policy replaces.
    """
    if mode == "adjacent":
        return unit.sources
    alike = [other.name for other in units if (other.chain, other.role) == (unit.chain, unit.role)]
    place = alike.index(unit.name)
    before = _first_owner(reversed(alike[:place]), replaced)
    behind = _first_owner(alike[place + 1 :], replaced)
    return None if before is None or behind is None else (before, behind)


def _first_owner(names: Iterable[str], replaced: Collection[str]) -> str | None:
    return next((name for name in names if not any(overlaps(name, other) for other in replaced)), None)
