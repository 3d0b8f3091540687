"""One session of a search: from the first proposal to the last trial, or to whatever ends it before."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from optuna.exceptions import OptunaError
from ray import tune
from ray.exceptions import RayError
from ray.tune import TuneError
from rich.console import Console

from rlsearch.errors import SearchError
from rlsearch.results.tables import TrialRecord
from rlsearch.search.cluster import Slots
from rlsearch.search.cluster_access import nothing_handed_on
from rlsearch.search.distributed_trial import DistributedTrainable, SharedImages, resources_of
from rlsearch.search.failures import explained
from rlsearch.search.interrupts import StopRequest, stop_requests
from rlsearch.search.prepare import Prepared
from rlsearch.search.progress import SearchProgress
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.scheduler import Racing
from rlsearch.search.searcher import StopSearch, StudySearcher, has_failed
from rlsearch.search.stopping import StoppingRules
from rlsearch.search.study import RunStudy
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.worker import WorkerSettings
from rlsearch.training.model_factory import naming_option

# A trial whose process is lost is started once more, from its checkpoint.
_RETRIES = 1


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        folder: the run's folder.
        records: the trials that have ended, by number.
        signal_exit_code: 130 or 143 where SIGINT or SIGTERM ended it, else None.
        why_ended: why it ended before it had all its trials (a stopping rule, an exhausted space), or None.
        resume_with: options with which a resume goes on nevertheless, or None.
        model_option: what further commands on the run take to let its model's code run, with a space before it.
    """

    folder: Path
    records: tuple[TrialRecord, ...]
    signal_exit_code: int | None = None
    why_ended: str | None = None
    resume_with: str | None = None
    model_option: str = ""


class SearchSession:
    """What is trained, where it is written, and how many trials run at once.

    Args:
        prepared: the search.
        folder: of the run, locked by this process.
        study: of the run.
        slots: how many trials run at once.
        trainable: what trains; None for what `slots` ask for.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        study: RunStudy,
        slots: Slots,
        trainable: type[tune.Trainable] | None,
    ) -> None:
        self._prepared = prepared
        self._space = prepared.space
        self._folder = folder
        self._study = study
        self._slots = slots
        self._trainable = trainable or (TrialTrainable if slots.workers == 1 else DistributedTrainable)

    def run(self, console: Console, scratch: Path) -> SearchResult:
        """Trains what is left.

        Raises:
            SearchError: too many trials failed, all of them did, or a file of the run cannot be written.
        """
        rules = StoppingRules(self._space.search, self._study, self._slots.gpu * self._slots.workers)
        progress = SearchProgress(console, self._space.objectives, self._study.target, self._study.records())
        searcher = StudySearcher(
            self._space,
            self._study,
            self._folder,
            self._prepared.sampler,
            progress,
            rules,
        )
        searcher.racing = self._racing(searcher.is_protected, searcher.is_probe)
        self._study.on_wait(progress.note)
        with stop_requests() as request, progress:
            watch = _Watch(request, progress)
            searcher.error_of = watch.error_of
            try:
                cause = self._fit(searcher, watch, scratch)
            finally:
                # Where the study cannot be written, its open trials are settled by the next resume.
                with contextlib.suppress(OptunaError):
                    searcher.release()
        if cause is not None:
            option = naming_option(self._space.model.name)
            raise explained(cause, self._folder, option) from cause
        records = tuple(searcher.records[number] for number in sorted(searcher.records))
        if records and all(map(has_failed, records)) and request.signal_number is None:
            raise SearchError(_all_failed(records))
        option = naming_option(self._space.model.name)
        ending = request.exit_code, searcher.why_ended, searcher.resume_with
        return SearchResult(self._folder.path, records, *ending, model_option=option)

    def _fit(self, searcher: StudySearcher, watch: _Watch, scratch: Path) -> Exception | None:
        """Runs Tune to its end; the error that ended it before, if one did."""
        data: Any = self._prepared.data
        if self._slots.workers > 1:
            data = SharedImages(ray.put(data))
        trainable = tune.with_parameters(self._trainable, settings=self._worker_settings(), data=data)
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources_of(self._slots)),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=searcher.racing,
                num_samples=max(1, self._study.target - len(searcher.records)),
                max_concurrent_trials=self._slots.count,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
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
        cause: Exception | None = None
        try:
            with nothing_handed_on():
                tuner.fit()
        except StopSearch as stop:
            cause = stop.cause
        except (TuneError, RayError) as error:
            cause = error
        del tuner
        gc.collect()  # Ray ends the workers that nobody holds any more
        return cause

    def _worker_settings(self) -> WorkerSettings:
        return WorkerSettings(
            folder=str(self._folder.path),
            num_threads=self._slots.num_threads,
            gpu=self._slots.gpu,
            packed=self._slots.sharing,
            epoch_seconds=self._space.search.epoch_timeout,
            import_path=str(Path.cwd()),
            workers=self._slots.workers,
            cpu=self._slots.cpu,
        )

    def _racing(self, protected: Callable[[str], bool], probes: Callable[[str], bool]) -> Racing | None:
        settings = self._space.search
        if settings.min_epochs is None:
            return None
        epochs = self._space.training.epochs
        racing = Racing(settings.min_epochs, settings.eta, epochs, self._space.objectives, protected, probes)
        for record in self._study.records():
            racing.remember(f"trial {record.trial}", self._study.epochs(record.trial), record.state)
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


def _all_failed(records: Sequence[TrialRecord]) -> str:
    (reason, count), *_ = Counter(record.reason for record in records).most_common(1)
    return f"all {len(records)} trials failed; the reason of {count} of them: {reason}"
