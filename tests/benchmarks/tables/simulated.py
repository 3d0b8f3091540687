"""Accuracies that nobody trained for, to measure searches on a landscape whose rules are known.

Effects of units that mostly add up, stronger early in a stage, pairs that do not, a best learning rate, learning curves
that cross, and noise of a point.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from rlsearch import Policy, TrainingSpec
from rlsearch.search.encoding import Encoding
from rlsearch.search.policy_space import PolicySpace

NOISE = 0.01


class Simulated:
    """A landscape as `replay.Landscape` has it.

    Args:
        policies: the recorded space.
    """

    def __init__(self, policies: PolicySpace) -> None:
        rng = np.random.default_rng(0)
        self._encoding = Encoding(policies)
        units = len(policies.matched)
        place = np.array([int(name.rpartition(".")[2]) for name in policies.matched])
        kind = np.array([0.0, 1.0, 0.5, 0.6, 1.0])[: self._encoding.num_kinds]
        early = 0.4 + 1.2 * np.exp(-place / 3)
        self._harm = (
            rng.gamma(1.0, 0.012, (units, 1)) * kind * early[:, None] * rng.uniform(0.6, 1.4, (units, len(kind)))
        )
        self._pairs = rng.exponential(0.012, units)

    def accuracy(self, policy: Policy, training: TrainingSpec) -> float:
        """At the end, without noise."""
        kinds = self._encoding.units(policy)
        harm = self._harm[np.arange(len(kinds)), kinds].sum()
        replaced = np.flatnonzero(kinds)
        harm += sum(self._pairs[b] for a, b in pairwise(replaced) if b - a <= 2)
        return float(max(0.1, 0.6 - harm - 0.02 * math.log10(training.lr / 0.02) ** 2))

    def curve(self, policy: Policy, training: TrainingSpec, seed: int) -> Sequence[float]:
        """After every epoch, with the noise of this seed."""
        text = f"{policy.hash}/{training.lr}/{seed}".encode()
        rng = np.random.default_rng(int(hashlib.sha256(text).hexdigest()[:8], 16))
        end, slow = self.accuracy(policy, training) + rng.normal(0, NOISE), rng.normal(0, 0.02)
        left = 1 - np.arange(1, training.epochs + 1) / training.epochs
        blur = rng.normal(0, 0.004, training.epochs) * (left > 0)
        return np.clip(end - 0.25 * left**1.5 + slow * left + blur, 0.1, 1).tolist()
