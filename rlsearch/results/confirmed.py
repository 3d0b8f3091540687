"""``confirmed.parquet``: one row a training of `rlsearch confirm`, with a new seed, measured on the test split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from rlsearch.results.table_file import INTEGER, METRIC_TYPES, NUMBER, TEXT, TIME, read_records, write_rows

_REMEDY = "restore it from a copy, or move it away: `rlsearch confirm` then trains anew"
_CONFIRMED = pa.schema(
    {"trial": INTEGER, "policy_hash": TEXT, "seed": INTEGER, "reason": TEXT, "fidelity": INTEGER}
    | {"test_accuracy": NUMBER}
    | METRIC_TYPES
    | {"device": TEXT, "ended": TIME}
)


@dataclass(frozen=True)
class ConfirmedTraining:
    """One training of a trial's policy with a new seed, alone on its device.

    Attributes:
        trial: the trial whose policy and training settings it has.
        policy_hash: of the policy.
        seed: of this training.
        reason: why there is no result (``diverged: …``); None where there is one.
        fidelity: epochs trained.
        test_accuracy: top-1 on the test split, in [0, 1].
        accuracy: top-1 on the validation split, as in `TrialRecord`; so are the others, measured in this training.
        device: what it ran on.
        ended: when it ended, with a time zone.
    """

    trial: int
    policy_hash: str
    seed: int
    reason: str | None = None
    fidelity: int | None = None
    test_accuracy: float | None = None
    accuracy: float | None = None
    params: int | None = None
    params_total: int | None = None
    memory: int | None = None
    memory_predicted: int | None = None
    train_flops: float | None = None
    forward_flops: float | None = None
    forward_share: float | None = None
    mean_learnable_params: float | None = None
    train_seconds: float | None = None
    samples_per_second: float | None = None
    device: str | None = None
    ended: datetime | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a test accuracy that is none, or that is there beside a reason."""
        if (self.test_accuracy is None) == (self.reason is None):
            raise ValueError(f"trial {self.trial}, seed {self.seed}: must have a test accuracy, or else a reason")
        if self.test_accuracy is not None and not 0 <= self.test_accuracy <= 1:
            raise ValueError(f"test_accuracy must be in [0, 1], got {self.test_accuracy}")

    def objective(self, name: str) -> float | int | None:
        """The value of a metric as it is confirmed: accuracy is the one on the test split."""
        value: float | int | None = getattr(self, "test_accuracy" if name == "accuracy" else name)
        return value


def confirmed_path(folder: str | Path) -> Path:
    """Where the table of a run lies."""
    return Path(folder) / "confirmed.parquet"


def write_confirmed(path: str | Path, trainings: Iterable[ConfirmedTraining]) -> None:
    """Writes the table, sorted by trial and seed, whole or not at all.

    Raises:
        ValueError: a trial is there twice with one seed.
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    ordered = sorted(trainings, key=lambda row: (row.trial, row.seed))
    if len({(row.trial, row.seed) for row in ordered}) != len(ordered):
        raise ValueError("each trial must be there once with each seed")
    write_rows(Path(path), _CONFIRMED, [asdict(row) for row in ordered])


def read_confirmed(path: str | Path) -> list[ConfirmedTraining]:
    """Reads the table, sorted by trial and seed.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    return read_records(Path(path), _CONFIRMED, _REMEDY, ConfirmedTraining)
