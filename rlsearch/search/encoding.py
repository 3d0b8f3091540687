"""Policies and settings as numbers, for a model that learns from trials."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from rlsearch.policy import Policy
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.ranges import Distribution, values_of
from rlsearch.training.loop import TrainingSpec

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Encoding:
    """Numbers for the points of a space.

    Args:
        policies: the space, whose units and settings are encoded.

    Attributes:
        num_kinds: what a unit may be: 0 stands for itself, then come the space's variants, and one more for blocks that
            the space does not offer (controls).
        chains: of each unit, the number of its chain and role, (U,).
    """

    def __init__(self, policies: PolicySpace) -> None:
        names = list(policies.matched)
        self._places = {name: place for place, name in enumerate(names)}
        forms = [_form(variant.block, variant.options) for variant in policies.variants.values()]
        self._kinds = {form: number for number, form in enumerate(forms, 1)}
        self.num_kinds = len(self._kinds) + 2
        chains = {unit.name: (unit.chain, unit.role) for unit in policies.units}
        numbers = {chain: number for number, chain in enumerate(dict.fromkeys(chains[name] for name in names))}
        self.chains: Integers = np.array([numbers[chains[name]] for name in names], dtype=np.int64)
        self._searched = policies.space.searched
        self._has_learn_drop = policies.space.learn_drop is not None

    def units(self, policy: Policy) -> Integers:
        """What each matched unit is, (U,)."""
        kinds = np.zeros(len(self._places), dtype=np.int64)
        for item in policy.replacements:
            if item.unit in self._places:
                kinds[self._places[item.unit]] = self._kinds.get(_form(item.block, item.options), self.num_kinds - 1)
        return kinds

    def settings(self, policy: Policy, training: TrainingSpec) -> Floats:
        """Every searched setting, and whether Learn&Drop is on, each as one number or more in [0, 1], (S,).

        A setting of Learn&Drop stands in its middle where that is off.
        """
        found = [float(policy.learn_drop is not None)] if self._has_learn_drop else []
        for name, distribution in self._searched.items():
            section, _, setting = name.partition(".")
            holder: Any = training if section == "training" else policy.learn_drop
            found += _numbers(distribution, None if holder is None else getattr(holder, setting))
        return np.array(found, dtype=np.float64)


def _form(block: str, options: Mapping[str, Any]) -> str:
    return json.dumps([block, dict(options)], sort_keys=True)


def _numbers(distribution: Distribution, value: Any) -> list[float]:
    """A value within what may be chosen; None is its middle."""
    if isinstance(distribution, CategoricalDistribution):
        return [1 / len(distribution.choices) if value is None else float(value == c) for c in values_of(distribution)]
    if distribution.high == distribution.low or value is None:
        return [0.5]
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return [min(1.0, max(0.0, (scale(value) - low) / (high - low)))]
