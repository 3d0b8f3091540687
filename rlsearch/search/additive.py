"""The policies that would be best if what replacing each unit does simply added up: candidates for what to train next.

Where effects do add up, nothing beats them; where they do not, the search's model knows better and passes them over.
The sum is made least exactly, over all valid policies, by `rlsearch.search.cheapest`. Source of the idea: one score for
each block and an integer program over them, Bercovich et al., "Puzzle: Distillation-Based NAS for Inference-Optimized
LLMs" (arXiv 2411.19146), section 4; that the scores come from a model of all trials is ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence

from rlsearch.search.cheapest import cheapest
from rlsearch.search.encoding import Floats
from rlsearch.search.policy_space import Decided, PolicySpace

# How much a point of accuracy may weigh against a point of the costs' scale, at least and at most.
_LIGHTEST, _HEAVIEST = 0.3, 30.0


class SingleReplacements:
    """The untouched model, and every policy that replaces one unit of it.

    Args:
        policies: the space.

    Attributes:
        points: the untouched model first, (1 + R).
    """

    def __init__(self, policies: PolicySpace) -> None:
        self._policies = policies
        self._places: dict[tuple[str, str], int] = {}
        training = policies.space.training
        self.points: list[Decided] = [policies.point({}, None, training)]
        for unit, variants in policies.blocks.items():
            for variant in variants:
                self._places[unit, variant] = len(self.points)
                self.points.append(policies.point({unit: variant}, None, training))

    def optima(self, losses: Floats, rng: random.Random, count: int) -> Iterator[Mapping[str, str]]:
        """Replacements, variants by unit, that are best by weighted sums of losses that add up.

        Args:
            losses: of `points`, (1 + R, 1 + M): that of accuracy first, then those of costs.
            rng: of the weights.
            count: how many weightings; some may lead to the same replacements.
        """
        changes = losses - losses[0]
        for _ in range(count):
            accuracy = math.exp(rng.uniform(math.log(_LIGHTEST), math.log(_HEAVIEST)))
            weights = [accuracy, *(rng.expovariate(1.0) for _ in range(losses.shape[1] - 1))]
            blocks = self._cheapest((changes @ weights).tolist())
            if blocks:
                yield blocks

    def _cheapest(self, prices: Sequence[float]) -> Mapping[str, str]:
        return cheapest(self._policies, lambda unit, variant, _: prices[self._places[unit, variant]]).blocks
