"""What only the model can tell about a search space: whether it builds, and whether units and blocks exist in it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from rlsearch.errors import ModelError, Problem, suggestion
from rlsearch.model_graph import split, why_not_cut
from rlsearch.replacement import Unit, find_units
from rlsearch.search.policy_space import PolicySpace, matched_units
from rlsearch.search.postgresql import missing_driver
from rlsearch.search.ranges import values_of
from rlsearch.search.settings import ReplacementSpace
from rlsearch.search.space import SearchSpace
from rlsearch.search.variants import Variant
from rlsearch.training.data import known_shape
from rlsearch.training.feature_inputs import not_of_a_stream
from rlsearch.training.models import build_model, build_spec

_KEY = "space.replacement"
_DROP_KEY = "space.learn_drop"


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
    problems = check_streamed(space) if space.data.stream is True else []
    missing = missing_driver(space.search.storage)
    if missing is not None:
        problems.append(Problem("search.storage", missing))
    if space.model.weights is not None and not space.model.download:
        try:
            build_spec(space.model)
        except ModelError as error:
            problems.append(Problem("model.weights", str(error)))
    if space.replacement is None and space.learn_drop is None:
        return problems
    shape = _input_shape(space)
    try:
        units = find_units(model, None if shape is None else torch.empty(2, *shape, device="meta"))
    except ModelError as error:
        return [*problems, Problem(_KEY if space.replacement else _DROP_KEY, str(error))]
    if space.learn_drop is not None:
        problems += _check_cuts(model, units, space.model.name)
    if space.replacement is None:
        return problems
    problems += _check_units(space.replacement, units, space.model.name)
    return problems or _check_blocks(space.replacement, PolicySpace(space, model, shape))


def check_streamed(space: SearchSpace) -> list[Problem]:
    """What does not go with data that are streamed: features stored of images that are not in memory."""
    searched = space.searched.get("learn_drop.features")
    values = values_of(searched) if searched is not None else [space.learn_drop.features] if space.learn_drop else []
    return [Problem(f"{_DROP_KEY}.features", not_of_a_stream(space.data.name))] if "stored" in values else []


def _input_shape(space: SearchSpace) -> tuple[int, int, int] | None:
    """What the model will get, as far as the data's name and settings tell; None: it is guessed from the model."""
    known, side = known_shape(space.data), space.data.image_size
    if known is not None:
        return known[1]
    return None if side is None else (3, side, side)


def _check_cuts(model: nn.Module, units: list[Unit], name: str) -> list[Problem]:
    """Something of the model must be able to leave training; else every trial with Learn&Drop would fail."""
    names = [unit.name for unit in units]
    try:
        if len(split(model, names)) > 1:
            return []
        reason = f"nothing of {name} can leave training: {why_not_cut(model, names)}"
    except ModelError as error:
        reason = str(error)
    return [Problem(_DROP_KEY, f"{reason}; leave learn_drop out")]


def _check_units(replacement: ReplacementSpace, units: list[Unit], model: str) -> list[Problem]:
    """Every role must be one of the model's, every pattern must name a unit, and no unit may be a part of another."""
    roles = dict.fromkeys(unit.role for unit in units)
    told = f"the roles of its units are {', '.join(roles)}"
    unknown = [role for role in replacement.roles if role not in roles]
    if unknown:
        return [Problem(f"{_KEY}.roles", f"{role!r} is no role of {model}; {told}") for role in unknown]
    names = [unit.name for unit in units if unit.role in replacement.roles]
    problems = [
        Problem(f"{_KEY}.units", f"{pattern!r} matches no unit of {model}{_remedy(pattern, names, units)}")
        for pattern in replacement.units
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        return problems
    matched = frozenset(matched_units(replacement, units))
    idle = [role for role in replacement.roles if not any(u.role == role and u.name in matched for u in units)]
    problems = [Problem(f"{_KEY}.roles", f"units matches no unit of role {role!r}; leave it out") for role in idle]
    return problems + _check_overlaps(units, matched)


def _remedy(pattern: str, names: list[str], units: list[Unit]) -> str:
    """What to write instead of a pattern that matches none of the names."""
    others = dict.fromkeys(unit.role for unit in units if fnmatchcase(unit.name, pattern))
    if others:
        return f" of the given roles, only of role {', '.join(others)}: name that in roles"
    return suggestion(pattern, names)


def _check_overlaps(units: list[Unit], matched: frozenset[str]) -> list[Problem]:
    """Whole units and their parts must not be mixed in one chain: what one borrows from, the other would replace."""
    used = {(unit.chain, unit.role) for unit in units if unit.name in matched}
    role_of = {unit.name: unit.role for unit in units if (unit.chain, unit.role) in used}
    found: dict[tuple[str, str], str] = {}
    for name, role in role_of.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            whole = ".".join(parts[:length])
            if whole in role_of:
                pair = (role_of[whole], role)
                found.setdefault(
                    pair, f"{pair[0]} and {role} overlap: {name} is a part of {whole}; keep one of the two"
                )
    return [Problem(f"{_KEY}.roles", message) for message in found.values()]


def _check_blocks(replacement: ReplacementSpace, policies: PolicySpace) -> list[Problem]:
    """Every block, and every listed value of an option, must fit a unit; ``max_fraction`` must allow to replace one."""
    fitting = {name for names in policies.blocks.values() for name in names}
    useless = [variant for name, variant in policies.variants.items() if name not in fitting]
    used = [variant for name, variant in policies.variants.items() if name in fitting]
    problems = [
        Problem(f"{_KEY}.blocks", f"{block!r} fits none of the matched units ({_reasons(policies, useless, block)})")
        for block in replacement.blocks
        if all(variant.block != block for variant in used)
    ]
    for name, values in {} if problems else replacement.options.items():
        for index, value in enumerate(values if isinstance(values, list) else ()):
            concerned = [variant for variant in useless if variant.options.get(name) == value]
            if concerned and all(variant.options.get(name) != value for variant in used):
                message = f"with {value!r} no block fits any of the matched units ({_reasons(policies, concerned)})"
                problems.append(Problem(f"{_KEY}.options.{name}[{index}]", message))
    if policies.max_replaced == 0:
        least = 1 / len(policies.matched)
        message = f"allows no replacement: one of {len(policies.matched)} matched units is {least:.3g}"
        problems.append(Problem(f"{_KEY}.max_fraction", f"{message}, got {replacement.max_fraction}; raise it"))
    return problems


def _reasons(policies: PolicySpace, useless: list[Variant], block: str | None = None) -> str:
    """Why the first variant (of a block) fits nowhere; three units are enough to understand it."""
    variant = next(variant for variant in useless if block in (None, variant.block))
    return "; ".join(str(policies.misfit(name, variant)) for name in policies.matched[:3])
