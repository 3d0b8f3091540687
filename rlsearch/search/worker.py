"""What a process of a search does: it trains many trials, one after the other.

Whatever a training raises is reported as that trial's result. An exception would cost the process with the images on
its device and its compiled kernels, and Tune would know no more than that something failed.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rlsearch.errors import OutOfMemoryError, RunFolderError, TrialError, UserError
from rlsearch.files import is_storage_failure
from rlsearch.search.cluster import memory_fraction
from rlsearch.search.hang import ends_when_hung
from rlsearch.search.outcome import STORAGE, Outcome
from rlsearch.search.settings import EPOCH_TIMEOUT

if TYPE_CHECKING:  # torch is loaded by the process that trains, once
    from rlsearch.training.data import ImageData
    from rlsearch.training.image_batches import ImageBatches
    from rlsearch.training.trial import Trial
    from rlsearch.training.trial_spec import TrialSpec

CHECKPOINT = "last.pt"
"""What a trial under way goes on from, in its own folder."""

_DETAIL_LINES = 12
_REASON_LENGTH = 300
# A checkpoint takes time and disk: so many times as long is trained before the next one.
_SAVING_SHARE = 50


@dataclass(frozen=True)
class WorkerSettings:
    """What all trials of a search have in common.

    Attributes:
        folder: the run's folder; on a cluster it lies on storage that all nodes share.
        num_threads: CPU threads of one process.
        gpu: the share of a GPU that a process may use; 0 trains on the CPU.
        packed: how many trials may train on one device at once.
        import_path: where the driver runs, for a user's own ``package.module:factory``.
        checkpoint_seconds: training time between two checkpoints, more where one takes long to write; shorter trials
            write none; 0 writes one after every step.
        epoch_seconds: a process in which an epoch takes longer counts as hung, and ends itself.
        workers: how many processes train one trial together.
        cpu: the CPU cores that each of them is counted as.
    """

    folder: str
    num_threads: int = 1
    gpu: float = 0.0
    packed: int = 1
    import_path: str = ""
    checkpoint_seconds: float = 10.0
    epoch_seconds: float = EPOCH_TIMEOUT
    workers: int = 1
    cpu: float = 1.0


@dataclass(frozen=True)
class Job:
    """One trial, as the driver hands it to a worker.

    Attributes:
        number: in the study.
        spec: what to train.
        checkpoints: the trial's own folder.
    """

    number: int
    spec: TrialSpec
    checkpoints: str


class TrainingProcess:
    """Trains one `Job` after the other. A result holds the last epoch's metrics, flat, and an `Outcome`.

    The outcome's state is COMPLETE on the result that is ``done``, FAIL or INFEASIBLE on one that failed.
    """

    def prepare(self, settings: WorkerSettings, data: ImageData) -> None:
        """Called once a process.

        Args:
            settings: of the search.
            data: the images; they lie in shared memory, once a node.
        """
        self._settings = settings
        self._data: ImageData | ImageBatches = data
        self.prepare_process()

    def begin(self, job: Job) -> None:
        """Takes the next job."""
        self._release()
        self._job = job
        self._epochs: list[dict[str, Any]] = []
        self._note: str | None = None
        self._saved_at = time.monotonic()
        self._saving_seconds = 0.0

    def step(self) -> dict[str, Any]:
        """One epoch."""
        folder = Path(self._settings.folder)
        try:
            if not folder.is_dir():
                node = ray.util.get_node_ip_address()
                remedy = "give a --run-dir on storage that all nodes share"
                raise RunFolderError(f"{folder}: is not there on node {node}; {remedy}")
            with ends_when_hung(Path(self._job.checkpoints), self._settings.epoch_seconds):
                return self._advance()
        except Exception as error:  # noqa: BLE001  # whatever a training raises is that trial's result
            result = self._failure(error)
        # The error, whose frames hold the tensors of the training that failed, is gone only now.
        self._free_memory()
        return result

    def prepare_process(self) -> None:
        """Gives this process its share of the machine."""
        import torch

        if self._settings.import_path not in sys.path:
            sys.path.insert(0, self._settings.import_path)
        torch.set_num_threads(self._settings.num_threads)
        if 0 < self._settings.gpu < 1:
            # Ray's fractions are only counted; this makes a trial that outgrows its share fail alone.
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(memory_fraction(self._settings.gpu, total))

    def make_trial(self, spec: TrialSpec) -> Trial:
        """The training of ``spec``; what a benchmark of the machinery replaces."""
        from rlsearch.training.trial import Trial

        trial = Trial(spec, data=self._data, device="cuda" if self._settings.gpu else "cpu")
        self._data = trial.images  # they stay on the device for the trials to come
        return trial

    def save_result(self, folder: Path) -> None:
        """Keeps the weights of the trial that is done."""
        from rlsearch.training.checkpoint import save_weights

        assert self._trial is not None  # it is done
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / "model.safetensors", self._trial.model)

    def _release(self) -> None:
        self._trial: Trial | None = None

    def _advance(self) -> dict[str, Any]:
        if self._trial is None:
            self._trial = self._start()
        if not self._trial.done:
            self._epochs.append(self._trial.run_epoch(self._save_state).to_dict() | {"packed": self._settings.packed})
        if self._trial.done:
            self.save_result(Path(self._job.checkpoints))
            return self._result("COMPLETE", done=True, reason=self._note)
        self._save_state()
        return self._result("RUNNING", done=False, reason=self._note)

    def _start(self) -> Trial:
        """The job's trial, from its checkpoint where an interruption left one."""
        trial = self.make_trial(self._job.spec)
        from rlsearch.training.checkpoint import found_checkpoints, load_checkpoint

        failure = None
        for path in found_checkpoints(Path(self._job.checkpoints) / CHECKPOINT):
            try:
                state = load_checkpoint(path)
                trial.load_state_dict(state["trial"])
                self._epochs = list(state["epochs"])
            except (UserError, KeyError, RuntimeError, ValueError, TypeError) as error:
                failure = failure or _reason(error)
                trial = self.make_trial(self._job.spec)  # the state of the other one may be half changed
                continue
            if failure is not None:
                self._note = f"went on from the checkpoint before the last, which could not be used: {failure}"
            return trial
        if failure is not None:
            self._note = f"started again, its checkpoint could not be used: {failure}"
        return trial

    def _save_state(self) -> None:
        """Writes a checkpoint once enough training is at stake."""
        now, pause = time.monotonic(), self._settings.checkpoint_seconds
        if pause and now - self._saved_at < max(pause, _SAVING_SHARE * self._saving_seconds):
            return
        from rlsearch.training.checkpoint import save_checkpoint

        assert self._trial is not None  # it has just trained
        folder = Path(self._job.checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder / CHECKPOINT, {"trial": self._trial.state_dict(), "epochs": self._epochs})
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - now

    def _result(self, state: str, *, done: bool, reason: str | None, detail: str | None = None) -> dict[str, Any]:
        metrics: Mapping[str, Any] = self._epochs[-1] if self._epochs else {}
        return {**metrics, "outcome": Outcome(state, tuple(self._epochs), reason, detail), "done": done}

    def _failure(self, error: Exception) -> dict[str, Any]:
        detail = "".join(traceback.format_exception(error)).splitlines()[-_DETAIL_LINES:]
        state = "INFEASIBLE" if isinstance(error, OutOfMemoryError) else "FAIL"
        reason = _reason(error)
        if isinstance(error, OSError) and is_storage_failure(error):
            reason = f"{STORAGE}: {error.filename or self._job.checkpoints}: cannot be written ({error.strerror})"
        self._release()
        return self._result(state, done=True, reason=reason, detail="\n".join(detail))

    def _free_memory(self) -> None:
        """Gives the failed training's memory back before the next one starts."""
        gc.collect()
        if self._settings.gpu:
            import torch

            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """The short word of the failure, and what its message says, on one line."""
    word = error.reason if isinstance(error, TrialError) else type(error).__name__
    reason = f"{word}: {' '.join(str(error).split()) or 'no message'}"
    return reason if len(reason) <= _REASON_LENGTH else f"{reason[: _REASON_LENGTH - 1]}…"
