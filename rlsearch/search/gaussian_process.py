"""A Gaussian process over policies: what is likely of those that have not been trained.

The covariance of two policies is a sum of what they may share:

- units replaced by the same kind of block, each with an effect of its own (effects add up);
- units replaced at nearby depths, by whatever block (effects change slowly with depth);
- how many units of a chain each kind of block replaces;
- all of it: policies that differ in few units are alike (effects that do not add up);
- settings (learning rate, thresholds): smooth, alone and together with the policy.

How much each counts is found by the greatest posterior density. Exact inference; a thousand points take a second.
Reconstruction: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2 and 5, with the
covariance above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlsearch.search.encoding import Floats, Integers

# Of the logarithms of the parameters: where they are likely to be, and how sure that is.
_PRIORS = {
    "unit": (-1.0, 1.0),
    "depth": (-1.0, 1.0),
    "count": (-1.0, 1.0),
    "policy": (-1.0, 1.0),
    "length": (0.0, 0.7),  # of the share of units that differ, in units of 0.3
    "setting": (-0.5, 1.0),
    "joint": (-1.5, 1.0),
    "smoothness": (-0.7, 0.7),
    "noise": (-1.5, 0.7),
}
_ITERATIONS, _TOLERANCE, _FARTHEST = 25, 1e-3, 4.0
# The parameters are found from so many points at most; all of them are then conditioned on.
_MOST_FITTED = 250
_DEPTH = 2.0
_JITTER = 1e-6


@dataclass(frozen=True)
class Points:
    """Policies as `rlsearch.search.encoding.Encoding` gives them.

    Attributes:
        units: (N, U).
        settings: (N, S).
    """

    units: Integers
    settings: Floats

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, which: Integers) -> Points:
        return Points(self.units[which], self.settings[which])


class GaussianProcess:
    """What values at some points tell of others.

    Args:
        points: where the values are known, N of them.
        values: (N,).
        variances: (N,): what is known of each value's own uncertainty, beside the noise that all share.
        num_kinds: how many kinds ``points.units`` holds.
        chains: of each unit, (U,).

    Attributes:
        noise: the standard deviation of one value.
    """

    def __init__(self, points: Points, values: Floats, variances: Floats, num_kinds: int, chains: Integers) -> None:
        self._covariance = _Covariance(num_kinds, chains)
        self._points = points
        self._centre = float(np.median(values))
        self._scale = float(np.std(values)) or 1.0
        targets = torch.from_numpy((values - self._centre) / self._scale)
        own = torch.from_numpy(variances / self._scale**2)
        fitted = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MOST_FITTED)).astype(np.int64))
        self._weights = self._fit(points[fitted], targets[fitted], own[fitted])
        with torch.no_grad():
            self._factor = self._factorise(self._covariance.parts(points, points), own, self._weights)
            self._solved = torch.cholesky_solve(targets[:, None], self._factor)
        self.noise = float(self._weights["noise"].exp()) * self._scale

    def predict(self, points: Points) -> tuple[Floats, Floats]:
        """Mean and standard deviation of what a value is without its noise, (M,) each."""
        with torch.no_grad():
            cross = self._covariance.total(self._covariance.parts(points, self._points), self._weights)
            mean = (cross @ self._solved)[:, 0]
            explained = torch.linalg.solve_triangular(self._factor, cross.T, upper=False).square().sum(0)
            variance = (self._covariance.variance(points, self._weights) - explained).clamp_min(1e-10)
        return mean.numpy() * self._scale + self._centre, variance.sqrt().numpy() * self._scale

    def _fit(self, points: Points, targets: Tensor, own: Tensor) -> dict[str, Tensor]:
        start = torch.tensor([mean for mean, _ in _PRIORS.values()], dtype=torch.float64)
        spread = torch.tensor([sd for _, sd in _PRIORS.values()], dtype=torch.float64)
        # How far the logarithms are from there, in standard deviations; a bound keeps the line search in its senses.
        steps = torch.zeros_like(start).requires_grad_()
        parts = self._covariance.parts(points, points)
        optimizer = torch.optim.LBFGS(
            [steps], max_iter=_ITERATIONS, tolerance_change=_TOLERANCE, line_search_fn="strong_wolfe"
        )

        def weights() -> dict[str, Tensor]:
            return dict(zip(_PRIORS, start + spread * _FARTHEST * torch.tanh(steps / _FARTHEST), strict=True))

        def loss() -> Tensor:
            optimizer.zero_grad()
            factor = self._factorise(parts, own, weights())
            solved = torch.linalg.solve_triangular(factor, targets[:, None], upper=False)
            total: Tensor = 0.5 * (solved.square().sum() + steps.square().sum()) + factor.diagonal().log().sum()
            total.backward()
            return total

        optimizer.step(loss)
        with torch.no_grad():
            return weights()

    def _factorise(self, parts: _Parts, own: Tensor, weights: dict[str, Tensor]) -> Tensor:
        total = self._covariance.total(parts, weights)
        noise = (2 * weights["noise"]).exp() + own + _JITTER
        factor: Tensor = torch.linalg.cholesky(total + torch.diag(noise))
        return factor


@dataclass(frozen=True)
class _Parts:
    """What two sets of points share, (N, M) each, before it is known how much it counts."""

    unit: Tensor
    depth: Tensor
    count: Tensor
    differing: Tensor
    distance: Tensor


class _Covariance:
    """The covariance of two policies, see the module's docstring."""

    def __init__(self, num_kinds: int, chains: Integers) -> None:
        self._num_kinds = num_kinds
        places = torch.arange(len(chains), dtype=torch.float64)
        # Nearby units of one chain: the end of one stage says little about the beginning of the next.
        near = torch.exp(-(places[:, None] - places).abs() / _DEPTH)
        chain = torch.from_numpy(chains)
        self._near = near * (0.3 + 0.7 * (chain[:, None] == chain).double())
        self._chain = (chain[:, None] == torch.arange(int(chains.max(initial=0)) + 1)).double()

    def parts(self, first: Points, second: Points) -> _Parts:
        """What of the covariance does not depend on its parameters."""
        (one_a, any_a, count_a), (one_b, any_b, count_b) = map(self._described, (first, second))
        width = max(1, first.units.shape[1])
        alike = one_a @ one_b.T
        kept = (1 - any_a) @ (1 - any_b).T
        settings_a, settings_b = (torch.from_numpy(points.settings) for points in (first, second))
        distance = torch.cdist(settings_a, settings_b) if settings_a.shape[1] else torch.zeros_like(alike)
        return _Parts(
            unit=4 * alike / width,
            depth=4 * any_a @ self._near @ any_b.T / width,
            count=4 * count_a @ count_b.T / width,
            differing=(width - alike - kept) / width,
            distance=distance.square(),
        )

    def total(self, parts: _Parts, weights: dict[str, Tensor]) -> Tensor:
        """The covariance itself, (N, M)."""
        variance = {name: (2 * weight).exp() for name, weight in weights.items()}
        near = torch.exp(-parts.differing / (0.3 * weights["length"].exp()))
        smooth = torch.exp(-parts.distance / (2 * (2 * weights["smoothness"]).exp()))
        total: Tensor = (
            1.0
            + variance["unit"] * parts.unit
            + variance["depth"] * parts.depth
            + variance["count"] * parts.count
            + variance["policy"] * near
            + variance["setting"] * smooth
            + variance["joint"] * near * smooth
        )
        return total

    def variance(self, points: Points, weights: dict[str, Tensor]) -> Tensor:
        """The diagonal of `total` of points with themselves, (N,)."""
        one, replaced, count = self._described(points)
        width = max(1, points.units.shape[1])
        zero = torch.zeros(len(points), dtype=torch.float64)
        parts = _Parts(
            unit=4 * one.square().sum(1) / width,
            depth=4 * ((replaced @ self._near) * replaced).sum(1) / width,
            count=4 * count.square().sum(1) / width,
            differing=zero,
            distance=zero,
        )
        return self.total(parts, weights)

    def _described(self, points: Points) -> tuple[Tensor, Tensor, Tensor]:
        """Which kind each unit is, (N, U * K); whether it is replaced, (N, U); how many of each chain are of each kind,
        scaled, (N, C * K)."""
        kinds = torch.from_numpy(points.units)
        one = torch.nn.functional.one_hot(kinds, self._num_kinds)[:, :, 1:].double()
        replaced = (kinds > 0).double()
        count = torch.einsum("nuk,uc->nck", one, self._chain) / self._chain.sum(0).clamp_min(1).sqrt()[None, :, None]
        return one.flatten(1), replaced, count.flatten(1)
