"""The tables of a run: ``trials.parquet``, one row a trial, and ``epochs/trial-NNNNN.parquet``, one row an epoch.

One schema a table, in one place. They are written from the study, which stays the one source of truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlsearch.errors import RunFolderError, suggestion
from rlsearch.files import check_inside
from rlsearch.results.confirmed import ConfirmedTraining, confirmed_path, read_confirmed
from rlsearch.results.space_file import check_space, objectives_of, read_space, space_digest
from rlsearch.results.table_file import (
    INTEGER,
    METRIC_TYPES,
    NUMBER,
    TEXT,
    TIME,
    read_mark,
    read_records,
    read_rows,
    write_rows,
)
from rlsearch.results.table_file import METRICS as METRICS

STATES = ("COMPLETE", "PRUNED", "FAIL", "INFEASIBLE")
ORIGINS = ("baseline", "baseline repeat", "skip control", "freeze control", "sensitivity", "sampler")
# Far above any search, and what pictures can still count.
_MOST_TRIALS = 10**9
_REMEDY = "`rlsearch resume` on the run writes it anew from the study"
_SPACE_MARK = "rlsearch.space.sha256"

_TRIALS = pa.schema(
    {"trial": INTEGER, "state": TEXT, "origin": TEXT, "reason": TEXT, "policy": TEXT, "policy_hash": TEXT}
    | {"training": TEXT, "seed": INTEGER, "fidelity": INTEGER}
    | METRIC_TYPES
    | {
        "dropped_units": INTEGER,
        "step_memory": INTEGER,
        "device": TEXT,
        "packed": INTEGER,
        "started": TIME,
        "ended": TIME,
    }
)
_EPOCHS = pa.schema(
    {"epoch": INTEGER, "epochs": INTEGER}
    | METRIC_TYPES
    | {"validation_loss": NUMBER, "train_loss": NUMBER, "lr": NUMBER, "dropped_units": INTEGER}
    | {"learnable_params": INTEGER, "step_memory": INTEGER, "learning": pa.list_(TEXT), "left": pa.list_(TEXT)}
    | {"device": TEXT, "packed": INTEGER}
)


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it ended: a row of ``trials.parquet``.

    Attributes:
        trial: the trial's number; 0 is the baseline.
        state: one of `STATES`.
        policy: the policy as JSON text (`rlsearch.Policy.to_dict`).
        policy_hash: the policy's canonical hash.
        seed: the seed of the training.
        origin: one of `ORIGINS`: who proposed the trial.
        reason: why the trial is not COMPLETE (``diverged``, ``out_of_memory``, …), or a note on how it became so.
        training: the training settings as JSON text (learning rate, batch size, …).
        fidelity: epochs trained.
        accuracy: top-1 on the validation split, in [0, 1].
        params: learnable parameters by unique storage, after surgery.
        params_total: parameters of the materialised model.
        memory: bytes; on CUDA the measured peak of a training step, elsewhere the predicted bytes.
        memory_predicted: bytes at the peak of a step, from fake tensors: the same number on every machine.
        train_flops: floating-point operations that the training spent.
        forward_flops: the part of them that forward passes spent.
        forward_share: ``forward_flops`` as a share of what the untouched model would have spent on the same images.
        mean_learnable_params: parameters that learned, averaged over the images trained on.
        train_seconds: seconds of training, without evaluation and set-up.
        samples_per_second: training images a second.
        dropped_units: units that had left training at the end.
        step_memory: bytes of a training step in the last epoch, measured or predicted as ``memory`` is.
        device: what the trial ran on.
        packed: how many trials may have trained on that device at once; 1 for a trial alone on it.
        started: when the trial began, with a time zone.
        ended: when the trial ended, with a time zone.
    """

    trial: int
    state: str
    policy: str
    policy_hash: str
    seed: int
    origin: str = "sampler"
    reason: str | None = None
    training: str = "{}"
    fidelity: int | None = None
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
    dropped_units: int | None = None
    step_memory: int | None = None
    device: str | None = None
    packed: int | None = None
    started: datetime | None = None
    ended: datetime | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a number, a state or an origin that is none, and for a time without a zone."""
        if not 0 <= self.trial < _MOST_TRIALS:
            raise ValueError(f"trial must be at least 0 and below {_MOST_TRIALS}; got {self.trial}")
        for name, known in (("state", STATES), ("origin", ORIGINS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("started", "ended"):
            moment = getattr(self, name)
            if moment is not None and moment.tzinfo is None:
                raise ValueError(f"{name} must have a time zone, got {moment!r}")

    def metric(self, name: str) -> float | int | None:
        """The value of one of `METRICS`; None where it was never measured."""
        value: float | int | None = getattr(self, name)
        return value


@dataclass(frozen=True)
class Run:
    """One search, as its folder tells it.

    Attributes:
        folder: where the run lies.
        objectives: metric name to ``maximize`` or ``minimize``, in the order of the search space.
        constraints: metric name to condition, as the search space states them.
        records: the trials that have ended, by number.
        space: the resolved search space (the content of ``space.yaml``).
        confirmed: the trainings that `rlsearch confirm` has added, on the test split.
    """

    folder: Path
    objectives: Mapping[str, str]
    constraints: Mapping[str, str] = field(default_factory=dict)
    records: tuple[TrialRecord, ...] = ()
    space: Mapping[str, Any] = field(default_factory=dict)
    confirmed: tuple[ConfirmedTraining, ...] = ()

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of the objectives, in their order."""
        return tuple(self.objectives.values())


