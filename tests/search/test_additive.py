"""What would be best if effects added up: against every valid set of replacements of a small space."""

from __future__ import annotations

import random

import numpy as np

from rlsearch.results.pareto import pareto_front
from rlsearch.search.additive import SingleReplacements
from rlsearch.search.check import build_unallocated
from rlsearch.search.policy_space import Decided, PolicySpace
from rlsearch.search.space import parse_space


def policies() -> PolicySpace:
    content = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.4}},
    }
    space = parse_space(content).with_num_classes(10)
    return PolicySpace(space, build_unallocated(space), (3, 16, 16))


def blocks_of(point: Decided) -> frozenset[tuple[str, str]]:
    return frozenset((item.unit, item.block) for item in point.policy.replacements)


def test_no_valid_set_of_replacements_is_better_where_effects_add_up() -> None:
    space = policies()
    singles, rng = SingleReplacements(space), np.random.default_rng(0)
    # Harm above nothing, and costs below.
    changes = rng.gamma(1.0, 0.01, (len(singles.points), 3)) * [1, -1, -1]
    changes[0] = 0
    alone = {blocks_of(point): change for point, change in zip(singles.points, changes, strict=True)}
    sums = {
        blocks: sum((alone[frozenset([one])] for one in blocks), np.zeros(3))
        for blocks in map(blocks_of, space.everything())
    }
    best = pareto_front(np.array(list(sums.values())))
    on_front = {key for key, is_best in zip(sums, best, strict=True) if is_best}
    found = [frozenset(blocks.items()) for blocks in singles.optima(changes + 0.5, random.Random(0), 40)]
    assert len(set(found)) > 5
    assert set(found) <= on_front


def test_where_all_replacing_is_harm_nothing_is_proposed() -> None:
    singles = SingleReplacements(policies())
    losses = np.ones((len(singles.points), 3))
    losses[0] = 0
    assert list(singles.optima(losses, random.Random(0), 5)) == []
