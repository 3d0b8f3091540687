"""Proves the books of a run's folder: every trial ended exactly once, and everything in the folder says the same.

Study, Parquet tables, TensorBoard's event files, weights and the lock are read back one by one and compared, by other
code than the one that keeps them in step. What is not in order comes back as sentences; none of them is the proof.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from safetensors import SafetensorError, safe_open
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from rlsearch.errors import RunFolderError
from rlsearch.results.tables import METRICS, TrialRecord, read_epochs, read_trials

_STATUS = {
    "COMPLETE": api_pb2.STATUS_SUCCESS,
    "PRUNED": api_pb2.STATUS_UNKNOWN,
    "FAIL": api_pb2.STATUS_FAILURE,
    "INFEASIBLE": api_pb2.STATUS_FAILURE,
}


def check_books(folder: Path, trials: int) -> list[str]:
    """What is not in order in the folder of a search that has ended with ``trials`` trials; empty where all is.

    Args:
        folder: of the run.
        trials: how many there must be.
    """
    found = read_study(folder)
    wrong = list(_check_study(found, trials))
    ended = {number: trial for number, trial in found.items() if "outcome" in trial.user_attrs}
    objectives = list(yaml.safe_load((folder / "space.yaml").read_text(encoding="utf-8"))["objectives"])
    wrong += _check_table(folder, ended, objectives)
    wrong += _check_epochs(folder, ended)
    wrong += _check_tensorboard(folder, ended, objectives)
    wrong += _check_weights(folder, ended)
    wrong += _check_rest(folder)
    return wrong


def read_study(folder: Path) -> dict[int, FrozenTrial]:
    """All trials of a run's study by number; nothing where there is no study yet."""
    if not has_study(folder):
        return {}
    trials: dict[int, FrozenTrial] = {}
    with _opened(folder) as (storage, studies):
        for study in studies:
            for trial in storage.get_all_trials(study):
                trials[trial.number if trial.number not in trials else -len(trials)] = trial
    return trials


def read_ended(folder: Path) -> dict[int, FrozenTrial]:
    """The trials of a run that have ended, by number."""
    return {number: trial for number, trial in read_study(folder).items() if trial.state.is_finished()}


def planned_trials(folder: Path) -> int:
    """How many trials the study of a run plans."""
    with _opened(folder) as (storage, studies):
        return int(storage.get_study_user_attrs(studies[0])["trials"])


def has_study(folder: Path) -> bool:
    """Whether a search has begun there."""
    return (folder / "study.db").exists() or (folder / "study.json").exists()


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[optuna.storages.RDBStorage, list[int]]]:
    """A run's database, and its studies: all that a file holds, or the one of PostgreSQL that the folder names."""
    named = folder / "study.json"
    storage = optuna.storages.RDBStorage("postgresql+psycopg://" if named.exists() else f"sqlite:///{folder}/study.db")
    try:
        if named.exists():
            yield storage, [storage.get_study_id_from_name(json.loads(named.read_text())["study"])]
        else:
            yield storage, [study._study_id for study in storage.get_all_studies()]
    finally:
        storage.remove_session()
        storage.engine.dispose()


def compare(before: Mapping[int, FrozenTrial], after: Mapping[int, FrozenTrial]) -> list[str]:
    """What was lost or altered of the trials that had ended before: they only ever become more."""
    wrong = [f"trial {number}: had ended, and is gone" for number in sorted(before.keys() - after.keys())]
    for number in sorted(before.keys() & after.keys()):
        if before[number] != after[number]:
            wrong.append(f"trial {number}: had ended, and is another one now")
    return wrong


def left_behind(temporary: Path) -> list[str]:
    """What searches whose ``TMPDIR`` was this folder have left: files, and processes that name it or read there."""
    found = sorted(temporary.iterdir()) if temporary.exists() else []
    # torch keeps a cache of a user's compiled kernels there, for all of its processes.
    wrong = [f"{path} was left" for path in found if not path.name.startswith("torchinductor_")]
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid() and _uses(process, str(temporary)):
            wrong.append(f"process {process.name} was left")
    return wrong


def _uses(process: Path, folder: str) -> bool:
    """Whether a process names a folder in its command, or has a file in it open; one that is gone does not."""
    try:
        if folder.encode() in (process / "cmdline").read_bytes():
            return True
        for file in (process / "fd").iterdir():
            if os.readlink(file).startswith(f"{folder}/"):
                return True
    except OSError:
        return False
    return False


def _check_study(found: Mapping[int, FrozenTrial], trials: int) -> Iterator[str]:
    if sorted(found) != list(range(trials)):
        yield f"the study's numbers are {sorted(found)}, and must be 0 to {trials - 1}"
    for number, trial in found.items():
        if not trial.state.is_finished():
            yield f"trial {number}: is {trial.state.name} in the study"
        if "outcome" not in trial.user_attrs:
            yield f"trial {number}: has no outcome in the study"
    keys = Counter(json.dumps([t.user_attrs[k] for k in ("policy", "training", "seed")]) for t in found.values())
    twice = sum(count - 1 for count in keys.values())
    if twice:
        yield f"{twice} trials train the same policy in the same way with the same seed as another"


def _check_table(folder: Path, ended: Mapping[int, FrozenTrial], objectives: list[str]) -> Iterator[str]:
    try:
        records = {record.trial: record for record in read_trials(folder / "trials.parquet")}
    except RunFolderError as error:
        yield str(error)
        return
    if records.keys() != ended.keys():
        yield f"trials.parquet has the trials {sorted(records)}, the study {sorted(ended)}"
    for number in records.keys() & ended.keys():
        trial, record = ended[number], records[number]
        pairs = _row(trial, record)
        if trial.state == TrialState.COMPLETE:
            values = [getattr(record, name) for name in objectives]
            pairs["the list of values"] = (trial.values, values)
        for name, (inside, outside) in pairs.items():
            if not _same(inside, outside):
                yield f"trial {number}: {name} is {inside!r} in the study, {outside!r} in trials.parquet"


