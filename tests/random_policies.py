"""Random policies over all blocks and options, for tests and benchmarks of costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rlsearch import Policy, Replacement
from rlsearch.errors import SurgeryError
from rlsearch.replacement import BLOCKS, Unit


def random_policy(
    plan: Callable[[Policy], object], units: Sequence[Unit], source: random.Random, *, resting: bool = False
) -> Policy:
    """Up to fourteen units and roles, each by any block in any form that fits beside what is replaced already.

    Args:
        plan: raises `SurgeryError` for a policy that the model cannot take.
        units: of the model.
        source: of all choices.
        resting: whether blocks may learn in some passes only.
    """
    policy = Policy()
    for unit in source.sample(units, min(len(units), 14)):
        block = source.choice(sorted(BLOCKS))
        known = BLOCKS[block].options
        options = {name: value for name, value in _options(source, resting).items() if name in known}
        longer = replace(policy, replacements=(*policy.replacements, Replacement(unit.name, block, options)))
        try:
            plan(longer)
        except SurgeryError:
            continue
        policy = longer
    return policy


def _options(source: random.Random, resting: bool) -> dict[str, Any]:
    options = {
        "sources": source.choice(["adjacent", "nearest"]),
        "operator": source.choice(["same", "same", "single"]),
        "neighbours": source.choice(["attached", "detached"]),
        "norms": source.choice(["own", "borrowed"]),
        "boundary": source.choice(["strict", "keep", "one_sided", "project"]),
        "pair": source.choice(["unit", "tensor"]),
        "boundary_rank": 1,
        "rank": source.choice([1, 2]),
    }
    return options | {"update_every": source.choice([1, 1, 1, 2])} if resting else options
