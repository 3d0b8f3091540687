"""A run with its study, as a search leaves it, but for trainings that nobody has done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlsearch.policy import Policy, Replacement
from rlsearch.search.outcome import Outcome
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.sampler import Proposal
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.study import RunStudy
from rlsearch.training.metrics import EpochMetrics


def studied_run(path: Path, model: str = "resnet20") -> Path:
    """A run of four complete trials, one that was left running, and one that had ended and was not closed."""
    folder, space = RunFolder(path), _space(model)
    folder.path.mkdir(parents=True)
    study = RunStudy.create(folder.study_path, "run", space.to_dict(), 8)
    folder.write_space(space.to_dict())
    for number in range(6):
        replaced = tuple(Replacement(f"layer{stage}.1", "skip") for stage in range(1, 1 + number % 4))
        policy = Policy(space.model, replaced)
        study.add(Proposal(policy, space.training, "baseline" if number == 0 else "sampler"), 0)
        if number < 4:
            _finish(folder, study, number)
    folder.write_trials(study.records())
    return folder.path


def rows(count: int, accuracy: float, params: int) -> tuple[Mapping[str, Any], ...]:
    """The metrics of so many epochs."""
    sizes = {"params": params, "params_total": params, "learnable_params": params, "memory": 9, "memory_predicted": 9}
    fixed: dict[str, Any] = {**sizes, "validation_loss": 0.4, "train_loss": 0.5, "lr": 0.1, "dropped_units": 0}
    fixed |= {"train_flops": 1e9, "forward_flops": 3e8, "train_seconds": 1.5, "samples_per_second": 80.0}
    fixed |= {"device": "cpu", "step_memory": 8, "forward_share": 1.0, "mean_learnable_params": float(params)}
    return tuple(
        EpochMetrics(epoch=e, epochs=2, accuracy=accuracy, **fixed, learning=(), left=()).to_dict()
        for e in range(1, count + 1)
    )


def _space(model: str) -> SearchSpace:
    return parse_space(
        {
            "model": {"name": model},
            "data": {"name": "digits"},
            "training": {"epochs": 2},
            "objectives": {"accuracy": "maximize", "params": "minimize"},
            "space": {"replacement": {"blocks": ["skip", "scalar"]}},
            "search": {"trials": 8},
        }
    ).with_num_classes(10)


def _finish(folder: RunFolder, study: RunStudy, number: int) -> None:
    record = study.finish(number, Outcome("COMPLETE", rows(2, 0.9 - 0.01 * number, 9000 - 100 * number)), {})
    folder.checkpoints(number).mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, folder.checkpoints(number) / "model.safetensors")
    folder.write_trial(record, study.epochs(number), list(study.objectives))
