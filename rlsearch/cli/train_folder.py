"""The folder of ``rlsearch train``: what is kept after every epoch and taken up again, and what is there at the end."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlsearch.errors import UserError
from rlsearch.export import POLICY_FILE, WEIGHTS_FILE
from rlsearch.files import write_atomic
from rlsearch.replacement import materialize
from rlsearch.training.checkpoint import load_newest, save_checkpoint, save_weights
from rlsearch.training.data import ImageData
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.trial import Trial

_HISTORY = "history"


class TrainFolder:
    """Use `opened`.

    Attributes:
        checkpoint: the file that a restart goes on from.
        history: the metrics of every epoch, as plain types.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]]) -> None:
        self.checkpoint = folder / "checkpoint.pt"
        self.history = history
        self._folder = folder

    @classmethod
    def opened(cls, folder: Path, trial: Trial) -> TrainFolder:
        """The folder, made where it is missing; the last checkpoint in it is put into the new ``trial``.

        Raises:
            UserError: the checkpoint is damaged, or of another training.
        """
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder, [])
        state = load_newest(found.checkpoint)
        if state is not None:
            trial.load_state_dict(state)
            found.history = list(state.get(_HISTORY, []))
            if len(found.history) != trial.epochs_done:
                raise UserError(f"{found.checkpoint}: holds no metrics of its epochs; start afresh in another folder")
            found._write_history()
        return found

    def keep(self, trial: Trial, metrics: EpochMetrics) -> None:
        """Writes the state after an epoch.

        The metrics stand in the checkpoint too, which is one file and whole: ``metrics.json`` is only written from it,
        so that no kill between the two files can lose an epoch, or count one twice.
        """
        self.history.append(metrics.to_dict())
        save_checkpoint(self.checkpoint, trial.state_dict() | {_HISTORY: self.history})
        self._write_history()

    def write_results(self, trial: Trial, data: ImageData) -> dict[str, Path]:
        """Writes weights, policy and, with Learn&Drop, the picture of what left when; what is where, in words."""
        written = {"weights": self._folder / WEIGHTS_FILE}
        save_weights(written["weights"], materialize(trial.model))
        spec = trial.spec
        replace(spec.policy, provenance={**spec.policy.provenance, **_provenance(trial, data)}).save(
            self._folder / POLICY_FILE
        )
        if spec.policy.learn_drop is not None:
            from rlsearch.results.dropping import write_dropping_png

            written["picture"] = self._folder / "dropping.png"
            write_dropping_png(written["picture"], self.history, f"{spec.model.name} on {spec.data.name}")
        return written

    def _write_history(self) -> None:
        write_atomic(self._folder / "metrics.json", json.dumps(self.history, indent=1).encode())


def _provenance(trial: Trial, data: ImageData) -> dict[str, Any]:
    """How the weights were made, with all that is needed to use them or to train so again."""
    return {
        "data": asdict(trial.spec.data),
        "training": asdict(trial.spec.training),
        "seed": trial.spec.seed,
        "input_shape": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": list(data.classes),
    }
