"""A search space in numbers, before anything is trained: its size, what its policies cost, what its limits leave."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rlsearch.errors import DataError
from rlsearch.model_graph import example_shape
from rlsearch.policy import Policy
from rlsearch.search.check import build_unallocated
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.packing import timing_warning
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.reachable import SIZES, Reach
from rlsearch.search.space import SearchSpace
from rlsearch.search.start_design import check_trials
from rlsearch.search.stopping import stopping_warning
from rlsearch.search.variations import random_choices
from rlsearch.training.data import known_shape, load_data
from rlsearch.training.models import default_image_size

_COSTS = {"params": "params", "params_total": "params_total", "memory": "memory_predicted"}
_COSTS |= {"forward_flops": "forward_flops", "step_flops": "step_flops"}
_FEW_IMAGES = 1000


@dataclass(frozen=True)
class Spread:
    """One cost over the sampled policies, beside the end-to-end baseline's.

    Of ``params`` and ``params_total`` the least and the greatest are those of all policies, sampled or not.
    """

    least: float
    median: float
    greatest: float
    baseline: float


@dataclass(frozen=True)
class SpaceSummary:
    """What `rlsearch validate` prints.

    Attributes:
        size: points of the space: valid policies times the choices of every other parameter that has finitely many.
        replacements: valid sets of replacements alone.
        continuous: the parameters that `size` does not count.
        num_units: units that the patterns match.
        roles: how many of them have which role.
        variants: by name, blocks with their options: how many of the units each fits.
        max_replaced: how many of them one policy may replace.
        sampled: how many random valid policies the costs and shares are taken over.
        cost: by name: ``params``, ``params_total``, ``memory_predicted`` (bytes), ``forward_flops`` and ``step_flops``
            (of one image).
        constraints: metric to the share of the sample that keeps its bound; None where only training can tell.
        feasible: the share of the sample that keeps all bounds that are known before training.
        warnings: what is not wrong, but will be in the way.
    """

    size: int
    replacements: int
    continuous: tuple[str, ...]
    num_units: int
    roles: dict[str, int]
    variants: dict[str, int]
    max_replaced: int
    sampled: int
    cost: dict[str, Spread]
    constraints: dict[str, float | None]
    feasible: float
    warnings: tuple[str, ...]


def summarize(space: SearchSpace, num_samples: int = 200) -> SpaceSummary:
    """The numbers of a space that `rlsearch.search.check.check_space` has found nothing wrong with.

    Args:
        space: the search space.
        num_samples: how many random valid policies to cost.

    Raises:
        ConfigError: a constraint that no policy meets.
    """
    space, input_shape, warnings = _look_at_data(space)
    timing = timing_warning(space)
    warnings += [told for told in (timing, stopping_warning(space.search)) if told is not None]
    model = build_unallocated(space)
    policies = PolicySpace(space, model, input_shape)
    costs = ExactCosts(model, input_shape, workers=space.resources.workers)
    reach = Reach(policies, costs)
    doubts = reach.check()
    warnings += doubts
    baseline = Policy(space.model)
    hard = HardConstraints(space.constraints, costs, baseline, space.training)
    check_trials(policies, hard)
    rng = random.Random(0)
    # One training setting for all: what is compared here is policies, and a cost model is built for each batch size.
    sample = [policies.decide(random_choices(policies, rng)).policy for _ in range(num_samples)]
    found = [asdict(costs.cost(policy, space.training)) for policy in sample]
    reference = asdict(costs.cost(baseline, space.training))
    kept = [{k: v <= 0 for k, v in hard.violations(policy, space.training).items()} for policy in sample]
    feasible = sum(all(one.values()) for one in kept) / num_samples
    if not feasible and not doubts:
        warnings.append(
            f"none of {num_samples} random policies keeps the constraints: the search may find nothing to try"
        )
    return SpaceSummary(
        size=policies.num_points(),
        replacements=policies.num_replacements(),
        continuous=policies.continuous(),
        num_units=len(policies.matched),
        roles=dict(Counter(unit.role for unit in policies.units if unit.name in policies.matched)),
        variants={name: sum(name in fitting for fitting in policies.blocks.values()) for name in policies.variants},
        max_replaced=policies.max_replaced,
        sampled=num_samples,
        cost={
            name: _spread([one[key] for one in found], reference[key], reach.size_range(key) if key in SIZES else None)
            for key, name in _COSTS.items()
        },
        constraints={
            bound.metric: sum(one[bound.metric] for one in kept) / num_samples if bound.metric in kept[0] else None
            for bound in space.constraints
        },
        feasible=feasible,
        warnings=tuple(warnings),
    )


def _look_at_data(space: SearchSpace) -> tuple[SearchSpace, tuple[int, ...], list[str]]:
    """The space fitted to its data, the shape of one image, and a warning where the data are not at hand.

    A few images tell their shape, and the source tells its classes: decoding all of them is left to the search.
    """
    few = max(_FEW_IMAGES, math.ceil(10 / space.data.validation_fraction))
    limit = few if space.data.limit is None else min(few, space.data.limit)
    try:
        data = load_data(replace(space.data, limit=limit, download=False))
    except DataError as error:
        space, shape, told = _guess(space)
        remedy = "the search will fetch them" if space.data.download else "the search will not start without them"
        size = "x".join(map(str, shape))
        return space, shape, [f"{error}\n  {remedy}; the costs are for images of {size}{told}"]
    return space.with_num_classes(data.num_classes), data.input_shape, []


def _guess(space: SearchSpace) -> tuple[SearchSpace, tuple[int, ...], str]:
    """The space and the shape of one image while the data are missing, and which of it had to be assumed."""
    known = known_shape(space.data)
    if known is not None:
        num_classes, shape = known
        return (space if space.num_classes is not None else space.with_num_classes(num_classes)), shape, ""
    side = space.data.image_size or default_image_size(space.model.name, space.model.kwargs)
    guessed = example_shape(build_unallocated(space))[1:] if side is None else (3, side, side)
    if space.num_classes is not None:
        return space, guessed, ""
    return space, guessed, f" and for {space.model.num_classes} classes; model.num_classes: N states another number"


def _spread(values: Sequence[float], baseline: float, ends: tuple[float, float] | None) -> Spread:
    least, greatest = ends or (min(values), max(values))
    return Spread(least, statistics.median(values), greatest, baseline)
