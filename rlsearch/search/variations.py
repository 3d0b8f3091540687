"""Points of a search space made at random, or out of points that are known: every one valid, whatever is chosen.

And when two of them are so near that the second would tell nothing new.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from rlsearch.search.policy_space import PolicySpace, Suggest, params_key
from rlsearch.search.ranges import Distribution, draw, size_of


def random_choices(policies: PolicySpace, rng: random.Random) -> Suggest:
    """Decides a whole point at random.

    How readily units are replaced is drawn first, once a point: an even coin for every unit would put nearly all points
    at `max_fraction`, and none near the baseline.
    """
    # Half as much again: a unit that borrows keeps its neighbours from being replaced, so fewer are than asked for.
    share = rng.uniform(0, min(1, 1.5 * policies.max_replaced / max(1, len(policies.blocks))))

    def suggest(name: str, distribution: Distribution) -> Any:
        return rng.random() < share if name.startswith("replace:") else draw(distribution, rng)

    return suggest


def mutation(params: Mapping[str, Any], rng: random.Random, changes: int = 1) -> Suggest:
    """Decides as ``params`` did, but for some decisions; what follows from them anew is drawn at random.

    Args:
        params: the decisions of a known point.
        rng: the source of all choices.
        changes: how many decisions differ (fewer where there are not so many).
    """
    changed = set(rng.sample(sorted(params), min(changes, len(params))))

    def suggest(name: str, distribution: Distribution) -> Any:
        if name in params and name not in changed:
            return params[name]
        if name in params and isinstance(distribution, CategoricalDistribution) and not distribution.single():
            return rng.choice([choice for choice in distribution.choices if choice != params[name]])
        if name.startswith("replace:") and name not in params:
            return False  # what a known point had no occasion to decide is left as it is in the model
        return draw(distribution, rng)

    return suggest


def crossing(first: Mapping[str, Any], second: Mapping[str, Any], rng: random.Random) -> Suggest:
    """Decides about every unit and every setting as one of two known points did, by the toss of a coin."""
    sides: dict[str, Mapping[str, Any]] = {}

    def suggest(name: str, distribution: Distribution) -> Any:
        subject = name.partition(":")[2] or name  # whether a unit is replaced, and by what, goes together
        params = sides.setdefault(subject, rng.choice((first, second)))
        if name in params:
            return params[name]
        return False if name.startswith("replace:") else draw(distribution, rng)

    return suggest


def same_choices(params: Mapping[str, Any]) -> Suggest:
    """Decides as ``params`` did."""

    def suggest(name: str, distribution: Distribution) -> Any:
        return params[name]

    return suggest


def same_settings(params: Mapping[str, Any], blocks: Mapping[str, str], rng: random.Random) -> Suggest:
    """Decides about settings as ``params`` did, and replaces these units, by these variants, and no others."""

    def suggest(name: str, distribution: Distribution) -> Any:
        kind, _, unit = name.partition(":")
        if unit:
            return unit in blocks if kind == "replace" else blocks[unit]
        return params[name] if name in params else draw(distribution, rng)

    return suggest


def coarse_key(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> tuple[Any, ...]:
    """A point's decisions, continuous ones by the tenth of their range.

    A model that is sure proposes one good policy again and again, with a threshold that differs in its third digit;
    such a trial tells nothing new.
    """
    return params_key(
        {
            name: value if size_of(distributions[name]) else _tenth(value, distributions[name])
            for name, value in params.items()
        }
    )


def _tenth(value: float, distribution: BaseDistribution) -> int:
    assert isinstance(distribution, FloatDistribution)  # the only kind that is continuous
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return min(9, int(10 * (scale(value) - low) / (high - low)))
