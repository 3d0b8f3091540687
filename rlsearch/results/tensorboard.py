"""TensorBoard's view of a run: curves and HParams of every trial, without TensorFlow and without torch.

A trial is two TensorBoard runs. ``trial-NNNNN`` holds one scalar an epoch and metric. ``trial-NNNNN/result`` holds the
HParams session with the trial's true status and, for a COMPLETE trial alone, its final objectives: apart from the
curves, so that TensorBoard lists the objectives as the session's metrics and no half-trained trial among the results.
Writing a trial again replaces what stood there, so that nothing is shown twice after a resume.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from rlsearch.files import write_atomic
from rlsearch.results.describe import describe_policy, training_of
from rlsearch.results.selection import policy_of
from rlsearch.results.tables import METRICS, TrialRecord

_STATUS = {
    "COMPLETE": api_pb2.STATUS_SUCCESS,
    "PRUNED": api_pb2.STATUS_UNKNOWN,  # neither a success nor a failure: the hyperparameter "state" says which
    "FAIL": api_pb2.STATUS_FAILURE,
    "INFEASIBLE": api_pb2.STATUS_FAILURE,
}
_FILE = "events.out.tfevents.rlsearch"
_CURVES = (
    *METRICS,
    "validation_loss",
    "train_loss",
    "lr",
    "dropped_units",
    "learnable_params",
    "step_memory",
    "packed",
)


def write_trial(
    folder: str | Path,
    record: TrialRecord,
    epochs: Sequence[Mapping[str, Any]],
    objectives: Iterable[str] = METRICS,
) -> None:
    """Writes the curves and the HParams session of one trial, each file whole or not at all.

    Args:
        folder: the run's ``tensorboard`` folder.
        record: the trial.
        epochs: one mapping an epoch (`rlsearch.results.read_epochs`); none for a trial that never got so far. A value
            that is NaN is written as NaN: a diverged loss is to be seen.
        objectives: the metrics of `METRICS` that the HParams session shows.

    Raises:
        OSError: the folder is full or not writable.
    """
    session = Path(folder) / f"trial-{record.trial:05d}"
    started = record.started.timestamp() if record.started else time.time()
    ended = record.ended.timestamp() if record.ended else started
    if epochs:
        _write_events(session, [_epoch_event(row, started) for row in epochs])
    _write_events(session / "result", _session_events(record, tuple(objectives), started, ended))


def is_whole(folder: str | Path, record: TrialRecord) -> bool:
    """Whether what `write_trial` wrote of a trial can be read to its end; every event carries a checksum.

    Args:
        folder: the run's ``tensorboard`` folder.
        record: the trial.
    """
    session = Path(folder) / f"trial-{record.trial:05d}"
    curves = record.fidelity or 0
    # Each file begins with an event of its own; a session has a start and an end, a COMPLETE one results in between.
    expected = {session / "result": 4 if record.state == "COMPLETE" else 3} | ({session: 1 + curves} if curves else {})
    return all(_num_events(place / _FILE) == count for place, count in expected.items())


def hparams_of(record: TrialRecord) -> dict[str, bool | float | str]:
    """What TensorBoard shows as the trial's hyperparameters.

    They are the policy in words, how many units are replaced and by which block, the Learn&Drop settings where the
    policy has any, the training settings, and where the trial came from.
    """
    policy = policy_of(record)
    shown: dict[str, Any] = {
        "policy": describe_policy(policy),
        "origin": record.origin,
        "state": record.state,
        "seed": record.seed,
        "replaced_units": len(policy.replacements),
        "learn_drop": policy.learn_drop is not None,
    }
    shown |= {f"units/{block}": count for block, count in Counter(item.block for item in policy.replacements).items()}
    if policy.learn_drop is not None:
        names = ("score", "threshold", "patience", "interval", "warmup", "max_fraction", "features")
        shown |= {f"learn_drop/{name}": getattr(policy.learn_drop, name) for name in names}
    shown |= {f"training/{name}": value for name, value in training_of(record).items()}
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in shown.items()}


def _epoch_event(row: Mapping[str, Any], started: float) -> Event:
    """One event with the scalars of one epoch, at the time at which its training was done (evaluation left out)."""
    scalars = {name: row[name] for name in _CURVES if row.get(name) is not None}
    wall_time = started + (row.get("train_seconds") or 0.0)
    return Event(wall_time=wall_time, step=row["epoch"], summary=_scalars(scalars))


def _session_events(record: TrialRecord, objectives: Sequence[str], started: float, ended: float) -> list[Event]:
    name = f"trial-{record.trial:05d}"
    start = summary_v2.hparams_pb(hparams_of(record), trial_id=name, start_time_secs=started)
    end_info = plugin_data_pb2.SessionEndInfo(status=_STATUS[record.state], end_time_secs=ended)
    end_data = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end_info))
    end = Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=end_data, tensor=metadata.NULL_TENSOR)]
    )
    events = [Event(wall_time=started, step=0, summary=start)]
    if record.state == "COMPLETE":
        final = {name: value for name in objectives if (value := record.metric(name)) is not None}
        events.append(Event(wall_time=ended, step=record.fidelity or 0, summary=_scalars(final)))
    return [*events, Event(wall_time=ended, step=record.fidelity or 0, summary=end)]


def _scalars(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()])


def _write_events(folder: Path, events: Sequence[Event]) -> None:
    """The events as the folder's only event file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in [Event(wall_time=events[0].wall_time, file_version="brain.Event:2"), *events]:
        writer.write(event.SerializeToString())
    write_atomic(path, buffer.getvalue())
    for other in folder.iterdir():
        # A writer that was killed leaves its temporary file, which TensorBoard would read too.
        if other.is_file() and other != path:
            other.unlink()


def _num_events(path: Path) -> int:
    """How many events can be read before the end of a file, or before the first that is damaged."""
    return sum(1 for _ in RawEventFileLoader(str(path)).Load()) if path.is_file() else 0
