"""What ``rlsearch train`` is to train, as its command line says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from rlsearch.config import from_mapping, unknown_keys
from rlsearch.errors import ConfigError, ModelError, Problem
from rlsearch.export import named_model
from rlsearch.policy import LearnDrop, ModelSpec, Policy
from rlsearch.training.data import DataSpec, ImageData, load_data
from rlsearch.training.loop import TrainingSpec
from rlsearch.training.models import build_spec, default_image_size
from rlsearch.training.trial_spec import TrialSpec
from rlsearch.yaml_file import override

_COMMAND = "rlsearch train"
_LEARN_DROP = "--learn-drop"
_NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class TrainOptions:
    """The options as they were typed; None where they were not.

    Attributes:
        subject: a policy's file, or a model's name.
        data: the name of the data.
        epochs: of the training.
        learn_drop: settings, ``default`` or ``off``.
        seed: of the training.
        settings: as of ``--set``.
        model: the name that lets a policy's own model code run.
    """

    subject: str
    data: str | None = None
    epochs: int | None = None
    learn_drop: str | None = None
    seed: int = 0
    settings: tuple[str, ...] = ()
    model: str | None = None


def training_spec(options: TrainOptions) -> tuple[TrialSpec, ImageData]:
    """What to train, and the images; a plain model gets the data's number of classes.

    Raises:
        UserError: something is wrong with the policy, the model, the options or the data.
    """
    path = Path(options.subject)
    is_policy = path.is_file() or path.suffix == ".json"
    policy = Policy.load(path) if is_policy else Policy()
    problems: list[Problem] = []
    content = _content(options, policy, None if is_policy else options.subject, problems)
    data = _read(DataSpec, content, "data", problems)
    training = _read(TrainingSpec, content, "training", problems)
    named = None if is_policy else _read(ModelSpec, content, "model", problems)
    learn_drop = _learn_drop(options.learn_drop, policy.learn_drop, problems)
    if named is not None and options.model not in (None, named.name):
        problems.append(Problem("--model", f"is {options.model!r}, but {options.subject!r} is itself a model's name"))
    if problems or data is None or training is None:
        raise ConfigError(problems, _COMMAND)
    policy = replace(policy, learn_drop=learn_drop)
    if named is None:
        model = named_model(policy, options.model, options.subject)
        return TrialSpec(model, data, training, policy, options.seed), load_data(data)
    _check_model(named)
    images = load_data(data)
    if "num_classes" not in content["model"]:
        named = replace(named, num_classes=images.num_classes)
    return TrialSpec(named, data, training, replace(policy, model=named), options.seed), images


def _content(options: TrainOptions, policy: Policy, model: str | None, problems: list[Problem]) -> dict[str, Any]:
    """The policy's own data and training settings, and a plain model's name, with what the command line changes."""
    content: dict[str, Any] = {
        "data": dict(policy.provenance.get("data") or {}),
        "training": dict(policy.provenance.get("training") or {}),
    }
    if model is not None:
        content["model"] = {"name": model}
    known = list(content)
    if options.data is not None and options.data != content["data"].get("name"):
        content["data"] = {"name": options.data}
    if options.epochs is not None:
        content["training"]["epochs"] = options.epochs
    changed: dict[str, Any] = override(content, options.settings, problems)
    if "model" in changed and model is None:
        problems.append(Problem("--set model", "the model stands in the policy's file: change it there"))
        known.append("model")
    unknown_keys(changed, known, "", problems)
    if isinstance(changed["data"], dict) and "name" not in changed["data"]:
        whose = "" if model is not None else ", and the policy names no data"
        problems.append(Problem("--data", f"is missing{whose}: give one, as in --data digits"))
        changed["data"]["name"] = "digits"  # so that the rest is looked at too
    return changed


def _read(cls: type[Any], content: Mapping[str, Any], key: str, problems: list[Problem]) -> Any:
    return from_mapping(cls, content[key], key, problems)


def _learn_drop(text: str | None, own: LearnDrop | None, problems: list[Problem]) -> LearnDrop | None:
    """The settings that ``--learn-drop`` asks for; those of the policy where it asks for none."""
    if text is None or text.strip() == "off":
        return own if text is None else None
    if text.strip() in ("", "default"):
        return LearnDrop()
    before = len(problems)
    given = _typed_pairs(text, problems)
    kept = asdict(own) if own is not None else {}
    settings = from_mapping(LearnDrop, kept | given, "learn_drop", problems)
    return settings if len(problems) == before else own


def _typed_pairs(text: str, problems: list[Problem]) -> dict[str, Any]:
    """``threshold=0.5,features=stored``, each value as the setting's type reads it; what is wrong is left out."""
    kinds = get_type_hints(LearnDrop)
    found: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            message = f"must be default, off, or KEY=VALUE,… as in threshold=0.5,features=stored; got {pair.strip()!r}"
            problems.append(Problem(_LEARN_DROP, message))
        elif key in found:
            problems.append(Problem(f"learn_drop.{key}", "stands twice; keep one of the two"))
        else:
            found[key] = _typed(value, kinds.get(key, str), f"learn_drop.{key}", problems)
    # Told here, so that the ranges of the other settings are looked at all the same.
    unknown_keys(found, kinds, "learn_drop", problems)
    return {key: value for key, value in found.items() if key in kinds and value is not None}


def _typed(text: str, kind: type, key: str, problems: list[Problem]) -> Any:
    try:
        return kind(text)
    except ValueError:
        problems.append(Problem(key, f"must be {_NUMBERS[kind]}, got {text!r}"))
        return None


def _check_model(spec: ModelSpec) -> None:
    """A name that nothing knows may be a mistyped file; it is told before data are loaded.

    Raises:
        ModelError, ConfigError: the model cannot be built.
    """
    try:
        with torch.device("meta"):
            build_spec(replace(spec, weights=None))
    except ModelError as error:
        if ":" in spec.name or default_image_size(spec.name, spec.kwargs) is not None:
            raise
        inside = Path(spec.name) / "policy.json"
        remedy = f"did you mean {str(inside)!r}?" if inside.is_file() else "a policy is given as the path of its file"
        problem = Problem("POLICY_OR_MODEL", f"there is no file {spec.name!r} ({remedy}), and as a model: {error}")
        raise ConfigError([problem], _COMMAND) from None
