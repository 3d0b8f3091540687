"""What an earlier run on the same model and space has learned, for a new search to begin with.

Only observations go over: the new search's sampler knows from its first proposal what the earlier trials' accuracies
were. Its trials, tables and front are its own; what was best before is likely to be proposed first, and trained again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from rlsearch.errors import RunFolderError, UserError
from rlsearch.policy import Policy
from rlsearch.search.database import Told, unheard
from rlsearch.search.observations import Observed, observe
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.space import SearchSpace
from rlsearch.search.study import RunStudy
from rlsearch.training.loop import TrainingSpec

# What decides about an accuracy, and what may be chosen; budgets, bounds and resources may differ.
_SECTIONS = ("model", "data", "training", "space")
# How images and weights get here says nothing of what they are.
_IRRELEVANT = ("data.root", "data.download", "data.stream", "data.workers", "model.download")


def read_warm_start(folder: Path, space: SearchSpace, told: Told = unheard) -> list[Observed]:
    """What the trials of an earlier run tell, those included that it began with itself.

    Args:
        folder: of that run; a search may be going on in it.
        space: of the new search, with its number of classes.
        told: hears what it waits for, where that run's database is locked or away.

    Raises:
        RunFolderError: there is no run, it is damaged, or none of its trials was trained.
        UserError: it searched another model or space, or the new search's sampler does not learn from it.
    """
    if space.search.sampler.name != "front" or "accuracy" not in space.objectives:
        raise UserError("--warm-start: only search.sampler: front learns from it, with accuracy among the objectives")
    run = RunFolder(folder)
    run.check_run()
    study = RunStudy.open(run.study_path, told)
    differences = list(_differences(study.space, space.to_dict()))
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise UserError(f"--warm-start {folder}: that run searched another model or space:\n{listed}")
    trials = study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    found = [*from_content(study.warm_start), *(item for trial in trials if (item := observe(trial)) is not None)]
    if not any(item.is_whole for item in found):
        raise RunFolderError(f"--warm-start {folder}: none of its trials is complete, so there is nothing to learn")
    return found


def to_content(observed: Sequence[Observed]) -> list[dict[str, Any]]:
    """Plain types, for the study."""
    return [
        {
            "policy": item.policy.to_dict(),
            "training": asdict(item.training),
            "params": dict(item.params),
            "accuracy": list(item.curve),
            "whole": item.is_whole,
        }
        for item in observed
    ]


def from_content(content: Sequence[Mapping[str, Any]]) -> list[Observed]:
    """What `to_content` wrote."""
    return [
        Observed(
            policy=Policy.from_dict(row["policy"]),
            training=TrainingSpec(**row["training"]),
            params=row["params"],
            curve=tuple(row["accuracy"]),
            final={},
            is_whole=row["whole"],
            is_running=False,
            is_feasible=True,
        )
        for row in content
    ]


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """One line for each setting that differs."""
    before, now = _flat({name: there[name] for name in _SECTIONS}), _flat({name: here[name] for name in _SECTIONS})
    for key in dict.fromkeys((*before, *now)):
        if key not in _IRRELEVANT and before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)} there, {now.get(key)} here"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found
