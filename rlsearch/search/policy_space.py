"""The valid policies of a search space for one model, as a tree of decisions.

Rules of adjacency, fit and size hold where policies are made (here, and in `rlsearch.search.unit_group`), never as a
repair afterwards: a decision that would break one is not offered. Units are visited in a fixed shuffled order, so that
`max_fraction` does not favour the front of the network. Reconstruction: the papers name fixed schedules (every k-th
layer) and no search.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from optuna.distributions import CategoricalDistribution
from torch import nn

from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.replacement import Unit, find_units, fits
from rlsearch.search.ranges import Distribution, size_of, values_of
from rlsearch.search.settings import ReplacementSpace
from rlsearch.search.space import SearchSpace
from rlsearch.search.unit_group import UnitGroup, times
from rlsearch.search.variants import Variant, plain_variant, variants_of
from rlsearch.training.loop import TrainingSpec

Suggest = Callable[[str, Distribution], Any]
"""Decides one parameter: its name and what may be chosen, to the choice."""

_ON_OR_OFF = CategoricalDistribution([False, True])
_SCORE = "learn_drop.score"


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
        space: the search space, in which `rlsearch.search.check.check_space` finds nothing wrong; its ``num_classes``
            need not be known.
        model: the untouched model; neither changed nor run.
        input_shape: (C, H, W) of one image; None to guess it from the model.

    Attributes:
        space, model: as given.
        units: all units of the model, in forward order.
        matched: the names of those that the space's patterns and roles name, in forward order.
        variants: what the space offers for them, by name: blocks with their options.
        blocks: the names of the variants that fit each matched unit, by its name; units that take none are left out.
        groups: the units by chain and role, those left out of which nothing can be replaced.
        skippable: the matched units that can be skipped, whether or not the space offers that.
        max_replaced: how many units one policy may replace.

    Raises:
        ModelError: the model has no chains of units, or cannot be analysed.
    """

    def __init__(self, space: SearchSpace, model: nn.Module, input_shape: Sequence[int] | None = None) -> None:
        example = None if input_shape is None else torch.empty(1, *input_shape, device="meta")
        self.space = space
        self.model = model
        self.units: tuple[Unit, ...] = () if space.replacement is None else tuple(find_units(model, example))
        self._unit = {unit.name: unit for unit in self.units}
        self.matched = () if space.replacement is None else matched_units(space.replacement, self.units)
        self.variants = {} if space.replacement is None else variants_of(space.replacement)
        self.groups = self._group_units()
        self._group = {name: group for group in self.groups for name in group.variants}
        self.blocks: dict[str, tuple[str, ...]] = {
            name: self._group[name].variants[name] for name in self.matched if name in self._group
        }
        skip = plain_variant("skip")
        self.skippable = tuple(name for name in self.matched if self.misfit(name, skip) is None)
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
        """The point with these variants (by unit), Learn&Drop settings and training.

        Args:
            blocks: names of `variants`, or of blocks that the space does not offer: those take their defaults.
            learn_drop: None for none.
            training: how it is trained.

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
        """The variants that may replace ``unit`` beside those already chosen, by unit; others keep their parameters."""
        return self._group[unit].offered(unit, chosen)

    def misfit(self, unit: str, variant: Variant, sources: tuple[str, str] | None = None) -> str | None:
        """Why a variant does not fit a unit with these sources (by default its neighbours); None if it does."""
        if sources in (None, self._unit[unit].sources):
            return fits(self.model, self.units, unit, variant.block, variant.options)
        return fits(self.model, self.units, unit, variant.block, variant.options, sources)

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
        """How many sets of replacements are valid; exact, and quick for a space of any size.

        Units of different chains or roles do not concern each other, but for `max_fraction`, which bounds their total:
        so ways are counted apart by how many units they replace.
        """
        totals = [1]
        for group in self.groups:
            totals = times(totals, group.ways(self.max_replaced), self.max_replaced)
        return sum(totals)

    def num_points(self) -> int:
        """How many points there are, continuous parameters not counted."""
        training = math.prod(size_of(d) or 1 for name, d in self.space.searched.items() if name.startswith("training."))
        return training * (1 + self._num_droppings()) * self.num_replacements()

    def continuous(self) -> tuple[str, ...]:
        """The names of the parameters that have no finite number of values."""
        return tuple(name for name, distribution in self.space.searched.items() if size_of(distribution) is None)

    def _num_droppings(self) -> int:
        """How many settings Learn&Drop may have where it is on."""
        if self.space.learn_drop is None:
            return 0
        searched = {name: d for name, d in self.space.searched.items() if name.startswith("learn_drop.")}
        scores = searched.pop(_SCORE, None)
        return sum(
            math.prod(size_of(d) or 1 for name, d in searched.items() if not _is_idle(name, score))
            for score in (values_of(scores) if scores else [self.space.learn_drop.score])
        )

    def _group_units(self) -> list[UnitGroup]:
        groups: dict[tuple[str, str], list[Unit]] = {}
        for unit in self.units:
            groups.setdefault((unit.chain, unit.role), []).append(unit)
        matched = frozenset(self.matched)

        def fitting(name: str, variant: Variant, sources: tuple[str, str] | None) -> bool:
            return self.misfit(name, variant, sources) is None

        found = [UnitGroup(units, matched, self.variants, fitting) for units in groups.values()]
        return [group for group in found if group.variants]

    def _policy(self, blocks: Mapping[str, str], learn_drop: LearnDrop | None) -> Policy:
        chosen = {unit: self.variants.get(name, plain_variant(name)) for unit, name in sorted(blocks.items())}
        replacements = tuple(Replacement(unit, one.block, dict(one.options)) for unit, one in chosen.items())
        return Policy(self.space.model, replacements, learn_drop)

    def _decide_learn_drop(self, suggest: Suggest) -> LearnDrop | None:
        if self.space.learn_drop is None or not suggest("learn_drop", _ON_OR_OFF):
            return None
        searched = {name: d for name, d in self.space.searched.items() if name.startswith("learn_drop.")}
        scores = searched.pop(_SCORE, None)
        # The score comes first: what it does not look at is left at its default, or equal trainings would differ.
        learn_drop = replace(self.space.learn_drop, score=suggest(_SCORE, scores)) if scores else self.space.learn_drop
        settings = {
            name.removeprefix("learn_drop."): suggest(name, distribution)
            for name, distribution in searched.items()
            if not _is_idle(name, learn_drop.score)
        }
        return replace(learn_drop, **settings)

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
        """The parameter that decides between ``offered``.

        Optuna wants the choices of one name never to change: where some of the unit's variants cannot be had, the name
        says which are left, by their place among all of them.
        """
        left = [str(index) for index, variant in enumerate(self.blocks[unit]) if variant in offered]
        name = "block" if offered == self.blocks[unit] else "_".join(["block", *left])
        return f"{name}:{unit}", CategoricalDistribution(offered)


def _is_idle(name: str, score: str) -> bool:
    """Whether a setting of Learn&Drop plays no part with this score."""
    return score == "schedule" and name in ("learn_drop.threshold", "learn_drop.patience")


def matched_units(replacement: ReplacementSpace, units: Sequence[Unit]) -> tuple[str, ...]:
    """The names of the units that a search space means, in forward order."""
    return tuple(
        unit.name
        for unit in units
        if unit.role in replacement.roles and any(fnmatchcase(unit.name, pattern) for pattern in replacement.units)
    )
