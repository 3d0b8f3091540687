"""A linear model of accuracies: what each of several changes does to them if their effects add up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlsearch.results.pareto import Floats

LEAST_SPARE = 6
"""Trials beyond one for each setting that is accounted for, without which nothing is said."""

# How large effects may be beside the noise of a training, before any trial is seen: anything between a tenth and
# thirty times, every factor as likely as another. Its lower end keeps a run that shows nothing from claiming zeros.
_RATIOS = np.geomspace(0.1, 30, 25)
_LEAST_NOISE = 1e-4


def additive_effects(
    is_changed: NDArray[np.bool_], settings: Floats, accuracies: Floats
) -> tuple[Floats, Floats] | None:
    """The effect of each change, as a Bayesian ridge regression gives it.

    Accuracy is taken for a constant, plus the effects of the changes made, plus a multiple of each setting, plus noise
    of one size. Nothing is assumed of the constant and the multiples. Effects are normal around what they have in
    common, which counts as much as what sets them apart (any two correlate by 1/2): a change that few trials made is
    thought to do what the others do. How large they are beside the noise, and the noise, are averaged over.

    Args:
        is_changed: which trial makes which change, (n, U).
        settings: what else differs between the trials, (n, K); columns may depend on each other.
        accuracies: (n,), finite.

    Returns:
        The posterior means and standard deviations of the effects, (U,) each, in the unit of the accuracies; None
        where fewer than `LEAST_SPARE` trials are left once the constant and the settings are accounted for.
    """
    known = _basis(np.column_stack([np.ones(len(accuracies)), settings]))
    spare = len(accuracies) - known.shape[1]
    if spare < LEAST_SPARE:
        return None
    # What the constant and the settings can explain is taken off both sides: they may have any value.
    rest = accuracies - known @ (known.T @ accuracies)
    common = np.column_stack([np.eye(is_changed.shape[1]), np.ones(is_changed.shape[1])]) / np.sqrt(2)
    columns = is_changed @ common
    left, scales, right = np.linalg.svd(columns - known @ (known.T @ columns), full_matrices=False)
    seen, shape = left.T @ rest, common @ right.T
    floor = spare * _LEAST_NOISE**2
    weights, means, variances = [], [], []
    for ratio in _RATIOS**2:
        kept = ratio * scales**2 / (1 + ratio * scales**2)
        misfit = max(float(rest @ rest - kept @ seen**2), floor)
        weights.append(-0.5 * np.log1p(ratio * scales**2).sum() - 0.5 * spare * np.log(misfit))
        means.append(shape @ (ratio * scales / (1 + ratio * scales**2) * seen))
        variances.append(misfit / (spare - 2) * ratio * (1 - shape**2 @ kept))
    share = np.exp(np.array(weights) - max(weights))
    share /= share.sum()
    mean = share @ np.array(means)
    return mean, np.sqrt(share @ (np.array(variances) + (np.array(means) - mean) ** 2))


def _basis(columns: Floats) -> Floats:
    """Orthonormal columns of the same span."""
    left, scales, _ = np.linalg.svd(columns, full_matrices=False)
    found: Floats = left[:, scales > 1e-9 * scales[0]]
    return found
