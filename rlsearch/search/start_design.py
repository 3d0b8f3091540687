"""What every search trains first: the baseline, the controls that it has to beat, and what tells noise and effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlsearch.errors import ConfigError, Problem
from rlsearch.results.noise import REPEAT
from rlsearch.search.costs import HardConstraints
from rlsearch.search.policy_space import Decided, PolicySpace

BASELINE, SKIP_CONTROL, FREEZE_CONTROL, SAMPLER = "baseline", "skip control", "freeze control", "sampler"
SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class Planned:
    """A trial of the start design.

    Attributes:
        origin: which of them it is.
        decided: what is trained.
        repeat: 0, or by how much the seed of its training is above the search's own.
    """

    origin: str
    decided: Decided
    repeat: int = 0


def start_design(policies: PolicySpace, constraints: HardConstraints) -> list[Planned]:
    """The start design of a space, in the order of training; controls that break a constraint are left out."""
    space = policies.space
    baseline = policies.point({}, None, space.training)
    design = [Planned(BASELINE, baseline)]
    design += [item for item in _controls(policies) if constraints.met(item.decided.policy, item.decided.training)]
    design += [Planned(REPEAT, baseline, repeat) for repeat in range(1, space.search.baseline_seeds)]
    for unit, variants in policies.blocks.items() if space.search.sensitivities else ():
        # What one unit bears says much of what several do, and the first block is as good as another to ask with.
        decided = policies.point({unit: variants[0]}, None, space.training)
        if constraints.met(decided.policy, decided.training):
            design.append(Planned(SENSITIVITY, decided))
    return design


def check_trials(policies: PolicySpace, constraints: HardConstraints) -> None:
    """Whether a search has enough trials for its start.

    Raises:
        ConfigError: it has fewer.
    """
    search = policies.space.search
    design = start_design(policies, constraints)
    if search.trials >= len(design):
        return
    origins = [item.origin for item in design]
    repeats, probes = origins.count(REPEAT), origins.count(SENSITIVITY)
    parts = [f"the baseline with {1 + repeats} seeds" if repeats else "the baseline"]
    parts += [origin for origin in (SKIP_CONTROL, FREEZE_CONTROL) if origin in origins]
    parts += [f"{probes} sensitivities"] if probes else []
    fewer = "set search.sensitivities: false" if probes else "set search.baseline_seeds: 1"
    told = f"must be at least {len(design)}, got {search.trials}: a search starts with {_listed(parts)}"
    remedy = f"; give more trials, or {fewer}" if repeats or probes else "; give more trials"
    raise ConfigError([Problem("search.trials", told + remedy)], "search space")


def _controls(policies: PolicySpace) -> Iterator[Planned]:
    space = policies.space
    skipped = _evenly_spread(policies.skippable, policies.max_replaced)
    if skipped:
        yield Planned(SKIP_CONTROL, policies.point(dict.fromkeys(skipped, "skip"), None, space.training))
    if space.learn_drop is not None:
        yield Planned(FREEZE_CONTROL, policies.point({}, space.learn_drop, space.training))


def _evenly_spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names (or all, where there are fewer), as far apart as they go."""
    count = min(count, len(names))
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]


def _listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
