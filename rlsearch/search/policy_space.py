"""The valid policies of a search space for one model, as a tree of decisions.

Rules of adjacency, fit and size live here, where policies are made, never as a repair afterwards: a decision that would
break one is not offered. Units are visited in a fixed shuffled order, so that `max_fraction` does not favour the front
of the network. Reconstruction: the papers name fixed schedules (every k-th layer) and no search.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from optuna.distributions import CategoricalDistribution
from torch import nn

from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.replacement import BLOCKS, Unit, find_units, fits
from rlsearch.search.ranges import Distribution, size_of, values_of
from rlsearch.search.space import SearchSpace
from rlsearch.training.loop import TrainingSpec

Suggest = Callable[[str, Distribution], Any]
"""Decides one parameter: its name and what may be chosen, to the choice."""

_ON_OR_OFF = CategoricalDistribution([False, True])


@dataclass(frozen=True)
class Decided:
    """One point of a search space.

    Attributes:
        policy: a valid policy of the space's model.
        training: how it is trained.
        params: the decisions that lead to it, by parameter name; they and the point determine each other.
        distributions: what could have been chosen, by parameter name.
    """

    policy: Policy
    training: TrainingSpec
    params: Mapping[str, Any]
    distributions: Mapping[str, Distribution]

    @property
    def key(self) -> tuple[tuple[str, Any], ...]:
        """What tells this point from all others of the space."""
        return params_key(self.params)


def params_key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A point's decisions, hashable and in one order."""
    return tuple(sorted(params.items()))


