"""The tables of a run: ``trials.parquet``, one row a trial, and ``epochs/trial-NNNNN.parquet``, one row an epoch.

One schema a table, in one place. Every table carries the SHA-256 of its rows, so that a torn or flipped byte is
noticed and never becomes a wrong front. The tables are written from the study, which stays the one source of truth.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rlsearch.errors import RunFolderError, suggestion
from rlsearch.files import replacing

STATES = ("COMPLETE", "PRUNED", "FAIL", "INFEASIBLE")
DIRECTIONS = ("maximize", "minimize")
ORIGINS = ("baseline", "baseline repeat", "skip control", "freeze control", "sensitivity", "sampler")
METRICS = (
    "accuracy",
    "params",
    "params_total",
    "memory",
    "memory_predicted",
    "train_flops",
    "forward_flops",
    "forward_share",
    "mean_learnable_params",
    "train_seconds",
    "samples_per_second",
)
"""The columns that may be objectives, and that ``--where`` and ``--select`` know."""

_INTEGER, _NUMBER, _TEXT, _TIME = pa.int64(), pa.float64(), pa.string(), pa.timestamp("us", tz="UTC")
_NAMES = pa.list_(_TEXT)
_METRIC_TYPES = {name: _INTEGER if name.startswith(("params", "memory")) else _NUMBER for name in METRICS}
_TRIALS = pa.schema(
    {"trial": _INTEGER, "state": _TEXT, "origin": _TEXT, "reason": _TEXT, "policy": _TEXT, "policy_hash": _TEXT}
    | {"training": _TEXT, "seed": _INTEGER, "fidelity": _INTEGER}
    | _METRIC_TYPES
    | {
        "dropped_units": _INTEGER,
        "step_memory": _INTEGER,
        "device": _TEXT,
        "packed": _INTEGER,
        "started": _TIME,
        "ended": _TIME,
    }
)
_EPOCHS = pa.schema(
    {"epoch": _INTEGER, "epochs": _INTEGER}
    | _METRIC_TYPES
    | {"validation_loss": _NUMBER, "train_loss": _NUMBER, "lr": _NUMBER, "dropped_units": _INTEGER}
    | {"learnable_params": _INTEGER, "step_memory": _INTEGER, "learning": _NAMES, "left": _NAMES, "device": _TEXT}
    | {"packed": _INTEGER}
)
_DIGEST = b"rlsearch.sha256"


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
        """Raises ValueError for a state or an origin that is none, and for a time without a zone."""
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
    """

    folder: Path
    objectives: Mapping[str, str]
    constraints: Mapping[str, str] = field(default_factory=dict)
    records: tuple[TrialRecord, ...] = ()
    space: Mapping[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of the objectives, in their order."""
        return tuple(self.objectives.values())


def write_trials(path: str | Path, records: Iterable[TrialRecord]) -> None:
    """Writes ``trials.parquet``, sorted by trial, whole or not at all.

    Raises:
        ValueError: one trial is there twice.
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    ordered = sorted(records, key=lambda record: record.trial)
    for before, after in itertools.pairwise(ordered):
        if before.trial == after.trial:
            raise ValueError(f"each trial must be there once; twice: {after.trial}")
    _write(Path(path), _TRIALS, [asdict(record) for record in ordered])


def read_trials(path: str | Path) -> list[TrialRecord]:
    """Reads ``trials.parquet``: the records, sorted by trial.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    try:
        return [TrialRecord(**row) for row in _read(Path(path), _TRIALS)]
    except ValueError as error:
        if isinstance(error, RunFolderError):
            raise
        raise _damaged(Path(path), error) from None


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
    _write(Path(path), _EPOCHS, [{name: row.get(name) for name in _EPOCHS.names} for row in rows])


def read_epochs(path: str | Path) -> list[dict[str, Any]]:
    """Reads ``epochs/trial-NNNNN.parquet``: one mapping an epoch.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    return _read(Path(path), _EPOCHS)


def epochs_path(folder: str | Path, trial: int) -> Path:
    """Where the epochs of ``trial`` lie in the run ``folder``."""
    return Path(folder) / "epochs" / f"trial-{trial:05d}.parquet"


def read_run(folder: str | Path) -> Run:
    """Reads a run's folder: its search space and its trials.

    Raises:
        RunFolderError: there is no run, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder; give the --run-dir of a search")
    space = _read_space(folder / "space.yaml")
    trials = folder / "trials.parquet"
    if not trials.exists() and not (folder / "study.db").exists():
        raise _no_run(trials)
    return Run(
        folder=folder,
        objectives=_objectives(space, folder / "space.yaml"),
        constraints={str(name): str(condition) for name, condition in (space.get("constraints") or {}).items()},
        records=tuple(read_trials(trials)) if trials.exists() else (),
        space=space,
    )


def _read_space(path: Path) -> dict[str, Any]:
    """The resolved search space of a run."""
    try:
        space = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(
            f"{path}: is missing, so {path.parent} holds no run; give the --run-dir of a search"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RunFolderError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); restore it from a copy"
        ) from None
    if not isinstance(space, dict) or not isinstance(space.get("constraints") or {}, dict):
        raise RunFolderError(f"{path}: is no search space; restore it from a copy")
    return space


def _objectives(space: Mapping[str, Any], path: Path) -> dict[str, str]:
    objectives = space.get("objectives")
    if not isinstance(objectives, dict) or not objectives:
        raise RunFolderError(f"{path}: objectives must map metrics to directions, got {objectives!r}")
    for name, direction in objectives.items():
        if name not in METRICS:
            raise RunFolderError(f"{path}: objectives.{name}: unknown metric{suggestion(str(name), METRICS)}")
        if direction not in DIRECTIONS:
            raise RunFolderError(f"{path}: objectives.{name}: must be maximize or minimize, got {direction!r}")
    return dict(objectives)


def _write(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    table = table.replace_schema_metadata({_DIGEST: _digest(table.to_pylist())})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """The rows of a table, if they are the ones that were written."""
    if not path.is_file():
        raise RunFolderError(f"{path}: is missing; `rlsearch resume` on the run writes it anew from the study")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        if not table.schema.equals(schema):
            raise _damaged(path, "its columns are not those of this version of rlsearch")
        rows: list[dict[str, Any]] = table.to_pylist()
        if (table.schema.metadata or {}).get(_DIGEST) != _digest(rows):
            raise _damaged(path, "its rows are not those that were written")
    except RunFolderError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(path, error) from None
    for row in rows:
        for name in schema.names:
            if schema.field(name).type == _TIME and row[name] is not None:
                row[name] = row[name].astimezone(UTC)
    return rows


def _digest(rows: list[dict[str, Any]]) -> bytes:
    """The SHA-256 of a table's rows, whatever the file's encoding."""
    text = json.dumps(rows, sort_keys=True, default=datetime.isoformat)
    return hashlib.sha256(text.encode()).hexdigest().encode()


def _no_run(missing: Path) -> RunFolderError:
    return RunFolderError(f"{missing}: is missing, so {missing.parent} holds no run; give the --run-dir of a search")


def _damaged(path: Path, why: object) -> RunFolderError:
    reason = " ".join(str(why).split())
    return RunFolderError(f"{path}: is damaged ({reason}); `rlsearch resume` on the run writes it anew from the study")
