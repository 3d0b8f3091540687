"""Starting a search and going on with one: where the study, the folder, the sampler and Ray meet.

A resume never reads what Tune wrote about itself. It reads the study, settles what was left open, and runs a new Tuner
for what is left.
"""

from __future__ import annotations

import gc
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from rich.console import Console

from rlsearch.errors import ConfigError, SearchError, UserError
from rlsearch.policy import Policy
from rlsearch.results.tables import TrialRecord
from rlsearch.search.check import build_unallocated, check_space
from rlsearch.search.cluster import Slots, gpu_memory_bytes, plan_slots, ray_cluster
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.interrupts import StopRequest, stop_requests
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.progress import SearchProgress
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.scheduler import Racing
from rlsearch.search.searcher import StopSearch, StudySearcher
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.study import RunStudy
from rlsearch.search.trainable import TrialTrainable, WorkerSettings
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.models import build_spec

# A trial whose process is lost is started once more, from its checkpoint.
_RETRIES = 1


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        folder: the run's folder.
        records: the trials that have ended, by number.
        signal_exit_code: 130 or 143 where SIGINT or SIGTERM ended it, else None.
        why_ended: why it ended before it had all its trials (the time budget, an exhausted space), or None.
    """

    folder: Path
    records: tuple[TrialRecord, ...]
    signal_exit_code: int | None = None
    why_ended: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A search whose space, model and data have been looked at and found good.

    Attributes:
        space: with the data's number of classes.
        data: the images.
        sampler: proposes policies.
        predicted_bytes: the memory of the baseline's training, as predicted.
    """

    space: SearchSpace
    data: ImageData
    sampler: PolicySampler
    predicted_bytes: int


def start_search(
    space: SearchSpace,
    run_dir: str | Path,
    *,
    address: str = "local",
    console: Console | None = None,
    trainable: type[TrialTrainable] = TrialTrainable,
) -> SearchResult:
    """Runs a search from its beginning, in a folder of its own.

    Args:
        space: what is searched, and for how long.
        run_dir: the run's folder; made once everything else has been checked.
        address: ``local``, or the address of a Ray cluster; then ``run_dir`` must lie on storage that all nodes share.
        console: where progress is shown; None for the standard output.
        trainable: what trains; another one replaces the training itself, as a benchmark of the machinery does.

    Raises:
        UserError: the space, the model, the data or the folder is wrong; nothing was written then.
        SearchError: Ray cannot be started, too many trials failed, or all of them did.
    """
    folder = RunFolder(run_dir)
    folder.check_free()
    prepared = prepare(space, address)
    with ray_cluster(address, _size(prepared.data)) as scratch:
        slots = _slots(prepared)
        with folder.locked():
            folder.check_free()  # another search may have taken it since
            content = prepared.space.to_dict()
            name = f"{_plain_name(folder.path.name)}-{secrets.token_hex(4)}"
            study = RunStudy.create(folder.study_path, name, content, prepared.space.search.trials)
            folder.write_space(content)
            return _Search(prepared, folder, study, slots, trainable).run(console or Console(), scratch)


def resume_search(
    run_dir: str | Path,
    *,
    trials: str | int | None = None,
    time_budget: float | None = None,
    address: str = "local",
    console: Console | None = None,
    trainable: type[TrialTrainable] = TrialTrainable,
) -> SearchResult:
    """Goes on with a search, however it ended: what was interrupted first, then what is left.

    Args:
        run_dir: the run's folder.
        trials: how many trials the search is to end with, ``+50`` for so many more than planned, None for as planned.
        time_budget: seconds after which no further trial starts; None for the search space's own.
        address: as for `start_search`.
        console: as for `start_search`.
        trainable: as for `start_search`.

    Raises:
        UserError: there is no run, it is in use, it is damaged, or its search space was changed.
        SearchError: as for `start_search`.
    """
    folder = RunFolder(run_dir)
    folder.check_run()
    with folder.locked():
        study = RunStudy.open(folder.study_path)
        folder.check_space(study.space)
        target = _target(trials, study)
        space = parse_space(study.space, str(folder.study_path))
        space = replace(space, search=replace(space.search, trials=target))
        if time_budget is not None:
            space = replace(space, search=replace(space.search, time_budget=time_budget))
        study.reconcile()
        folder.follow(study.records(), study.epochs, list(space.objectives))
        study.target = target
        if len(study.records()) >= target:
            return SearchResult(folder.path, tuple(study.records()))
        prepared = prepare(space, address)
        folder.write_versions("resume")
        with ray_cluster(address, _size(prepared.data)) as scratch:
            search = _Search(prepared, folder, study, _slots(prepared), trainable)
            return search.run(console or Console(), scratch)


def prepare(space: SearchSpace, address: str = "local") -> Prepared:
    """Looks at the model and the data of a search space; nothing is written but torchvision's cache.

    Raises:
        UserError: something is wrong with one of them.
    """
    problems = check_space(space)
    if problems:
        raise ConfigError(problems, "search space")
    data = load_data(space.data)
    space = space.with_num_classes(data.num_classes)
    if space.model.weights is not None:
        build_spec(space.model)  # fetches them once, before many workers would
    model = build_unallocated(space)
    on_gpu = space.resources.gpu != 0 and (
        torch.cuda.is_available() or (address != "local" and bool(space.resources.gpu))
    )
    costs = ExactCosts(model, data.input_shape, "cuda" if on_gpu else "cpu")
    baseline = Policy(space.model)
    constraints = HardConstraints(space.constraints, costs, baseline, space.training)
    sampler = PolicySampler(PolicySpace(space, model, data.input_shape), constraints)
    return Prepared(space, data, sampler, costs.cost(baseline, space.training).memory)


