"""Settings of a search space: what may be replaced, how long the search goes on, what one trial takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlsearch.config import from_mapping, typed, unknown_keys
from rlsearch.errors import Problem, suggestion
from rlsearch.replacement import BLOCKS, BlockKind
from rlsearch.search.database import SQLITE, STORAGES
from rlsearch.search.sampler_settings import SamplerSettings, parse_sampler

EPOCH_TIMEOUT = 6 * 3600.0
"""Seconds; far above what an epoch of a search takes, and below a night."""

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True)
class ReplacementSpace:
    """What may be replaced, and by what.

    Attributes:
        units: patterns (``layer*``) of the names of the units that may be replaced.
        roles: which units the patterns look at: ``block`` for whole ones, or parts of them (``self_attention``).
        blocks: the kinds of block to choose from.
        max_fraction: the greatest share of those units that one policy may replace, in (0, 1].
        options: options of the blocks (``init``, ``boundary``); each goes to the blocks that have it. Of a list of
            values every replaced unit takes one.
    """

    units: tuple[str, ...] = ("*",)
    roles: tuple[str, ...] = ("block",)
    blocks: tuple[str, ...] = ("skip", "scalar", "channel")
    max_fraction: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchSettings:
    """How long and how the search goes on.

    Attributes:
        trials: how many trials the search ends with (>= 1); the baseline and the controls are among them.
        seed: of the proposals and of every trial's training.
        time_budget: seconds after which no further trial starts; None for no limit.
        epoch_timeout: seconds that one epoch may take; a training that takes longer hangs: it starts once more, from
            its checkpoint, and then fails.
        gpu_hours: no further trial starts once trials have taken more GPU time, over all sessions; None for no limit.
        min_gain: no further trial starts once the front's hypervolume has grown by less than this share of itself, in
            (0, 1), over the last `gain_window` trials; None for never.
        gain_window: how many COMPLETE or PRUNED trials those are, after the first `startup_trials` (>= 1).
        max_concurrent: how many trials run at once; None for as many as the resources hold.
        sampler: who proposes, once enough is known.
        startup_trials: how many trials, those of the start design included, end before the sampler models what is
            good; until then it draws at random. The search's own sampler gains nothing by more than four; Optuna's own
            default for TPE is 10.
        baseline_seeds: with how many seeds the baseline trains (>= 1): how far they differ is the noise of all trials.
        sensitivities: whether every unit is first replaced alone, by the first block that it takes, and trained up to
            racing's first rung: what one unit bears tells the sampler much.
        max_failures: the search stops when more trials than this have failed.
        storage: what holds the study: ``sqlite``, a file in the run's folder; or ``postgresql``, a database whose
            address and password come from the environment, see `rlsearch.search.postgresql`.
        min_epochs: racing's first rung; None for no racing: every trial trains to its end.
        eta: racing's rungs are min_epochs * eta^k, and fewer trials than this at one are not compared (>= 2).
    """

    trials: int = 40
    seed: int = 0
    time_budget: float | None = None
    epoch_timeout: float = EPOCH_TIMEOUT
    gpu_hours: float | None = None
    min_gain: float | None = None
    gain_window: int = 20
    max_concurrent: int | None = None
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    startup_trials: int = 4
    baseline_seeds: int = 2
    sensitivities: bool = False
    max_failures: int = 20
    storage: str = SQLITE
    min_epochs: int | None = None
    eta: int = 3

    def problems(self, key: str = "search") -> list[Problem]:
        """What is out of range, each with its key."""
        least = {"trials": 1, "seed": 0, "max_concurrent": 1, "startup_trials": 1, "max_failures": 0}
        least |= {"baseline_seeds": 1, "min_epochs": 1, "eta": 2, "gain_window": 1}
        found = [
            Problem(f"{key}.{name}", f"must be at least {low}, got {getattr(self, name)}")
            for name, low in least.items()
            if getattr(self, name) is not None and getattr(self, name) < low
        ]
        if self.sensitivities and self.min_epochs is None:
            found.append(Problem(f"{key}.sensitivities", "needs search.min_epochs: where such a training ends"))
        if self.storage not in STORAGES:
            found.append(Problem(f"{key}.storage", f"must be one of {', '.join(STORAGES)}, got {self.storage}"))
        if self.seed >= 2**32:
            found.append(Problem(f"{key}.seed", f"must be below 2^32, got {self.seed}"))
        if self.gpu_hours is not None and not 0 < self.gpu_hours < float("inf"):
            found.append(Problem(f"{key}.gpu_hours", f"must be a finite number above 0, got {self.gpu_hours}"))
        if self.min_gain is not None and not 0 < self.min_gain < 1:
            rule = "must be a share above 0 and below 1, as in 0.001"
            found.append(Problem(f"{key}.min_gain", f"{rule}, got {self.min_gain}"))
        return found


@dataclass(frozen=True)
class Resources:
    """What one trial takes of the machine.

    Attributes:
        cpu: CPU cores of each worker (> 0).
        gpu: GPUs of each worker, possibly a fraction; None (``auto`` in YAML) takes a fraction that fits several
            trials, where there is a GPU; with several workers one whole GPU each.
        workers: processes that train one trial together (>= 1), each with its part of every batch:
            ``training.batch_size`` stays that of all of them, and so does what is learned.
    """

    cpu: float = 1.0
    gpu: float | None = None
    workers: int = 1

    def problems(self, key: str = "resources") -> list[Problem]:
        """What is out of range, each with its key."""
        found = []
        if not 0 < self.cpu < float("inf"):
            found.append(Problem(f"{key}.cpu", f"must be a finite number above 0, got {self.cpu}"))
        if self.gpu is not None and not 0 <= self.gpu < float("inf"):
            found.append(Problem(f"{key}.gpu", f"must be auto or a finite number of at least 0, got {self.gpu}"))
        if self.gpu is not None and self.gpu > 1 and self.gpu != int(self.gpu):
            found.append(Problem(f"{key}.gpu", f"must be whole above 1, got {self.gpu}"))
        if self.workers < 1:
            found.append(Problem(f"{key}.workers", f"must be at least 1, got {self.workers}"))
        if self.workers > 1 and self.gpu not in (None, 0, 1):
            rule = f"with {self.workers} workers each trains on a GPU of its own: must be auto, 1, or 0 for the CPU"
            found.append(Problem(f"{key}.gpu", f"{rule}, got {self.gpu:g}"))
        return found


def parse_duration(value: object, key: str, problems: list[Problem]) -> float | None:
    """Seconds of a duration: a number of seconds, or text such as ``2h``, ``90m`` or ``1h30m``; None with a problem."""
    seconds: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?[dhms])+", value.strip()):
        seconds = sum(float(n) * _SECONDS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", value))
    elif isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        seconds = float(value)
    if seconds is None or not 0 < seconds < float("inf"):
        problems.append(Problem(key, f"must be a time above 0, as in 2h, 90m, 1h30m or 3600 (seconds), got {value!r}"))
        return None
    return seconds


def parse_replacement(content: Any, problems: list[Problem]) -> ReplacementSpace | None:
    key = "space.replacement"
    if typed(content, dict, key, problems) is None:
        return None
    unknown_keys(content, ("units", "roles", "blocks", "max_fraction", "options"), key, problems)
    usual = ReplacementSpace()
    units = _names(content.get("units", list(usual.units)), f"{key}.units", problems)
    roles = _names(content.get("roles", list(usual.roles)), f"{key}.roles", problems)
    blocks = _names(content.get("blocks", list(usual.blocks)), f"{key}.blocks", problems)
    for block in blocks:
        if block not in BLOCKS:
            problems.append(Problem(f"{key}.blocks", f"unknown block {block!r}{suggestion(block, BLOCKS)}"))
    fraction = typed(content.get("max_fraction", usual.max_fraction), float, f"{key}.max_fraction", problems)
    if fraction is not None and not 0 < fraction <= 1:
        problems.append(Problem(f"{key}.max_fraction", f"must be above 0 and at most 1, got {fraction}"))
    options = typed(content.get("options") or {}, dict, f"{key}.options", problems) or {}
    known = {block: BLOCKS[block] for block in blocks if block in BLOCKS}
    _check_options(options, known, f"{key}.options", problems)
    return ReplacementSpace(units, roles, blocks, fraction or usual.max_fraction, options)


def parse_search(content: Any, problems: list[Problem]) -> SearchSettings | None:
    for name in ("time_budget", "epoch_timeout"):
        if isinstance(content, dict) and content.get(name) is not None:
            content = dict(content)
            seconds = parse_duration(content.pop(name), f"search.{name}", problems)
            if seconds is not None:
                content[name] = seconds
    sampler = SamplerSettings()
    if isinstance(content, dict) and "sampler" in content:
        content = dict(content)
        sampler = parse_sampler(content.pop("sampler"), problems)
    settings = from_mapping(SearchSettings, content, "search", problems)
    return None if settings is None else replace(settings, sampler=sampler)


def parse_resources(content: Any, problems: list[Problem]) -> Resources | None:
    if isinstance(content, dict) and content.get("gpu") == "auto":
        content = {**content, "gpu": None}
    if isinstance(content, dict) and isinstance(content.get("gpu"), str):
        problems.append(Problem("resources.gpu", f"must be auto or a number, got {content['gpu']!r}"))
        content = {**content, "gpu": None}
    return from_mapping(Resources, content, "resources", problems)


def _names(value: Any, key: str, problems: list[Problem]) -> tuple[str, ...]:
    """One name or a list of them, none twice."""
    values = [value] if isinstance(value, str) else typed(value, list, key, problems)
    if values is None:
        return ()
    if not values:
        problems.append(Problem(key, "must name at least one"))
    names = [typed(name, str, f"{key}[{index}]", problems) for index, name in enumerate(values)]
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            problems.append(Problem(f"{key}[{index}]", f"{name!r} stands twice; keep one"))
    return tuple(name for name in names if name is not None)


def _check_options(
    options: Mapping[str, Any], blocks: Mapping[str, BlockKind], key: str, problems: list[Problem]
) -> None:
    """Each option must be known to one of the blocks, and hold values that all which know it accept."""
    known = sorted({name for kind in blocks.values() for name in kind.options})
    for name, value in options.items():
        if name not in known:
            hint = suggestion(str(name), known) or " (they have none)"
            problems.append(Problem(f"{key}.{name}", f"is no option of the blocks {', '.join(blocks)}{hint}"))
            continue
        if value == []:
            problems.append(Problem(f"{key}.{name}", "must hold at least one value"))
        listed = isinstance(value, list)
        for index, one in enumerate(value if listed else [value]):
            place = f"{key}.{name}[{index}]" if listed else f"{key}.{name}"
            rules = dict.fromkeys(
                kind.options[name].rule
                for kind in blocks.values()
                if name in kind.options and not kind.options[name].accepts(one)
            )
            problems.extend(Problem(place, f"must be {rule}, got {one!r}") for rule in rules)
            if listed and one in value[:index]:
                problems.append(Problem(place, f"{one!r} stands twice; keep one"))