def write_trials(path: str | Path, records: Iterable[TrialRecord], space: Mapping[str, Any] | None = None) -> None:
    """Writes ``trials.parquet``, sorted by trial, whole or not at all.

    Args:
        path: the file.
        records: of the trials.
        space: the resolved search space that they are trials of: `read_run` then refuses a ``space.yaml`` that says
            otherwise; None where nobody knows.

    Raises:
        ValueError: one trial is there twice.
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    ordered = sorted(records, key=lambda record: record.trial)
    for before, after in itertools.pairwise(ordered):
        if before.trial == after.trial:
            raise ValueError(f"each trial must be there once; twice: {after.trial}")
    marks = {} if space is None else {_SPACE_MARK: space_digest(space)}
    write_rows(Path(path), _TRIALS, [asdict(record) for record in ordered], marks)


def read_trials(path: str | Path) -> list[TrialRecord]:
    """Reads ``trials.parquet``: the records, sorted by trial.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    return read_records(Path(path), _TRIALS, _REMEDY, TrialRecord)


def write_epochs(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``epochs/trial-NNNNN.parquet``, whole or not at all; makes its folder.

    Args:
        path: the file.
        rows: one mapping an epoch, as ``EpochMetrics.to_dict()`` gives it; a key may be missing, none may be unknown.

    Raises:
        ValueError: a key that is no column.
        OSError: the folder is full or not writable; the old file is then as it was.
    """
    for row in rows:
        for name in row:
            if name not in _EPOCHS.names:
                raise ValueError(f"{name!r} is no column of the epochs table{suggestion(name, _EPOCHS.names)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_rows(Path(path), _EPOCHS, [{name: row.get(name) for name in _EPOCHS.names} for row in rows])


def read_epochs(path: str | Path) -> list[dict[str, Any]]:
    """Reads ``epochs/trial-NNNNN.parquet``: one mapping an epoch.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    return read_rows(Path(path), _EPOCHS, _REMEDY)


def epochs_path(folder: str | Path, trial: int) -> Path:
    """Where the epochs of ``trial`` lie in the run ``folder``."""
    return Path(folder) / "epochs" / f"trial-{trial:05d}.parquet"


def read_run(folder: str | Path) -> Run:
    """Reads a run's folder: its search space, its trials, and what was confirmed.

    Raises:
        RunFolderError: there is no run, one of its files is damaged, or one leads out of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder; give the --run-dir of a search")
    check_inside(folder, ["epochs"])
    space = read_space(folder / "space.yaml")
    trials = folder / "trials.parquet"
    if not trials.exists() and not any((folder / name).exists() for name in ("study.db", "study.json")):
        raise _no_run(trials)
    objectives = objectives_of(space, folder / "space.yaml")
    records: tuple[TrialRecord, ...] = ()
    if trials.exists():
        check_space(folder / "space.yaml", space, read_mark(trials, _SPACE_MARK, _REMEDY))
        records = tuple(read_trials(trials))
    return Run(
        folder=folder,
        objectives=objectives,
        constraints={str(name): str(condition) for name, condition in (space.get("constraints") or {}).items()},
        records=records,
        space=space,
        confirmed=_read_confirmed(confirmed_path(folder), records),
    )


def _read_confirmed(path: Path, records: Iterable[TrialRecord]) -> tuple[ConfirmedTraining, ...]:
    """The trainings of a run's confirmation; none where there is no such table."""
    if not path.exists():
        return ()
    rows = read_confirmed(path)
    policies = {record.trial: record.policy_hash for record in records}
    for row in rows:
        if policies.get(row.trial, row.policy_hash) != row.policy_hash:
            raise RunFolderError(
                f"{path}: its trial {row.trial} has another policy than this run's, so it is of another search; "
                "move it away, and `rlsearch confirm` trains anew"
            )
    return tuple(rows)


def _no_run(missing: Path) -> RunFolderError:
    return RunFolderError(f"{missing}: is missing, so {missing.parent} holds no run; give the --run-dir of a search")
