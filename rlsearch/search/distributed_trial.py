"""Trials that several processes train together, each on a GPU (or a share of the CPU) of its own.

Tune's actor trains nothing itself: it hands the epochs to the trial's processes, and what they report to Tune. So it is
never caught in a communication that one of them has left, and can tell a lost process from a training that failed.

Ray Train's trainer would reserve a placement group of its own, beside the one that the trial holds already, and so wait
for ever on a cluster that the trial fills; and it starts its workers anew for every trial. The processes are therefore
plain actors in the trial's own placement group, and live on from trial to trial.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsearch.errors import DivergedError, RunFolderError, TrialError, UserError
from rlsearch.search.cluster import Slots
from rlsearch.search.worker import Job, TrainingProcess, WorkerSettings

if TYPE_CHECKING:  # torch is loaded by the processes that train, once
    from pathlib import Path

    from rlsearch.training.data import ImageData
    from rlsearch.training.trial import Trial
    from rlsearch.training.trial_spec import TrialSpec

# On one machine the processes talk over its loopback interface alone.
_LOOPBACK = "127.0.0.1"
# After one process has failed, how long what the others say is waited for: where one was killed, the others' failures
# to reach it may be known before its death is.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class SharedImages:
    """The images in the cluster's shared memory: the processes look them up there, and Tune's actor never does."""

    reference: ray.ObjectRef


class Rank(TrainingProcess):
    """One of the processes that train a trial together; the first one writes its files.

    Args:
        settings: of the search.
        data: the images.
        rank: its number, from 0.
    """

    def __init__(self, settings: WorkerSettings, data: ImageData, rank: int) -> None:
        self._rank = rank
        self._port = 0
        self.prepare(settings, data)

    def host(self) -> str:
        """The address of this process's machine."""
        return str(ray.util.get_node_ip_address())

    def open_store(self, host: str) -> int:
        """Lets the others find each other here; the port."""
        from rlsearch.training.distributed import open_store

        self._store, self._port = open_store(host)
        return self._port

    def join(self, host: str, port: int) -> None:
        """Makes this process one of those that train together."""
        import torch

        from rlsearch.training.distributed import find_store, join, loopback_environment

        if host == _LOOPBACK:
            os.environ.update(loopback_environment())
        store = self._store if self._rank == 0 else find_store(host, port)
        device = torch.device("cuda" if self._settings.gpu else "cpu")
        self._group = join(store, self._rank, self._settings.workers, device)

    def make_trial(self, spec: TrialSpec) -> Trial:
        """This process's part of the training of ``spec``."""
        from rlsearch.training.trial import Trial

        return Trial(spec, data=self._data, device="cuda" if self._settings.gpu else "cpu", group=self._group)

    def save_result(self, folder: Path) -> None:
        """The first process keeps the weights."""
        if self._rank == 0:
            super().save_result(folder)

    def _start(self) -> Trial:
        trial = super()._start()
        done = self._group.from_first(trial.epochs_done)
        if not self._group.all_true(done == trial.epochs_done):
            raise RunFolderError(f"{self._job.checkpoints}: not all of the trial's processes could read its checkpoint")
        return trial

    def _save_state(self) -> None:
        if self._rank == 0:
            super()._save_state()

    def _failure(self, error: Exception) -> dict[str, Any]:
        # What is wrong with a trial, or a loss that all of them have summed, all processes find at the same point.
        return super()._failure(error) | {"in_step": isinstance(error, DivergedError | UserError)}


class DistributedTrainable(tune.Trainable):
    """Has one `rlsearch.search.worker.Job` after the other trained by processes that work together.

    Results are those of `TrainingProcess`. A process that is lost is an error, as it is where a trial has one alone:
    Tune starts the trial once more, from its checkpoint.
    """

    rank_class: ClassVar[type[Rank]] = Rank

    def setup(self, config: dict[str, Any], settings: WorkerSettings, data: SharedImages) -> None:
        """Called once a process.

        Args:
            config: holds the first ``job``.
            settings: of the search.
            data: the images.
        """
        self._settings = settings
        self._data = data
        self._ranks: list[Any] = []
        self._job: Job = config["job"]
        self._has_begun = False

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next job."""
        self._job = new_config["job"]
        self._has_begun = False
        return True

    def step(self) -> dict[str, Any]:
        """One epoch.

        Raises:
            TrialError: a process was lost.
        """
        try:
            if not self._ranks:
                self._start_ranks()
            if not self._has_begun:
                self._of_all("begin", self._job)
                self._has_begun = True
            results = self._of_all("step")
        except RayError as error:
            self.cleanup()
            told = str(error).strip().splitlines()[0]
            raise TrialError(f"one of the trial's {self._settings.workers} processes was lost: {told}") from None
        failed = [result for result in results if _has_failed(result)]
        in_step = [result.pop("in_step") for result in failed]
        if failed and not (all(in_step) and len(failed) == len(self._ranks)):
            # The others may hang in the middle of a step that this one has left.
            self.cleanup()
        result: dict[str, Any] = (failed or results)[0]
        return result

    def cleanup(self) -> None:
        """Ends the processes."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []
        self._has_begun = False

    def _start_ranks(self) -> None:
        """Starts the processes, one in each bundle of the trial's placement group."""
        settings, group = self._settings, ray.util.get_current_placement_group()
        actor = ray.remote(self.rank_class)
        self._ranks = [
            actor.options(
                num_cpus=settings.cpu,
                num_gpus=settings.gpu,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            ).remote(settings, self._data.reference, rank)
            for rank in range(settings.workers)
        ]
        hosts = self._of_all("host")
        host = _LOOPBACK if len(set(hosts)) == 1 else hosts[0]
        port = ray.get(self._ranks[0].open_store.remote(host))
        self._of_all("join", host, port)

    def _of_all(self, method: str, *arguments: Any) -> list[Any]:
        """What the processes' method returns, the first process's first; where some report a failure, in the order in
        which they did, and without those that were not done soon after.

        Raises:
            RayError: one of them is gone, or raises.
        """
        waiting = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        order = {reference: number for number, reference in enumerate(waiting)}
        found: list[tuple[int, Any]] = []
        deadline: float | None = None
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, waiting = ray.wait(waiting, timeout=left)
            if not ready:
                break
            result = ray.get(ready[0])
            found.append((order[ready[0]], result))
            if deadline is None and _has_failed(result):
                # Memory that ran out is no consequence of anything else's end.
                out_of_memory = result["outcome"].state == "INFEASIBLE"
                deadline = time.monotonic() + (0 if out_of_memory else _GRACE_SECONDS)
        if deadline is None:
            found.sort(key=lambda item: item[0])
        return [result for _, result in found]


def resources_of(slots: Slots) -> dict[str, float] | tune.PlacementGroupFactory:
    """What Tune reserves for a trial: with several processes a bundle for each, and none for its own actor."""
    if slots.workers == 1:
        return {"cpu": slots.cpu, "gpu": slots.gpu}
    return tune.PlacementGroupFactory([{}, *({"CPU": slots.cpu, "GPU": slots.gpu},) * slots.workers])


def _has_failed(result: Any) -> bool:
    return isinstance(result, dict) and result["outcome"].state in ("FAIL", "INFEASIBLE")
