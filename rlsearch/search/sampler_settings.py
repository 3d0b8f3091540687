"""Which sampler proposes, and its options: what ``search.sampler`` may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsearch.config import typed, unknown_keys
from rlsearch.errors import Problem, suggestion

# Every sampler with its options: the least value, and the usual one. All are whole numbers.
SAMPLERS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "front": {"candidates": (50, 600)},
    "tpe": {"n_ei_candidates": (1, 24)},
    "nsga2": {"population_size": (2, 20)},
    "random": {},
}


@dataclass(frozen=True)
class SamplerSettings:
    """Who proposes policies after the first trials.

    Attributes:
        name: ``front`` (`rlsearch.search.front_sampler`); Optuna's ``tpe`` (multivariate, in groups) or ``nsga2``; or
            ``random``.
        options: of that sampler, all of them.
    """

    name: str = "front"
    options: Mapping[str, int] = field(default_factory=lambda: _usual("front"))


def parse_sampler(content: Any, problems: list[Problem], key: str = "search.sampler") -> SamplerSettings:
    """The settings of ``sampler: tpe`` or ``sampler: {name: tpe, n_ei_candidates: 48}``."""
    given = {"name": content} if isinstance(content, str) else typed(content, dict, key, problems)
    if given is None:
        return SamplerSettings()
    name = given.get("name", "front")
    if not isinstance(name, str) or name not in SAMPLERS:
        problems.append(Problem(f"{key}.name", f"unknown sampler {name!r}{suggestion(str(name), SAMPLERS)}"))
        return SamplerSettings()
    # A resolved search space has them apart; a user writes them beside the name.
    apart = typed(given.get("options", {}), dict, f"{key}.options", problems) or {}
    given = {**{option: value for option, value in given.items() if option != "options"}, **apart}
    unknown_keys(given, ("name", *SAMPLERS[name]), key, problems)
    options = _usual(name)
    for option, (least, _) in SAMPLERS[name].items():
        value = typed(given.get(option, options[option]), int, f"{key}.{option}", problems)
        if value is not None and value < least:
            problems.append(Problem(f"{key}.{option}", f"must be at least {least}, got {value}"))
        options[option] = value if value is not None else options[option]
    return SamplerSettings(name, options)


def _usual(name: str) -> dict[str, int]:
    return {option: usual for option, (_, usual) in SAMPLERS[name].items()}
