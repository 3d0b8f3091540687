"""The searcher, the study and the tables of a search, driven as Tune drives them, with made-up metrics."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsearch.search.outcome import Outcome
from rlsearch.search.prepare import Prepared
from rlsearch.search.progress import SearchProgress
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.searcher import StopSearch, StudySearcher
from rlsearch.search.stopping import StoppingRules
from rlsearch.search.study import RunStudy
from rlsearch.search.study_file import STUDY_FILES
from rlsearch.search.unsaved import settle
from rlsearch.training.metrics import EpochMetrics

BASELINE = {"accuracy": 0.9, "params": 272_474, "memory": 9_000_000, "train_flops": 1e10}


def content(**changes: Any) -> dict[str, Any]:
    space = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "limit": 60},
        "training": {"epochs": 2, "batch_size": 32},
        "objectives": {"accuracy": "maximize", "params": "minimize", "train_flops": "minimize"},
        "space": {
            "replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.5},
            "learn_drop": {"threshold": {"low": 0.001, "high": 0.1, "log": True}},
        },
        "search": {"trials": 8, "startup_trials": 4, "baseline_seeds": 1},
    }
    return space | changes


class Search:
    """The parts of a search in one folder; opened again, it is what a resume finds."""

    def __init__(self, path: Path, prepared: Prepared, gpus: float = 0.0, storage: str = "sqlite") -> None:
        self.folder = RunFolder(path)
        self.space = prepared.space
        path.mkdir(exist_ok=True)
        if self.folder.study_path.exists():
            self.study = RunStudy.open(self.folder.study_path)
            settle(self.study, path)
            self.folder.follow(self.study.records(), self.study.epochs, list(self.space.objectives))
        else:
            resolved = self.space.to_dict()
            file = path / STUDY_FILES[storage]
            self.study = RunStudy.create(
                file, f"{path.name}-{secrets.token_hex(4)}", resolved, self.space.search.trials
            )
        progress = SearchProgress(Console(quiet=True), self.space.objectives, self.space.search.trials)
        self.rules = StoppingRules(self.space.search, self.study, gpus)
        self.searcher = StudySearcher(self.space, self.study, self.folder, prepared.sampler, progress, self.rules)

    def start(self, trial_id: str) -> int:
        """Starts a trial; its number."""
        config = self.searcher.suggest(trial_id)
        assert isinstance(config, dict)
        self.searcher.on_trial_result(trial_id, {"outcome": Outcome("RUNNING", rows(1))})
        return int(config["job"].number)

    def end(self, trial_id: str, state: str = "COMPLETE", reason: str | None = None, **metrics: float) -> bool:
        """Ends a trial as its Trainable would report it; whether the search is over."""
        outcome = Outcome(state, rows(2, **metrics), reason)
        try:
            self.searcher.on_trial_complete(trial_id, {**outcome.final, "outcome": outcome, "done": True})
        except StopSearch as stop:
            if stop.cause is not None:
                raise
            return True
        return False

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study.study.get_trials(deepcopy=False)]


def rows(count: int, **metrics: float) -> tuple[Mapping[str, Any], ...]:
    """The metrics of ``count`` of two epochs."""
    measured = BASELINE | metrics
    fixed: dict[str, Any] = {"validation_loss": 0.4, "train_loss": 0.5, "lr": 0.1, "params_total": 272_474}
    fixed |= {"learnable_params": 272_474, "memory_predicted": 9_000_000, "forward_flops": 3e9, "train_seconds": 1.5}
    fixed |= {"samples_per_second": 80.0, "dropped_units": 0, "device": "cpu", "step_memory": 8_000_000}
    fixed |= {"forward_share": 0.8, "mean_learnable_params": 250_000.0, "learning": ("head",), "left": ("stem",)}
    return tuple(EpochMetrics(epoch=e, epochs=2, **{**fixed, **measured}).to_dict() for e in range(1, count + 1))
