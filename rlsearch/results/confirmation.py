"""What the trainings of `rlsearch confirm` say: means, intervals, and who is on the true front.

Chances to be on the front are simulated (`front_chances`). Three trainings a policy tell its mean badly and its spread
hardly at all, so the spread is taken as one for all policies and pooled over them. With the prior 1/variance, the usual
one of knowing nothing, the variance given the trainings is their sum of squares over a chi-squared number, and each
policy's true mean is normal around the mean measured, with that variance over its number of trainings. From this
posterior `DRAWS` sets of true means are drawn, always the same ones, and the chance is the share of them in which the
policy is not dominated by another. Errors of policies and of objectives count as independent. A cost that came out
equal in all trainings of a policy (parameters, FLOPs without Learn&Drop) is exact, and is not varied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rlsearch.results.confirmed import ConfirmedTraining
from rlsearch.results.pareto import Floats, pareto_front, to_losses
from rlsearch.results.tables import Run

LEAST_SEEDS = 2
"""Trainings that an interval needs, and so what counts as confirmed."""

DRAWS = 10_000
"""Sets of true means that the chances are counted in: a chance is then good to 0.01."""

# Measured anew in every training: that two of them agree is a coincidence, and makes them no more certain.
_NOISY = frozenset({"accuracy", "train_seconds", "samples_per_second"})
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over trainings.

    Attributes:
        mean: of the values.
        sd: their standard deviation (of a sample); None for one value.
        half_width: of the 95 % t interval of the mean; None for one value.
        num: how many values.
    """

    mean: float
    sd: float | None
    half_width: float | None
    num: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the interval; they may lie outside of what an accuracy can be."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


@dataclass(frozen=True)
class Confirmation:
    """What is known of one trial's policy from its trainings with new seeds.

    Attributes:
        trial: its number.
        seeds: of the trainings that have a result.
        num_diverged: of those that have none.
        accuracy: on the test split, in [0, 1]; None without a result.
        difference: of the accuracy to the baseline's, over the seeds that both have; None without any, and for the
            baseline.
        chance: the probability to be on the true front of all policies that are confirmed; None for one that is not.
    """

    trial: int
    seeds: tuple[int, ...]
    num_diverged: int
    accuracy: Estimate | None
    difference: Estimate | None
    chance: float | None

    @property
    def is_confirmed(self) -> bool:
        """Whether its mean stands for the policy: enough trainings, none of which diverged."""
        return len(self.seeds) >= LEAST_SEEDS and not self.num_diverged


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95 % t interval of at least one value."""
    mean, num = float(np.mean(values)), len(values)
    if num < 2:
        return Estimate(mean, None, None, num)
    from scipy.special import stdtrit  # takes as long to import as all the rest; most commands never ask

    sd = float(np.std(values, ddof=1))
    quantile = float(stdtrit(num - 1, (1 + _LEVEL) / 2))
    return Estimate(mean, sd, quantile * sd / math.sqrt(num), num)


def front_chances(values: Sequence[Floats], objectives: Mapping[str, str]) -> Floats:
    """Each policy's probability to be on the true front of these policies, as the module's docstring says.

    Args:
        values: of each policy (trainings, objectives), at least `LEAST_SEEDS` trainings each; finite.
        objectives: metric to direction, in the order of the columns.

    Returns:
        (policies,) probabilities.
    """
    random = np.random.default_rng(0)
    draws = np.empty((DRAWS, len(values), len(objectives)))
    for column, name in enumerate(objectives):
        draws[:, :, column] = _true_means([of_one[:, column] for of_one in values], name in _NOISY, random)
    directions = tuple(objectives.values())
    on_front = np.zeros(len(values))
    for means in draws:
        on_front += pareto_front(to_losses(means, directions))
    return on_front / DRAWS


def confirmations(run: Run) -> dict[int, Confirmation]:
    """What is known of every trial that was trained again, by trial."""
    baselines = tuple(record.trial for record in run.records if record.origin == "baseline")
    return dict(_confirmations(run.confirmed, tuple(run.objectives.items()), baselines))


@lru_cache(maxsize=32)
def _confirmations(
    trainings: tuple[ConfirmedTraining, ...], objectives: tuple[tuple[str, str], ...], baselines: tuple[int, ...]
) -> dict[int, Confirmation]:
    """A page asks for these several times, and the simulation takes a third of a second."""
    by_trial: dict[int, list[ConfirmedTraining]] = {}
    for row in trainings:
        by_trial.setdefault(row.trial, []).append(row)
    reference = by_trial.get(baselines[0], []) if baselines else []
    found = {trial: _confirmation(rows, reference) for trial, rows in by_trial.items()}
    return found | _with_chances(found, by_trial, dict(objectives))


def _confirmation(rows: Sequence[ConfirmedTraining], reference: Sequence[ConfirmedTraining]) -> Confirmation:
    """One trial's figures; its chance is still to come."""
    accuracies = _accuracies(rows)
    others = {} if rows[0].trial == (reference[0].trial if reference else None) else _accuracies(reference)
    differences = [value - others[seed] for seed, value in accuracies.items() if seed in others]
    return Confirmation(
        trial=rows[0].trial,
        seeds=tuple(accuracies),
        num_diverged=len(rows) - len(accuracies),
        accuracy=estimate(list(accuracies.values())) if accuracies else None,
        difference=estimate(differences) if differences else None,
        chance=None,
    )


def _with_chances(
    found: Mapping[int, Confirmation], by_trial: Mapping[int, Sequence[ConfirmedTraining]], objectives: dict[str, str]
) -> dict[int, Confirmation]:
    """The trials that are confirmed, with their chances."""
    members = [item for item in found.values() if item.is_confirmed]
    values = [
        np.array([[row.objective(name) for name in objectives] for row in by_trial[item.trial]], dtype=np.float64)
        for item in members
    ]
    # A cost that some training could not tell, as an older version's, leaves nothing to compare.
    if not members or not all(np.isfinite(of_one).all() for of_one in values):
        return {}
    chances = front_chances(values, objectives)
    return {item.trial: replace(item, chance=float(chance)) for item, chance in zip(members, chances, strict=True)}


def _true_means(values: Sequence[Floats], is_noisy: bool, random: np.random.Generator) -> Floats:
    """Draws (`DRAWS`, policies) of one objective's true means, given each policy's trainings."""
    counts = np.array([len(of_one) for of_one in values])
    varies: NDArray[np.bool_] = np.array([is_noisy or np.ptp(of_one) > 0 for of_one in values])
    # The first value of an exact cost, since a mean of equal numbers may be off by a last bit.
    means = np.array([of_one.mean() if moves else of_one[0] for of_one, moves in zip(values, varies, strict=True)])
    draws = np.tile(means, (DRAWS, 1))
    if varies.any():
        moving = [of_one for of_one, moves in zip(values, varies, strict=True) if moves]
        squares = sum(float(((of_one - of_one.mean()) ** 2).sum()) for of_one in moving)
        variances = squares / random.chisquare((counts[varies] - 1).sum(), DRAWS)
        errors = random.standard_normal((DRAWS, len(moving))) * np.sqrt(variances[:, None] / counts[varies])
        draws[:, varies] += errors
    return draws


def _accuracies(rows: Sequence[ConfirmedTraining]) -> dict[int, float]:
    """The test accuracies by seed."""
    return {row.seed: row.test_accuracy for row in rows if row.test_accuracy is not None}
