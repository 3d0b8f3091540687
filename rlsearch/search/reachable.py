"""Which bounds on exactly known costs a policy of the space can meet, and how near to them one comes, before training.

Parameters add up over replaced units: there the nearest value is exact, and a bound beyond it is an error. The peak of
a step's memory does not: there the nearest value is the best that a local search finds, and a bound beyond it brings a
warning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from rlsearch.errors import ConfigError, Problem
from rlsearch.policy import Policy
from rlsearch.results.describe import describe_value
from rlsearch.search.cheapest import SizePrices, cheapest
from rlsearch.search.constraints import Constraint
from rlsearch.search.costs import ExactCosts
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.ranges import values_of
from rlsearch.search.space import SearchSpace
from rlsearch.training.loop import TrainingSpec

SIZES = {"params": "learnable", "params_total": "total"}
"""Metrics that add up over replaced units, and what `rlsearch.training.sizes.Sizes` calls them."""

# A second or two of a small model.
_MOST_STEPS = 300

_Value = Callable[[Mapping[str, str]], float]
"""Of replacements, variants by unit, what is to be low."""


class Reach:
    """How far the policies of a space reach in the metrics that are known before training.

    Args:
        policies: what the space offers.
        costs: of the space's model.
    """

    def __init__(self, policies: PolicySpace, costs: ExactCosts) -> None:
        self._policies = policies
        self._space = policies.space
        self._costs = costs

    def check(self) -> list[str]:
        """Warnings of constraints that no policy was found to meet.

        Raises:
            ConfigError: constraints that no policy meets.
        """
        constraints = self._space.constraints
        problems, warnings = [], []
        baseline = Policy(self._space.model)
        reference = self._costs.metrics(baseline, self._space.training) if constraints else {}
        for constraint in constraints:
            start = reference.get(constraint.metric)
            if start is None or constraint.violation(start, start) <= 0:
                continue  # only training can tell, or the baseline keeps it
            is_exact = constraint.metric in SIZES and self._sizes_add_up
            nearest = self._nearest_size(constraint) if is_exact else self._nearest_found(constraint, start)
            if constraint.violation(nearest, start) <= 0:
                continue
            key, told = f"constraints.{constraint.metric}", _told(constraint, nearest, start, is_exact, self._space)
            if is_exact:
                problems.append(Problem(key, told))
            else:
                warnings.append(f"{key}: {told}")
        if problems:
            raise ConfigError(problems, "search space")
        return warnings

    def size_range(self, metric: str) -> tuple[float, float] | None:
        """The least and the greatest value of one of `SIZES` that a policy has; None where it is not known exactly."""
        if not self._sizes_add_up:
            return None
        return self._size(metric, 1), self._size(metric, -1)

    @cached_property
    def _sizes(self) -> SizePrices:
        return SizePrices(self._policies.model, self._policies.units, self._policies.variants)

    @cached_property
    def _sizes_add_up(self) -> bool:
        return self._sizes.add_up(list(self._policies.blocks))

    def _nearest_size(self, constraint: Constraint) -> float:
        return self._size(constraint.metric, _sign(constraint))

    def _size(self, metric: str, sign: int) -> float:
        """The least value of a metric, or with sign -1 the greatest."""
        name = SIZES[metric]
        found = cheapest(self._policies, lambda *step: sign * getattr(self._sizes.change(*step), name))
        return float(getattr(self._sizes.dense, name) + sign * found.value)

    def _nearest_found(self, constraint: Constraint, reference: float) -> float:
        """The nearest value of a metric that a local search finds; it stops where the bound is met."""
        sign = _sign(constraint)

        def value(blocks: Mapping[str, str], training: TrainingSpec) -> float:
            policy = self._policies.point(blocks, None, training).policy
            return sign * self._costs.metrics(policy, training)[constraint.metric]

        training = min(_settings(self._space, sign), key=lambda settings: value({}, settings))

        def is_met(found: float) -> bool:
            return constraint.violation(sign * found, reference) <= 0

        return sign * least_found(self._policies, lambda blocks: value(blocks, training), is_met)


def least_found(policies: PolicySpace, value: _Value, is_enough: Callable[[float], bool]) -> float:
    """The lowest value that is found: of what would be lowest if replacements did add up, and of steps from there.

    Args:
        policies: what may be replaced.
        value: of replacements, what is to be low.
        is_enough: whether a value is so low that no lower one need be looked for.
    """
    dense = value({})
    alone = {
        (unit, variant): value({unit: variant}) - dense
        for unit, variants in policies.blocks.items()
        for variant in variants
    }
    blocks = cheapest(policies, lambda unit, variant, sources: alone[unit, variant]).blocks
    best, rng = value(blocks), random.Random(0)
    steps = _neighbours(policies, blocks, rng)
    for _ in range(_MOST_STEPS):
        step = None if is_enough(best) else next(steps, None)
        if step is None:
            break
        found = value(step)
        if found < best:
            best, steps = found, _neighbours(policies, step, rng)
    return best


def _neighbours(policies: PolicySpace, blocks: Mapping[str, str], rng: random.Random) -> Iterator[dict[str, str]]:
    """The sets of replacements that differ in one unit, or have one in place of another; in random order."""
    units = list(policies.blocks)
    for unit in rng.sample(units, len(units)):
        others = {name: variant for name, variant in blocks.items() if name != unit}
        if unit in blocks:
            yield others
        elif len(blocks) == policies.max_replaced:
            removed = rng.choice(list(blocks))
            others = {name: variant for name, variant in others.items() if name != removed}
        for variant in policies.offered(unit, others):
            if blocks.get(unit) != variant:
                yield {**others, unit: variant}


def _settings(space: SearchSpace, sign: int) -> Iterator[TrainingSpec]:
    """The settings of a training that decide what a step takes: the end of the batch sizes, every optimizer."""
    batches, optimizers = (space.searched.get(f"training.{name}") for name in ("batch_size", "optimizer"))
    end = min if sign > 0 else max
    batch = space.training.batch_size if batches is None else end(values_of(batches))
    for optimizer in [space.training.optimizer] if optimizers is None else values_of(optimizers):
        yield replace(space.training, batch_size=batch, optimizer=optimizer)


def _sign(constraint: Constraint) -> int:
    return 1 if constraint.op == "<=" else -1


def _told(constraint: Constraint, nearest: float, reference: float, is_exact: bool, space: SearchSpace) -> str:
    """A bound that is out of reach, and what to do about it."""
    is_upper = constraint.op == "<="
    bound = constraint.value * reference if constraint.relative else constraint.value
    stated = f"{constraint.op} {constraint.value:g}{'x' if constraint.relative else ''}"
    if constraint.relative or constraint.metric not in SIZES:
        stated += f" = {describe_value(constraint.metric, bound)}"
    # Rounded so that the bound may be set to what is told.
    share = (math.ceil if is_upper else math.floor)(1000 * nearest / reference) / 1000
    extreme = "least" if is_upper else "greatest"
    reached = f"{describe_value(constraint.metric, nearest)} ({share:g}x)"
    remedy = "raise the bound" if is_upper else "lower the bound"
    if is_upper and space.replacement is not None:
        remedy += ", or allow more in space.replacement (units, blocks, max_fraction)"
    if is_exact:
        return f"{stated} cannot be met: the {extreme} that a policy of this space reaches is {reached}; {remedy}"
    return f"{stated} may be out of reach: the {extreme} found is {reached}; {remedy}"
