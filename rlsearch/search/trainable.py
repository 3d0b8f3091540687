"""Tune's Trainable around trials that one process trains each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import tune

from rlsearch.search.worker import TrainingProcess, WorkerSettings

if TYPE_CHECKING:  # torch is loaded by the process that trains, once
    from rlsearch.training.data import ImageData


class TrialTrainable(TrainingProcess, tune.Trainable):
    """Trains one `rlsearch.search.worker.Job` after the other in its own process."""

    def setup(self, config: dict[str, Any], settings: WorkerSettings, data: ImageData) -> None:
        """Called once a process.

        Args:
            config: holds the first ``job``.
            settings: of the search.
            data: the images; they lie in shared memory, once a node.
        """
        self.prepare(settings, data)
        self.begin(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next job."""
        self.begin(new_config["job"])
        return True

    def cleanup(self) -> None:
        """Lets go of the model before the process ends."""
        self._release()
