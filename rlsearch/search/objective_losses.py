"""What a policy will report in every objective but accuracy: exactly, where its cost says so, else as others did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlsearch.policy import Policy
from rlsearch.results.selection import REFERENCE_FACTOR
from rlsearch.search.costs import ExactCosts
from rlsearch.search.encoding import Encoding, Floats
from rlsearch.search.gaussian_process import GaussianProcess, Points
from rlsearch.search.observations import Observed
from rlsearch.training.loop import TrainingSpec

# What a metric that is no exact cost goes with: what is learned of it is its ratio to that.
_GOES_WITH = {
    "memory": "memory_predicted",
    "train_flops": "work",
    "forward_flops": "work",
    "train_seconds": "work",
    "samples_per_second": "speed",
}
# Ratios that differ by less are one: nothing but rounding is in them.
_SAME = 1e-3


def exact_metrics(costs: ExactCosts, policy: Policy, training: TrainingSpec) -> dict[str, float]:
    """What is known of a policy without training it, and what other metrics go with."""
    cost = costs.cost(policy, training)
    work = cost.step_flops * training.epochs
    return {**costs.metrics_of(cost), "work": work, "speed": 1 / work, "constant": 1.0}


class ObjectiveLosses:
    """The objectives but accuracy as losses, scaled as `results.selection.normalised_hypervolume` does it: 1 is the
    worst that counts.

    Args:
        objectives: metric to direction.
        encoding: of the points.
        observed: trials with their final metrics, the baseline first.
        exact: of each of them, from `exact_metrics`.
        points: the same trials, encoded.
    """

    def __init__(
        self,
        objectives: Mapping[str, str],
        encoding: Encoding,
        observed: Sequence[Observed],
        exact: Sequence[Mapping[str, float]],
        points: Points,
    ) -> None:
        self._directions = {name: way for name, way in objectives.items() if name != "accuracy"}
        self._baseline = observed[0].final
        self._ratios: dict[str, GaussianProcess | float] = {}
        for name in self._directions:
            if name in exact[0]:
                continue
            proxy = _GOES_WITH.get(name, "constant")
            ratios = np.array(
                [float(item.final[name]) / known[proxy] for item, known in zip(observed, exact, strict=True)]
            )
            if len(ratios) < 3 or float(np.ptp(ratios)) <= _SAME * abs(float(ratios.mean())):
                self._ratios[name] = float(ratios.mean())
            else:
                chains = encoding.chains
                self._ratios[name] = GaussianProcess(points, ratios, np.zeros(len(ratios)), encoding.num_kinds, chains)

    def measured(self, observed: Sequence[Observed]) -> Floats:
        """Of trials that reported them, (N, M)."""
        columns = [self._scaled(name, [float(item.final[name]) for item in observed]) for name in self._directions]
        return np.stack(columns, axis=1) if columns else np.zeros((len(observed), 0))

    def predicted(self, points: Points, exact: Sequence[Mapping[str, float]]) -> Floats:
        """Of policies that may not have been trained, (N, M): as they are likely to be, where they are not exact."""
        columns = [self._scaled(name, self._expected(name, points, exact)) for name in self._directions]
        return np.stack(columns, axis=1) if columns else np.zeros((len(points), 0))

    def _expected(self, name: str, points: Points, exact: Sequence[Mapping[str, float]]) -> Floats:
        if name not in self._ratios:
            return np.array([known[name] for known in exact])
        ratio = self._ratios[name]
        proxies = np.array([known[_GOES_WITH.get(name, "constant")] for known in exact])
        return proxies * (ratio if isinstance(ratio, float) else ratio.predict(points)[0])

    def _scaled(self, name: str, values: Floats | Sequence[float]) -> Floats:
        scale = abs(float(self._baseline[name] or 0)) or 1.0
        array = np.asarray(values, dtype=np.float64)
        if self._directions[name] == "minimize":
            losses = array / (REFERENCE_FACTOR * scale)
        else:
            losses = 1 / (1 + np.maximum(array, 0) / scale)
        return np.clip(losses, 0, 1)