class PolicySpace:
    """What `space` offers for `model`.

    Args:
        space: the search space; its ``num_classes`` need not be known.
        model: the untouched model; neither changed nor run.
        input_shape: (C, H, W) of one image; None to guess it from the model.

    Attributes:
        space: as given.
        units: all units of the model, in forward order.
        matched: the names of those that the space's patterns name, in forward order.
        blocks: the blocks that fit each matched unit, by its name; units that take none are left out.
        skippable: the matched units that can be skipped, whether or not the space offers that.
        max_replaced: how many units one policy may replace.

    Raises:
        ModelError: the model has no chains of units, or cannot be analysed.
    """

    def __init__(self, space: SearchSpace, model: nn.Module, input_shape: Sequence[int] | None = None) -> None:
        example = None if input_shape is None else torch.empty(1, *input_shape, device="meta")
        self.space = space
        self.units: tuple[Unit, ...] = () if space.replacement is None else tuple(find_units(model, example))
        self._unit = {unit.name: unit for unit in self.units}
        patterns = space.replacement.units if space.replacement else ()
        self.matched = tuple(name for name in self._unit if any(fnmatchcase(name, pattern) for pattern in patterns))
        fitting = {name: self._fitting(model, name) for name in self.matched}
        self.blocks: dict[str, tuple[str, ...]] = {name: blocks for name, blocks in fitting.items() if blocks}
        self.skippable = tuple(name for name in self.matched if fits(model, self.units, name, "skip") is None)
        fraction = space.replacement.max_fraction if space.replacement else 0.0
        # 0.29 * 100 is 28.999999999999996: what a user would count must not be lost to rounding.
        self.max_replaced = math.floor(fraction * len(self.matched) + 1e-9)
        self._order = sorted(self.blocks, key=lambda name: hashlib.sha256(name.encode()).digest())

    def decide(self, suggest: Suggest) -> Decided:
        """One point of the space, decided one parameter at a time; whatever ``suggest`` chooses, it is valid.

        Args:
            suggest: called once for every decision that is open, in a fixed order that depends on earlier choices.
        """
        params: dict[str, Any] = {}
        distributions: dict[str, Distribution] = {}

        def recorded(name: str, distribution: Distribution) -> Any:
            params[name] = suggest(name, distribution)
            distributions[name] = distribution
            return params[name]

        settings = {
            name.removeprefix("training."): recorded(name, distribution)
            for name, distribution in self.space.searched.items()
            if name.startswith("training.")
        }
        learn_drop = self._decide_learn_drop(recorded)
        chosen = self._decide_blocks(recorded)
        policy = self._policy(chosen, learn_drop)
        return Decided(policy, replace(self.space.training, **settings), params, distributions)

    def point(self, blocks: Mapping[str, str], learn_drop: LearnDrop | None, training: TrainingSpec) -> Decided:
        """The point with these blocks (by unit), Learn&Drop settings and training.

        Returns:
            the point; without params where the space itself does not offer it (a control with a block of its own).
        """
        policy = self._policy(blocks, learn_drop)
        wanted: dict[str, Any] = {f"training.{item.name}": getattr(training, item.name) for item in fields(training)}
        wanted["learn_drop"] = learn_drop is not None
        if learn_drop is not None:
            wanted |= {f"learn_drop.{item.name}": getattr(learn_drop, item.name) for item in fields(learn_drop)}

        def suggest(name: str, distribution: Distribution) -> Any:
            kind, _, unit = name.partition(":")
            if kind == "replace":
                return unit in blocks
            return blocks[unit] if unit else wanted[name]

        if all(block in self.blocks.get(unit, ()) for unit, block in blocks.items()):
            decided = self.decide(suggest)
            if decided.policy == policy and decided.training == training:
                return decided
        return Decided(policy, training, {}, {})

    def offered(self, unit: str, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """The blocks that may replace ``unit`` beside those already chosen; none where it is one's source."""
        if any(unit in self._sources(other, block) for other, block in chosen.items()):
            return ()
        return tuple(
            block for block in self.blocks[unit] if not any(source in chosen for source in self._sources(unit, block))
        )

    def everything(self) -> Iterator[Decided]:
        """Every point of a space whose parameters are all discrete, each once."""
        path: list[tuple[int, int]] = []  # the index taken of how many, a decision each
        while True:
            depth = 0

            def suggest(name: str, distribution: Distribution) -> Any:
                nonlocal depth
                values = values_of(distribution)
                if depth == len(path):
                    path.append((0, len(values)))
                depth += 1
                return values[path[depth - 1][0]]

            yield self.decide(suggest)
            while path and path[-1][0] + 1 == path[-1][1]:
                path.pop()
            if not path:
                return
            index, count = path.pop()
            path.append((index + 1, count))

    def num_replacements(self) -> int:
        """How many sets of replacements are valid; exact, by dynamic programming over each chain and the count.

        Along a chain only neighbours exclude each other (a source is kept), so that the last unit's state is enough to
        go on; `max_fraction` bounds the total, so that ways are counted apart by how many units they replace.
        """
        totals = [1]
        for chain in self._chains():
            totals = _times(totals, self._ways(chain), self.max_replaced)
        return sum(totals[: self.max_replaced + 1])

    def num_points(self) -> int:
        """How many points there are, continuous parameters not counted."""
        training = math.prod(size_of(d) or 1 for name, d in self.space.searched.items() if name.startswith("training."))
        dropping = 0
        if self.space.learn_drop is not None:
            dropped = (d for name, d in self.space.searched.items() if name.startswith("learn_drop."))
            dropping = math.prod(size_of(d) or 1 for d in dropped)
        return training * (1 + dropping) * self.num_replacements()

    def continuous(self) -> tuple[str, ...]:
        """The names of the parameters that have no finite number of values."""
        return tuple(name for name, distribution in self.space.searched.items() if size_of(distribution) is None)

    def _fitting(self, model: nn.Module, name: str) -> tuple[str, ...]:
        blocks = self.space.replacement.blocks if self.space.replacement else ()
        return tuple(b for b in blocks if fits(model, self.units, name, b, self.options_of(b)) is None)

    def options_of(self, block: str) -> dict[str, Any]:
        """The options of the space that ``block`` has."""
        options = self.space.replacement.options if self.space.replacement else {}
        return {name: value for name, value in options.items() if name in BLOCKS[block].options}

    def _policy(self, blocks: Mapping[str, str], learn_drop: LearnDrop | None) -> Policy:
        replacements = tuple(Replacement(unit, blocks[unit], self.options_of(blocks[unit])) for unit in sorted(blocks))
        return Policy(self.space.model, replacements, learn_drop)

    def _sources(self, unit: str, block: str) -> Collection[str]:
        return (self._unit[unit].sources or ()) if BLOCKS[block].needs_sources else ()

    def _decide_learn_drop(self, suggest: Suggest) -> LearnDrop | None:
        if self.space.learn_drop is None or not suggest("learn_drop", _ON_OR_OFF):
            return None
        settings = {
            name.removeprefix("learn_drop."): suggest(name, distribution)
            for name, distribution in self.space.searched.items()
            if name.startswith("learn_drop.")
        }
        return replace(self.space.learn_drop, **settings)

    def _decide_blocks(self, suggest: Suggest) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for unit in self._order:
            if len(chosen) == self.max_replaced:
                break
            offered = self.offered(unit, chosen)
            if offered and suggest(f"replace:{unit}", _ON_OR_OFF):
                chosen[unit] = offered[0] if len(offered) == 1 else suggest(*self._block_choice(unit, offered))
        return chosen

    def _block_choice(self, unit: str, offered: tuple[str, ...]) -> tuple[str, Distribution]:
        """The parameter that decides between ``offered``: Optuna wants the choices of one name never to change."""
        name = "block" if offered == self.blocks[unit] else "block_without_sources"
        return f"{name}:{unit}", CategoricalDistribution(offered)

    def _chains(self) -> list[list[str]]:
        """The names of all units, in forward order, one list a chain and role."""
        chains: dict[tuple[str, str], list[str]] = {}
        for unit in self.units:
            chains.setdefault((unit.chain, unit.role), []).append(unit.name)
        return list(chains.values())

    def _ways(self, chain: Sequence[str]) -> list[int]:
        """In how many valid ways 0, 1, 2, … units of one chain can be replaced."""
        kept, free, sourced = [1], [0], [0]  # by how the last unit ended: kept, replaced without and with sources
        for unit in chain:
            blocks = self.blocks.get(unit, ())
            num_sourced = sum(BLOCKS[block].needs_sources for block in blocks)
            one_more = _times(_plus(kept, free), [0, len(blocks) - num_sourced], self.max_replaced)
            with_sources = _times(kept, [0, num_sourced], self.max_replaced)
            kept, free, sourced = _plus(_plus(kept, free), sourced), one_more, with_sources
        return _plus(_plus(kept, free), sourced)


def _plus(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The sum of two polynomials, by their coefficients."""
    length = max(len(first), len(second))
    return [sum(p[i] for p in (first, second) if i < len(p)) for i in range(length)]


def _times(first: Sequence[int], second: Sequence[int], degree: int) -> list[int]:
    """The product of two polynomials, without the powers above ``degree``."""
    product = [0] * min(len(first) + len(second) - 1, degree + 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            if i + j <= degree:
                product[i + j] += a * b
    return product
