"""What only the model can tell about a search space: whether it builds, and whether units and blocks exist in it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from rlsearch.errors import ModelError, Problem, suggestion
from rlsearch.replacement import Unit, find_units, fits
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.space import SearchSpace
from rlsearch.training.models import build_model, build_spec


def build_unallocated(space: SearchSpace) -> nn.Module:
    """The space's model without memory for its weights (torch's meta device), to be analysed and never run.

    Raises:
        ModelError: an unknown model, or arguments that it does not take.
    """
    with torch.device("meta"):
        return build_model(space.model.name, space.model.num_classes, **dict(space.model.kwargs))


def check_space(space: SearchSpace) -> list[Problem]:
    """What is wrong with a space once its model is looked at; empty where nothing is.

    The model's weights are read only where they are at hand: nothing is fetched.
    """
    try:
        model = build_unallocated(space)
    except ModelError as error:
        return [Problem("model", str(error))]
    problems = []
    if space.model.weights is not None and not space.model.download:
        try:
            build_spec(space.model)
        except ModelError as error:
            problems.append(Problem("model.weights", str(error)))
    if space.replacement is None:
        return problems
    try:
        units = find_units(model)
    except ModelError as error:
        return [*problems, Problem("space.replacement", str(error))]
    problems += _check_units(space, units)
    return problems or _check_blocks(space, model)


def _check_units(space: SearchSpace, units: list[Unit]) -> list[Problem]:
    """Every pattern must name a unit."""
    assert space.replacement is not None  # asked only then
    names = [unit.name for unit in units]
    return [
        Problem(
            "space.replacement.units", f"{pattern!r} matches no unit of {space.model.name}{suggestion(pattern, names)}"
        )
        for pattern in space.replacement.units
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def _check_blocks(space: SearchSpace, model: nn.Module) -> list[Problem]:
    """Every block must fit a unit, and at least one unit must be replaceable under ``max_fraction``."""
    assert space.replacement is not None  # asked only then
    policies = PolicySpace(space, model)
    problems = []
    for block in space.replacement.blocks:
        if any(block in blocks for blocks in policies.blocks.values()):
            continue
        options = policies.options_of(block)
        reasons = [fits(model, policies.units, name, block, options) for name in policies.matched]
        told = "; ".join(str(reason) for reason in reasons[:3])
        problems.append(Problem("space.replacement.blocks", f"{block!r} fits none of the matched units ({told})"))
    if policies.max_replaced == 0:
        least = 1 / len(policies.matched)
        message = f"allows no replacement: one of {len(policies.matched)} matched units is {least:.3g}"
        problems.append(
            Problem("space.replacement.max_fraction", f"{message}, got {space.replacement.max_fraction}; raise it")
        )
    return problems
