"""A search space: what a YAML file says may be searched, how it is judged, and within which limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlsearch.config import from_mapping, join, typed, unknown_keys
from rlsearch.errors import ConfigError, Problem, suggestion
from rlsearch.policy import LearnDrop, ModelSpec
from rlsearch.results.space_file import DIRECTIONS
from rlsearch.results.tables import METRICS
from rlsearch.search.constraints import Constraint, check_objectives, parse_constraints
from rlsearch.search.ranges import Distribution, parse_settings, to_plain
from rlsearch.search.settings import (
    ReplacementSpace,
    Resources,
    SearchSettings,
    parse_replacement,
    parse_resources,
    parse_search,
)
from rlsearch.training.data import DataSpec
from rlsearch.training.loop import TrainingSpec
from rlsearch.training.model_factory import is_installed_code
from rlsearch.yaml_file import override, read_yaml

DEFAULT_OBJECTIVES = {"accuracy": "maximize", "params": "minimize", "memory": "minimize", "train_flops": "minimize"}
_MAXIMIZED = ("accuracy", "samples_per_second")
_SECTIONS = ("model", "data", "training", "objectives", "constraints", "space", "search", "resources")
_UNSEARCHED = {
    "epochs": "every trial gets the same budget, or their costs could not be compared",
    "precision": "a trial's precision follows from its device",
}


@dataclass(frozen=True)
class SearchSpace:
    """A whole search, before its model and data are looked at (`rlsearch.search.check` does that).

    Attributes:
        model: what is trained; its ``num_classes`` counts only if the same attribute here is set.
        num_classes: the classes that the user stated; None to take the data's (`with_num_classes`).
        data: on what.
        training: how; a searched setting holds the value that the baseline takes.
        searched: distributions of ``training.*`` and ``learn_drop.*``, by the parameter's name in the study.
        objectives: metric to ``maximize`` or ``minimize``.
        constraints: bounds on metrics.
        replacement: what may be replaced; None for nothing.
        learn_drop: Learn&Drop's settings where it is on (a searched one holds its default); None where it is never on.
        search: how long and how the search goes on.
        resources: what one trial takes.
    """

    model: ModelSpec
    data: DataSpec
    num_classes: int | None = None
    training: TrainingSpec = field(default_factory=TrainingSpec)
    searched: Mapping[str, Distribution] = field(default_factory=dict)
    objectives: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_OBJECTIVES))
    constraints: tuple[Constraint, ...] = ()
    replacement: ReplacementSpace | None = None
    learn_drop: LearnDrop | None = None
    search: SearchSettings = field(default_factory=SearchSettings)
    resources: Resources = field(default_factory=Resources)

    def with_num_classes(self, num_classes: int) -> SearchSpace:
        """The space with the model's width fitted to data of ``num_classes``.

        Raises:
            ConfigError: the user stated fewer classes than the data have.
        """
        if self.num_classes is None:
            model = replace(self.model, num_classes=num_classes)
            return replace(self, model=model, num_classes=num_classes)
        if self.num_classes < num_classes:
            message = f"must be at least the data's {num_classes}, got {self.num_classes}; leave it out to take theirs"
            raise ConfigError([Problem("model.num_classes", message)], "search space")
        return self

    def to_dict(self) -> dict[str, Any]:
        """The resolved content of ``space.yaml``: `parse_space` gives this space again."""
        model = asdict(self.model)
        if self.num_classes is None:
            del model["num_classes"]
        space: dict[str, Any] = {}
        if self.replacement is not None:
            space["replacement"] = {
                "units": list(self.replacement.units),
                "roles": list(self.replacement.roles),
                "blocks": list(self.replacement.blocks),
                "max_fraction": self.replacement.max_fraction,
                "options": dict(self.replacement.options),
            }
        if self.learn_drop is not None:
            space["learn_drop"] = self._with_ranges(asdict(self.learn_drop), "learn_drop")
        return {
            "model": model,
            "data": asdict(self.data),
            "training": self._with_ranges(asdict(self.training), "training"),
            "objectives": dict(self.objectives),
            "constraints": {constraint.metric: str(constraint) for constraint in self.constraints},
            "space": space,
            "search": asdict(self.search),
            "resources": {
                "cpu": self.resources.cpu,
                "gpu": "auto" if self.resources.gpu is None else self.resources.gpu,
                "workers": self.resources.workers,
            },
        }

    def _with_ranges(self, settings: dict[str, Any], prefix: str) -> dict[str, Any]:
        ranges = {name: self.searched.get(join(prefix, name)) for name in settings}
        return {name: value if (r := ranges[name]) is None else to_plain(r) for name, value in settings.items()}


def load_space(path: str | Path, overrides: Iterable[str] = ()) -> SearchSpace:
    """The search space of a YAML file, with ``dotted.key=value`` overrides (``--set``) put in.

    Raises:
        ConfigError: everything that is wrong with it, at once; or its model is code of an installed package, and no
            override names it.
    """
    problems: list[Problem] = []
    settings = list(overrides)
    space = parse_space(override(read_yaml(path), settings, problems), str(path), problems)
    name = space.model.name
    is_named = any(setting.partition("=")[0].strip() in ("model", "model.name") for setting in settings)
    if not is_named and is_installed_code(name):
        message = f"is code of an installed package, {name!r}, which a file alone cannot run"
        remedy = f"if you trust it, name it in the command too: --set model.name={name}"
        raise ConfigError([Problem("model.name", f"{message}; {remedy}")], str(path))
    return space


def parse_space(content: Any, source: str = "search space", problems: list[Problem] | None = None) -> SearchSpace:
    """The search space of a mapping, as a YAML file holds it.

    Args:
        content: what the file holds.
        source: the file's name, for the message.
        problems: what is already known to be wrong.

    Raises:
        ConfigError: everything that is wrong with it, at once.
    """
    problems = [] if problems is None else problems
    if content is None:
        problems.append(
            Problem("", f"is empty; it must hold at least model, data and space of: {', '.join(_SECTIONS)}")
        )
    if content is None or typed(content, dict, "", problems) is None:
        raise ConfigError(problems, source)
    unknown_keys(content, _SECTIONS, "", problems)
    problems.extend(Problem(name, "is missing") for name in ("model", "data") if name not in content)
    model = from_mapping(ModelSpec, content["model"], "model", problems) if "model" in content else None
    data = from_mapping(DataSpec, content["data"], "data", problems) if "data" in content else None
    training, searched = parse_settings(
        TrainingSpec, _section(content, "training"), "training", "training", problems, _UNSEARCHED
    )
    replacement, learn_drop, searched_drop = _parse_space_section(_section(content, "space"), problems)
    objectives = _parse_objectives(content.get("objectives", DEFAULT_OBJECTIVES), problems)
    constraints = parse_constraints(_section(content, "constraints"), "constraints", problems)
    if not problems:  # a misspelt objective, or Learn&Drop that is not understood, would lead astray
        check_objectives(objectives, constraints, learn_drop is not None, problems)
    search = parse_search(_section(content, "search"), problems)
    resources = parse_resources(_section(content, "resources"), problems)
    if training and search and search.min_epochs and search.min_epochs > training.epochs:
        message = f"must be at most training.epochs = {training.epochs}, got {search.min_epochs}"
        problems.append(Problem("search.min_epochs", message))
    if search and resources and search.gpu_hours is not None and resources.gpu == 0:
        message = "limits GPU time, but with resources.gpu: 0 trials take no GPU; use search.time_budget instead"
        problems.append(Problem("search.gpu_hours", message))
    if not problems and replacement is None and learn_drop is None and not searched:
        problems.append(
            Problem("space", "leaves nothing to search; give replacement, learn_drop, or ranges in training")
        )
    if problems:
        raise ConfigError(problems, source)
    assert model is not None  # each is missing only with a problem
    assert data is not None
    assert training is not None
    assert search is not None
    assert resources is not None
    return SearchSpace(
        model=model,
        data=data,
        num_classes=model.num_classes if "num_classes" in content["model"] else None,
        training=training,
        searched={**searched, **searched_drop},
        objectives=objectives,
        constraints=constraints,
        replacement=replacement,
        learn_drop=learn_drop,
        search=search,
        resources=resources,
    )


def _section(content: Mapping[str, Any], name: str) -> Any:
    """A section, where one that is left out or empty (``search:``) is an empty mapping."""
    value = content.get(name)
    return {} if value is None else value


def _parse_objectives(content: Any, problems: list[Problem]) -> dict[str, str]:
    if typed(content, dict, "objectives", problems) is None:
        return {}
    if not content:
        problems.append(
            Problem("objectives", "must name at least one metric, as in {accuracy: maximize, params: minimize}")
        )
    for name, direction in content.items():
        key = f"objectives.{name}"
        right = "maximize" if name in _MAXIMIZED else "minimize"
        if name not in METRICS:
            problems.append(Problem(key, f"unknown objective{suggestion(str(name), METRICS)}"))
        elif direction not in DIRECTIONS:
            hint = suggestion(str(direction), DIRECTIONS)
            problems.append(Problem(key, f"must be maximize or minimize, got {direction!r}{hint}"))
        elif direction != right:
            problems.append(Problem(key, f"must be {right}, got {direction!r}: the other way has no use"))
    return dict(content)


def _parse_space_section(
    content: Any, problems: list[Problem]
) -> tuple[ReplacementSpace | None, LearnDrop | None, dict[str, Distribution]]:
    if typed(content, dict, "space", problems) is None:
        return None, None, {}
    unknown_keys(content, ("replacement", "learn_drop"), "space", problems)
    replacement = learn_drop = None
    searched: dict[str, Distribution] = {}
    if content.get("replacement") is not None:
        replacement = parse_replacement(content["replacement"], problems)
    if content.get("learn_drop") is not None:
        learn_drop, searched = parse_settings(
            LearnDrop, content["learn_drop"], "space.learn_drop", "learn_drop", problems, _unused(content["learn_drop"])
        )
    return replacement, learn_drop, searched


def _unused(learn_drop: Any) -> dict[str, str]:
    """The settings of Learn&Drop that play no part: a search over them would train the same thing again and again."""
    if not isinstance(learn_drop, dict) or learn_drop.get("score") != "schedule":
        return {}
    return dict.fromkeys(("threshold", "patience"), "with score schedule it plays no part")
