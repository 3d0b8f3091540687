"""The artefact of a search: a training policy, as frozen dataclasses and as ``policy.json``.

A policy says which units of a model are replaced and by which block (Replacement Learning), and when units that have
stopped learning leave training (Learn&Drop). It knows nothing of torch: what a block or a score *is* stands in
`rlsearch.replacement` and `rlsearch.learn_drop`; here is only what can be written down.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsearch.config import from_mapping, typed, unknown_keys
from rlsearch.errors import ConfigError, Problem, suggestion
from rlsearch.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "rlsearch.policy/1"
SCORES = ("param_change", "param_change_per_lr", "grad_change", "schedule")
_LONGEST_NAME = 256
FEATURES = ("recompute", "stored", "auto")


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, as `rlsearch.build_model` takes it.

    Attributes:
        name: a built-in or torchvision name, or ``package.module:factory``.
        num_classes: the width of the classifier's output.
        kwargs: further arguments of the model's constructor.
        weights: where training starts: None (from scratch), a local file, or a name of torchvision's weights.
        download: whether torchvision's named weights may be fetched from the network.
    """

    name: str
    num_classes: int = 10
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    download: bool = False

    def problems(self, key: str = "model") -> list[Problem]:
        """What is out of range, each with its key."""
        found = _name_problems(self.name, f"{key}.name")
        if self.num_classes < 1:
            found.append(Problem(f"{key}.num_classes", f"must be at least 1, got {self.num_classes}"))
        return found


@dataclass(frozen=True)
class Replacement:
    """One unit and the block that stands in for it.

    Attributes:
        unit: the unit's name, as `rlsearch.find_units` gives it.
        block: the kind of block (``skip``, ``scalar``, ``channel``).
        options: the block's options (``init``, ``boundary``); each block checks its own.
    """

    unit: str
    block: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def problems(self, key: str = "replacement") -> list[Problem]:
        """What is out of range, each with its key."""
        return _name_problems(self.unit, f"{key}.unit") + _name_problems(self.block, f"{key}.block")


@dataclass(frozen=True)
class LearnDrop:
    """When units that have stopped learning leave training.

    Attributes:
        score: how learning is measured: ``param_change``, the relative change of a unit's parameters in an interval;
            ``param_change_per_lr``, the same at the greatest learning rate so far; ``grad_change``, the relative change
            of the norm of its summed gradients; ``schedule`` measures nothing (the control): after the warm-up the
            layers leave evenly, and ``threshold`` and ``patience`` play no part.
        threshold: a unit counts as settled while its smoothed score is below this share of the greatest that it has
            had, in (0, 1].
        patience: for how many intervals in a row it must be settled (>= 1).
        interval: epochs between two measurements (>= 1).
        warmup: the share of the run in which nothing is dropped, in [0, 1].
        max_fraction: the greatest share of the layers (stem and units) that may be dropped, in [0, 1].
        features: ``recompute`` runs the dropped prefix without gradient; ``stored`` keeps its outputs of a few fixed
            views instead, wherever they fit; ``auto`` does so where that pays off, by times measured in the training.
    """

    score: str = "param_change"
    threshold: float = 0.65
    patience: int = 2
    interval: int = 1
    warmup: float = 0.3
    max_fraction: float = 0.9
    features: str = "auto"

    def problems(self, key: str = "learn_drop") -> list[Problem]:
        """What is of the wrong type or out of range, each with its key."""
        found: list[Problem] = []
        for name, word, known in (("score", "score", SCORES), ("features", "value", FEATURES)):
            value = typed(getattr(self, name), str, f"{key}.{name}", found)
            if value is not None and value not in known:
                found.append(Problem(f"{key}.{name}", f"unknown {word} {value!r}{suggestion(value, known)}"))
        threshold = typed(self.threshold, float, f"{key}.threshold", found)
        if threshold is not None and not 0 < threshold <= 1:
            found.append(Problem(f"{key}.threshold", f"must be above 0 and at most 1, got {threshold}"))
        for name in ("patience", "interval"):
            count = typed(getattr(self, name), int, f"{key}.{name}", found)
            if count is not None and count < 1:
                found.append(Problem(f"{key}.{name}", f"must be a whole number of at least 1, got {count}"))
        for name in ("warmup", "max_fraction"):
            share = typed(getattr(self, name), float, f"{key}.{name}", found)
            if share is not None and not 0 <= share <= 1:
                found.append(Problem(f"{key}.{name}", f"must be in [0, 1], got {share}"))
        return found