class _Search:
    """One session of a search: from Ray's start to the last trial, or to whatever ends it before."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        study: RunStudy,
        slots: Slots,
        trainable: type[TrialTrainable],
    ) -> None:
        self._prepared = prepared
        self._space = prepared.space
        self._folder = folder
        self._study = study
        self._slots = slots
        self._trainable = trainable

    def run(self, console: Console, scratch: Path) -> SearchResult:
        """Trains what is left.

        Raises:
            SearchError: too many trials failed, all of them did, or a file of the run cannot be written.
        """
        started = time.monotonic()
        budget = self._space.search.time_budget
        progress = SearchProgress(console, self._space.objectives, self._study.target, self._study.records())
        searcher = StudySearcher(
            self._space,
            self._study,
            self._folder,
            self._prepared.sampler,
            progress,
            None if budget is None else started + budget,
        )
        searcher.racing = self._racing(searcher.is_protected)
        with stop_requests() as request, progress:
            watch = _Watch(request, progress)
            searcher.error_of = watch.error_of
            cause = self._fit(searcher, watch, scratch)
            searcher.release()
        if cause is not None:
            raise _explained(cause, self._folder) from cause
        records = tuple(searcher.records[number] for number in sorted(searcher.records))
        if records and all(record.state == "FAIL" for record in records) and request.signal_number is None:
            raise SearchError(_all_failed(records))
        return SearchResult(self._folder.path, records, request.exit_code, searcher.why_ended)

    def _fit(self, searcher: StudySearcher, watch: _Watch, scratch: Path) -> Exception | None:
        """Runs Tune to its end; the error that ended it before, if one did."""
        trainable = tune.with_parameters(self._trainable, settings=self._worker_settings(), data=self._prepared.data)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": self._slots.cpu, "gpu": self._slots.gpu}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=searcher.racing,
                num_samples=max(1, self._study.target - len(searcher.records)),
                max_concurrent_trials=self._slots.count,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # what Tune would say, the run's own progress says
        try:
            tuner.fit()
        except StopSearch as stop:
            return stop.cause
        finally:
            del tuner
            gc.collect()  # Ray ends the workers that nobody holds any more
        return None

    def _worker_settings(self) -> WorkerSettings:
        return WorkerSettings(
            folder=str(self._folder.path),
            num_threads=self._slots.num_threads,
            gpu=self._slots.gpu,
            import_path=str(Path.cwd()),
        )

    def _racing(self, protected: Callable[[str], bool]) -> Racing | None:
        settings = self._space.search
        if settings.min_epochs is None:
            return None
        racing = Racing(
            settings.min_epochs, settings.eta, self._space.training.epochs, self._space.objectives, protected
        )
        for record in self._study.records():
            for row in self._study.epochs(record.trial):
                racing.remember(row)
        return racing


class _Watch(tune.Callback):
    """Looks in every round of Tune's loop whether somebody asked the search to stop; knows why workers were lost."""

    def __init__(self, request: StopRequest, progress: SearchProgress) -> None:
        self._request = request
        self._progress = progress
        self._trials: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which never happens here."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Leaves the loop, at most a tenth of a second after the signal."""
        self._trials = trials
        if self._request.signal_number is not None:
            self._progress.note("stopping: what is under way goes on at the next resume")
            raise StopSearch

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker was lost; its trial starts again."""
        self._progress.note(f"trial {trial.config['job'].number}: its process was lost; it starts once more")

    def error_of(self, trial_id: str) -> str:
        """What Ray says about the loss of a trial's worker."""
        file = next((trial.error_file for trial in self._trials if trial.trial_id == trial_id), None)
        return Path(file).read_text(encoding="utf-8") if file else ""


def _slots(prepared: Prepared) -> Slots:
    resources = prepared.space.resources
    return plan_slots(
        resources.cpu,
        resources.gpu,
        prepared.predicted_bytes,
        ray.cluster_resources(),
        gpu_memory_bytes(),
        prepared.space.search.max_concurrent,
    )


def _size(data: ImageData) -> int:
    """Bytes of the images."""
    return int(data.train.images.nbytes + data.validation.images.nbytes)


def _target(trials: str | int | None, study: RunStudy) -> int:
    """How many trials a resumed search ends with."""
    if trials is None:
        return study.target
    text = str(trials).strip()
    if not re.fullmatch(r"\+?\d+", text):
        raise UserError(f"--trials: must be a whole number, or one with a plus for so many more, got {text!r}")
    target = study.target + int(text) if text.startswith("+") else int(text)
    least = max(1, study.num_trials)
    if target < least:
        raise UserError(f"--trials: must be at least {least}, as many as the run has already, got {target}")
    return target


def _plain_name(name: str) -> str:
    """A study's name of the characters that names may have, at most 64 with what is added to it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:50] or "run"


def _explained(cause: Exception, folder: RunFolder) -> Exception:
    """A full disk and the like as the search's own failure; what is lost, and what to do."""
    if not isinstance(cause, OSError):
        return cause
    return SearchError(
        f"{cause.filename or folder.path}: cannot be written ({cause.strerror or cause}); nothing that ended is lost: "
        f"mend it, then go on by `rlsearch resume {folder.path}`"
    )


def _all_failed(records: Sequence[TrialRecord]) -> str:
    (reason, count), *_ = Counter(record.reason for record in records).most_common(1)
    return f"all {len(records)} trials failed; the reason of {count} of them: {reason}"
