"""Variants: what a replaced unit chooses among, each a block with its options."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlsearch.replacement import BLOCKS
from rlsearch.search.settings import ReplacementSpace


@dataclass(frozen=True)
class Variant:
    """One kind of block with the options that a search space gives it.

    Attributes:
        name: the block's name, and behind it the options that the space lists several values of:
            ``scalar(operator=single)``.
        block: a name in `rlsearch.replacement.BLOCKS`.
        options: all options that the space gives the block; defaults stand for the others.
    """

    name: str
    block: str
    options: Mapping[str, Any]

    @property
    def sources(self) -> str | None:
        """Where it borrows: ``adjacent``, ``nearest``, or None for a block that needs no sources."""
        kind = BLOCKS[self.block]
        return str(kind.resolve(self.options).get("sources", "adjacent")) if kind.needs_sources else None


def variants_of(replacement: ReplacementSpace) -> dict[str, Variant]:
    """All variants that a search space offers, by name, in the order of its blocks and values."""
    found = [variant for block in replacement.blocks for variant in _of_block(block, replacement.options)]
    return {variant.name: variant for variant in found}


def plain_variant(block: str) -> Variant:
    """A block with its defaults."""
    return Variant(block, block, {})


def _of_block(block: str, options: Mapping[str, Any]) -> list[Variant]:
    """Every combination of the values of the options that the block has; in the name, the block's own order counts."""
    values = {name: options[name] for name in BLOCKS[block].options if name in options}
    listed = [name for name, value in values.items() if isinstance(value, list)]
    found = []
    for combination in itertools.product(*(values[name] for name in listed)):
        chosen = dict(zip(listed, combination, strict=True))
        told = ", ".join(f"{name}={value}" for name, value in chosen.items())
        found.append(Variant(f"{block}({told})" if told else block, block, values | chosen))
    return found
