"""What the recorded trainings say of all others: accuracies after every epoch, with their noise.

    python tests/benchmarks/tables/surrogate.py        how well it orders policies that it has not seen

Gradient-boosted trees, an ensemble for each epoch: of another family than the search's own sampler, which is a Gaussian
process, so that the sampler is not measured on a landscape made in its own image. Noise is drawn from how trainings of
one policy with several seeds really differed, all epochs of a training together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from record import EVERY, TABLE, open_space
from scipy.stats import kendalltau
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import KFold

from rlsearch import Policy, TrainingSpec
from rlsearch.search.encoding import Encoding
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.variations import same_choices

FOLDS = 5


class Recorded:
    """The landscape of the recorded table.

    Args:
        policies: the recorded space.
        path: of the table.

    Attributes:
        features: of each policy, (N, F).
        curves: its accuracies after each epoch, the mean over its seeds, (N, epochs).
        repeated: which policies were trained with several seeds, (N,).
    """

    def __init__(self, policies: PolicySpace, path: Path = TABLE) -> None:
        self._encoding = Encoding(policies)
        grouped: dict[str, list[Sequence[float]]] = {}
        for row in pq.read_table(path, columns=["params", "accuracy"]).to_pylist():
            grouped.setdefault(row["params"], []).append(row["accuracy"])
        points = [policies.decide(same_choices(json.loads(params))) for params in grouped]
        self.features = np.stack([self._described(item.policy, item.training) for item in points])
        self.curves = np.array([np.mean(curves, axis=0) for curves in grouped.values()])
        self.repeated = np.array([len(curves) > 1 for curves in grouped.values()])
        self._noise = np.concatenate([_spread(curves) for curves in grouped.values() if len(curves) > 1])
        self._models = [fitted(self.features, column) for column in self.curves.T]
        self._known: dict[tuple[str, float], Any] = {}

    def accuracy(self, policy: Policy, training: TrainingSpec) -> float:
        """At the end, without noise."""
        return float(self._curve(policy, training)[-1])

    def curve(self, policy: Policy, training: TrainingSpec, seed: int) -> Sequence[float]:
        """After every epoch, with the noise of this seed."""
        text = f"{policy.hash}/{training.lr}/{seed}".encode()
        number = int(hashlib.sha256(text).hexdigest()[:12], 16)
        curve: Sequence[float] = np.clip(self._curve(policy, training) + self._noise[number % len(self._noise)], 0, 1)
        return curve

    def _curve(self, policy: Policy, training: TrainingSpec) -> Any:
        key = policy.hash, training.lr
        if key not in self._known:
            features = self._described(policy, training)[None]
            self._known[key] = np.array([model.predict(features)[0] for model in self._models])
        return self._known[key]

    def _described(self, policy: Policy, training: TrainingSpec) -> Any:
        """What each unit is, how many of each stage are what, which neighbours are replaced together, the settings."""
        kinds = self._encoding.units(policy)
        one = np.eye(self._encoding.num_kinds)[kinds][:, 1:]
        counts = [one[self._encoding.chains == chain].sum(0) for chain in np.unique(self._encoding.chains)]
        replaced = (kinds > 0).astype(float)
        settings = self._encoding.settings(policy, training)
        together = replaced[1:] * replaced[:-1]
        return np.concatenate([one.ravel(), replaced, *counts, one.sum(0), [replaced.sum()], together, settings])


def fitted(features: Any, values: Any) -> GradientBoostingRegressor:
    """The trees, for one epoch."""
    settings = {"n_estimators": 400, "max_depth": 3, "learning_rate": 0.03, "subsample": 0.6, "max_features": 0.3}
    return GradientBoostingRegressor(**settings, random_state=0).fit(features, values)


def _spread(curves: Sequence[Sequence[float]]) -> Any:
    """How a policy's trainings differ from their mean, widened for their mean being taken from themselves."""
    differences = np.array(curves) - np.mean(curves, axis=0)
    return differences * (len(curves) / (len(curves) - 1)) ** 0.5


def held_out(landscape: Recorded) -> tuple[float, float]:
    """Kendall's tau-b between predicted and recorded last accuracies of policies that were held out: of all, and of
    those with several seeds, whose records are less noisy."""
    values = landscape.curves[:, -1]
    predicted = np.zeros(len(values))
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(values):
        predicted[test] = fitted(landscape.features[train], values[train]).predict(landscape.features[test])
    several = landscape.repeated
    return float(kendalltau(predicted, values)[0]), float(kendalltau(predicted[several], values[several])[0])


def main() -> None:
    landscape = Recorded(open_space()[1])
    every, several = held_out(landscape)
    count = len(landscape.curves)
    print(f"{count} policies, {int(landscape.repeated.sum())} of them (about one in {EVERY}) with several seeds")
    noise = float(np.std(landscape._noise[:, -1]))
    print(f"accuracies {landscape.curves[:, -1].min():.3f} to {landscape.curves[:, -1].max():.3f}, noise {noise:.4f}")
    print(f"Kendall's tau on held-out policies: {every:.3f}, on those with several seeds {several:.3f}")


if __name__ == "__main__":
    main()