@dataclass(frozen=True)
class Policy:
    """What is replaced and by what, and the Learn&Drop settings.

    Attributes:
        model: the model that the policy is for, or None for a policy that is not bound to one.
        replacements: at most one a unit; their order has no meaning.
        learn_drop: the Learn&Drop settings, or None to train every layer to the end.
        provenance: where the policy comes from; not part of its identity.
    """

    model: ModelSpec | None = None
    replacements: tuple[Replacement, ...] = ()
    learn_drop: LearnDrop | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        """Whether this is plain end-to-end training."""
        return not self.replacements and self.learn_drop is None

    @functools.cached_property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical form, without the provenance."""
        identity = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``policy.json``: replacements sorted by unit, plain types only."""
        content: dict[str, Any] = {"schema": SCHEMA}
        if self.model is not None:
            model = {"name": self.model.name, "num_classes": self.model.num_classes, "kwargs": dict(self.model.kwargs)}
            if self.model.weights is not None:
                model["weights"] = self.model.weights
            content["model"] = model
        content["replacements"] = [
            {"unit": item.unit, "block": item.block, "options": dict(item.options)}
            for item in sorted(self.replacements, key=lambda item: item.unit)
        ]
        content["learn_drop"] = None if self.learn_drop is None else asdict(self.learn_drop)
        content["provenance"] = dict(self.provenance)
        return content

    @classmethod
    def from_dict(cls, content: Any, source: str = "policy") -> Policy:
        """The policy that `to_dict` wrote.

        Raises:
            ConfigError: unknown keys, wrong types and values out of range, all at once.
        """
        problems: list[Problem] = []
        policy = _parse(content, problems)
        if problems or policy is None:
            raise ConfigError(problems, source)
        return policy

    @classmethod
    def preset(cls, name: str, model: nn.Module, example_input: Tensor | None = None) -> Policy:
        """The policy of a published form of Replacement Learning for ``model``: ``v1`` or ``v2``.

        See `rlsearch.replacement.presets`, which makes it and says what is published of each and what is not.

        Raises:
            ModelError: an unknown name; a model without units; or one in which the form has nothing to replace.
        """
        # The one import that points up, and only when somebody asks: a policy by itself knows nothing of models.
        from rlsearch.replacement.presets import preset

        return preset(name, model, example_input)

    def save(self, path: str | Path) -> None:
        """Writes ``policy.json``, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=False, allow_nan=False) + "\n"
        write_atomic(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads ``policy.json``.

        Raises:
            ConfigError: the file cannot be read, is no JSON (truncated, say), or is no valid policy.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError([Problem("", f"cannot be read: {error.strerror or error}")], str(path)) from None
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number too long for Python
            message = f"is not valid JSON ({error}); it may be truncated: export the policy again"
            raise ConfigError([Problem("", message)], str(path)) from None
        return cls.from_dict(content, str(path))


def _name_problems(name: str, key: str) -> list[Problem]:
    """What keeps a text from being a name."""
    if not name or len(name) > _LONGEST_NAME:
        return [Problem(key, f"must have 1 to {_LONGEST_NAME} characters, has {len(name)}")]
    return [] if name.isprintable() else [Problem(key, f"must hold only characters that can be shown, got {name!r}")]


def _parse(content: Any, problems: list[Problem]) -> Policy | None:
    if typed(content, dict, "", problems) is None:
        return None
    unknown_keys(content, ("schema", "model", "replacements", "learn_drop", "provenance"), "", problems)
    if content.get("schema") != SCHEMA:
        problems.append(Problem("schema", f"must be {SCHEMA!r}, got {content.get('schema')!r}"))
    model = content.get("model")
    learn_drop = content.get("learn_drop")
    policy = Policy(
        model=None if model is None else from_mapping(ModelSpec, model, "model", problems),
        replacements=_parse_replacements(content.get("replacements", []), problems),
        learn_drop=None if learn_drop is None else from_mapping(LearnDrop, learn_drop, "learn_drop", problems),
        provenance=typed(content.get("provenance", {}), dict, "provenance", problems) or {},
    )
    return None if problems else policy


def _parse_replacements(content: Any, problems: list[Problem]) -> tuple[Replacement, ...]:
    if typed(content, list, "replacements", problems) is None:
        return ()
    parsed: dict[str, Replacement] = {}
    for index, item in enumerate(content):
        key = f"replacements[{index}]"
        replacement = from_mapping(Replacement, item, key, problems)
        if replacement is None:
            continue
        if replacement.unit in parsed:
            problems.append(Problem(f"{key}.unit", f"{replacement.unit!r} is replaced twice; keep one of the two"))
        parsed[replacement.unit] = replacement
    return tuple(sorted(parsed.values(), key=lambda item: item.unit))
