"""A search in one process: all of a search's own parts and real trainings, without Ray and Tune.

Tests take it where the cluster is not the point: a trial of it takes a third of a second.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsearch.search.outcome import Outcome
from rlsearch.search.prepare import prepare
from rlsearch.search.progress import SearchProgress
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.searcher import StopSearch, StudySearcher
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.study import RunStudy
from rlsearch.search.worker import TrainingProcess, WorkerSettings

CONTENT: dict[str, Any] = {
    "model": {"name": "resnet20"},
    "data": {"name": "digits", "limit": 60},
    "training": {"epochs": 1, "batch_size": 32},
    "objectives": {"accuracy": "maximize", "params": "minimize", "train_flops": "minimize"},
    "constraints": {"train_flops": "<= 1.5x"},
    "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.5}},
    "search": {"trials": 6, "startup_trials": 2, "baseline_seeds": 1, "max_concurrent": 2},
    "resources": {"cpu": 1, "gpu": 0},
}
"""A search whose trials take as little as real ones can."""


def make_searcher(folder: RunFolder, study: RunStudy, space: SearchSpace, sampler: PolicySampler) -> StudySearcher:
    """What asks and tells in a driver."""
    return StudySearcher(
        space, study, folder, sampler, SearchProgress(Console(quiet=True), space.objectives, study.target)
    )


def search_in_one_process(path: Path, trials: int, untold: int = 0) -> list[dict[str, Any]]:
    """Starts a search, and trains its trials one after the other.

    Args:
        path: the run's folder.
        trials: how many come to their end.
        untold: how many more are trained, whose end nobody is told: they wait to be taken up again.

    Returns:
        what each of them reported last, as plain types.
    """
    prepared = prepare(parse_space(CONTENT | {"search": {**CONTENT["search"], "trials": trials + untold}}))
    folder, space, outcomes = RunFolder(path), prepared.space, []
    with folder.locked():
        study = RunStudy.create(folder.study_path, "run", space.to_dict(), space.search.trials)
        folder.write_space(space.to_dict())
        searcher = make_searcher(folder, study, space, prepared.sampler)
        worker = TrainingProcess()
        worker.prepare(WorkerSettings(str(path)), prepared.data)
        with contextlib.suppress(StopSearch):  # all have ended
            for number in range(trials + untold):
                config = searcher.suggest(str(number))
                assert isinstance(config, dict)
                worker.begin(config["job"])
                result = worker.step()
                outcomes.append(result["outcome"].to_dict())
                if number < trials:
                    searcher.on_trial_complete(str(number), result)
        searcher.release()
    return outcomes


def end_next_trial(path: Path, outcome: dict[str, Any]) -> None:
    """Takes up the run's next trial and ends it as one that reported ``outcome``, as a driver does it."""
    folder = RunFolder(path)
    study = RunStudy.open(folder.study_path)
    space = parse_space(study.space)
    # Nothing is proposed here: the trial waits.
    searcher = make_searcher(folder, study, space, None)  # type: ignore[arg-type]
    assert isinstance(searcher.suggest("next"), dict)
    with contextlib.suppress(StopSearch):  # all have ended
        searcher.on_trial_complete("next", {"outcome": Outcome.from_dict(outcome)})