def _row(trial: FrozenTrial, record: TrialRecord) -> dict[str, tuple[Any, Any]]:
    """What the study and the table say about a trial, side by side."""
    outcome = trial.user_attrs["outcome"]
    final = _rows(trial)[-1] if _rows(trial) else {}
    pairs = {name: (final.get(name), getattr(record, name)) for name in (*METRICS, "dropped_units", "device")}
    for name in ("policy", "training"):
        pairs[name] = (trial.user_attrs[name], json.loads(getattr(record, name)))
    for name in ("policy_hash", "origin", "seed"):
        pairs[name] = (trial.user_attrs[name], getattr(record, name))
    for name, moment in (("started", trial.datetime_start), ("ended", trial.datetime_complete)):
        pairs[name] = (moment and moment.timestamp(), getattr(record, name) and getattr(record, name).timestamp())
    pairs["fidelity"] = (len(_rows(trial)), record.fidelity)
    pairs["state"] = (outcome["state"], record.state)
    pairs["reason"] = (outcome["reason"], record.reason)
    return pairs


def _check_epochs(folder: Path, ended: Mapping[int, FrozenTrial]) -> Iterator[str]:
    expected = {f"trial-{number:05d}.parquet": number for number, trial in ended.items() if _rows(trial)}
    yield from _check_names(folder / "epochs", set(expected))
    for name, number in expected.items():
        rows = _rows(ended[number])
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            yield f"trial {number}: its epochs in the study are {[row['epoch'] for row in rows]}"
        try:
            written = read_epochs(folder / "epochs" / name)
        except RunFolderError as error:
            yield str(error)
            continue
        if len(written) != len(rows):
            yield f"epochs/{name}: has {len(written)} rows, the study {len(rows)}"
        for row, other in zip(rows, written, strict=False):
            for column in row.keys() | {key for key, value in other.items() if value is not None}:
                if not _same(row.get(column), other.get(column)):
                    told = f"{row.get(column)!r} in the study, {other.get(column)!r} in epochs/{name}"
                    yield f"trial {number}: {column} of epoch {row['epoch']} is {told}"


def _check_tensorboard(folder: Path, ended: Mapping[int, FrozenTrial], objectives: list[str]) -> Iterator[str]:
    yield from _check_names(folder / "tensorboard", {f"trial-{number:05d}" for number in ended})
    for number, trial in ended.items():
        session = folder / "tensorboard" / f"trial-{number:05d}"
        events = list(_events(session))
        for name in ("accuracy", "params", "train_flops"):
            shown = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == name]
            expected = [(row["epoch"], _single(row[name])) for row in _rows(trial)]
            if shown != expected:
                yield f"trial {number}: {name} by epoch is {expected} in the study, {shown} in TensorBoard"
        ends = [value for event in _events(session / "result") for value in event.summary.value]
        status = [_status(value.metadata) for value in ends if value.tag == metadata.SESSION_END_INFO_TAG]
        state = trial.user_attrs["outcome"]["state"]
        if status != [_STATUS[state]]:
            yield f"trial {number}: is {state} in the study, and has the status {status} in TensorBoard"
        finals = {value.tag: value.simple_value for value in ends if value.tag in METRICS}
        values = {name: _single(_rows(trial)[-1][name]) for name in objectives} if state == "COMPLETE" else {}
        if finals != values:
            yield f"trial {number}: its result is {values} in the study, {finals} in TensorBoard"


def _events(folder: Path) -> Iterator[Event]:
    """What is written in the one event file of a folder, or in however many there are."""
    for path in sorted(folder.glob("*tfevents*")) + sorted(folder.glob(".*tfevents*")):
        for content in RawEventFileLoader(str(path)).Load():
            yield Event.FromString(content)


def _status(content: Any) -> int:
    data = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
    return int(data.session_end_info.status)


def _check_weights(folder: Path, ended: Mapping[int, FrozenTrial]) -> Iterator[str]:
    trained = {f"trial-{number:05d}" for number, trial in ended.items() if trial.state == TrialState.COMPLETE}
    yield from _check_names(folder / "checkpoints", trained)
    for name in trained:
        yield from _check_names(folder / "checkpoints" / name, {"model.safetensors"})
        try:
            with safe_open(folder / "checkpoints" / name / "model.safetensors", "np") as file:
                if not file.keys():
                    yield f"checkpoints/{name}: holds no weights"
        except (OSError, SafetensorError) as error:
            yield f"checkpoints/{name}: cannot be read ({error})"


def _check_rest(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob(".*")):
        yield f"{path.relative_to(folder)}: is a temporary file"
    for path in sorted(folder.glob("study.db-*")):
        yield f"{path.name}: a transaction was left open"
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield "run.lock: is held"
    else:
        lock.release()


def _check_names(folder: Path, expected: set[str]) -> Iterator[str]:
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(expected - found):
        yield f"{folder.name}/{name}: is missing"
    for name in sorted(found - expected):
        yield f"{folder.name}/{name}: is there, and should not be"


def _rows(trial: FrozenTrial) -> list[dict[str, Any]]:
    """The metrics of every epoch; the study keeps them by column."""
    columns = trial.user_attrs["outcome"]["epochs"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _single(number: float) -> float:
    """A number as a 32-bit float holds it."""
    value: float = struct.unpack("f", struct.pack("f", number))[0]
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)
