"""TensorBoard reads back what was written: curves, hyperparameters, status."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.results import read_epochs, read_run
from rlsearch.results.describe import describe_policy
from rlsearch.results.tables import epochs_path
from rlsearch.results.tensorboard import hparams_of, write_trial

POLICY = Policy(
    replacements=(Replacement("layer1.2", "skip"), Replacement("layer2.2", "skip"), Replacement("layer3.2", "scalar")),
    learn_drop=LearnDrop(threshold=0.02, patience=3, max_fraction=0.8, features="recompute"),
)
EPOCHS = [
    {"epoch": 1, "accuracy": 0.5, "train_loss": 1.5, "train_seconds": 2.0, "device": "cpu", "memory": None},
    {"epoch": 2, "accuracy": 0.75, "train_loss": math.nan, "train_seconds": 4.0, "device": "cpu", "memory": None},
]


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def plugin_data(events: EventAccumulator, tag: str) -> Any:
    content = events.SummaryMetadata(tag).plugin_data.content
    parse = {
        metadata.SESSION_START_INFO_TAG: metadata.parse_session_start_info_plugin_data,
        metadata.SESSION_END_INFO_TAG: metadata.parse_session_end_info_plugin_data,
    }
    return parse[tag](content)


def test_the_curves_come_back(tmp_path: Path, make_record: Any) -> None:
    record = make_record(17)
    write_trial(tmp_path, record, EPOCHS)
    events = read(tmp_path / "trial-00017")
    assert set(events.Tags()["scalars"]) == {"accuracy", "train_loss", "train_seconds"}
    points = events.Scalars("accuracy")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.75)]
    assert [point.wall_time - record.started.timestamp() for point in points] == pytest.approx([2.0, 4.0])
    assert math.isnan(events.Scalars("train_loss")[1].value)


def test_the_curves_of_learn_drop_come_back(tmp_path: Path, make_record: Any) -> None:
    curves = {"forward_share": 0.75, "mean_learnable_params": 1000.5, "step_memory": 4096, "dropped_units": 3}
    names = {"learning": ["head"], "left": ["stem"]}
    write_trial(tmp_path, make_record(17, POLICY), [{"epoch": 2} | curves | names])
    events = read(tmp_path / "trial-00017")
    assert set(events.Tags()["scalars"]) == set(curves)
    for name, value in curves.items():
        assert [(point.step, point.value) for point in events.Scalars(name)] == [(2, value)]


def test_the_session_of_a_complete_trial(tmp_path: Path, make_record: Any) -> None:
    record = make_record(17, POLICY, accuracy=0.75, params=400_000)
    write_trial(tmp_path, record, EPOCHS, objectives=("accuracy", "params"))
    events = read(tmp_path / "trial-00017" / "result")
    assert set(events.Tags()["scalars"]) == {"accuracy", "params"}
    assert [(point.step, point.value) for point in events.Scalars("params")] == [(3, 400_000)]
    start = plugin_data(events, metadata.SESSION_START_INFO_TAG)
    assert start.group_name == "trial-00017"
    assert start.start_time_secs == record.started.timestamp()
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert values == hparams_of(record)
    assert plugin_data(events, metadata.SESSION_END_INFO_TAG).end_time_secs == record.ended.timestamp()


def test_the_hyperparameters_of_a_trial(make_record: Any) -> None:
    assert hparams_of(make_record(17, POLICY)) == {
        "policy": describe_policy(POLICY),
        "origin": "sampler",
        "state": "COMPLETE",
        "seed": 0,
        "replaced_units": 3,
        "learn_drop": True,
        "units/skip": 2,
        "units/scalar": 1,
        "learn_drop/score": "param_change",
        "learn_drop/threshold": 0.02,
        "learn_drop/patience": 3,
        "learn_drop/interval": 1,
        "learn_drop/warmup": 0.3,
        "learn_drop/max_fraction": 0.8,
        "learn_drop/features": "recompute",
        "training/epochs": 3,
        "training/batch_size": 64,
        "training/optimizer": "sgd",
        "training/lr": 0.1,
    }


@pytest.mark.parametrize(
    ("state", "status", "has_result"),
    [
        ("COMPLETE", api_pb2.STATUS_SUCCESS, True),
        ("PRUNED", api_pb2.STATUS_UNKNOWN, False),
        ("FAIL", api_pb2.STATUS_FAILURE, False),
        ("INFEASIBLE", api_pb2.STATUS_FAILURE, False),
    ],
)
def test_the_status_is_the_true_one(
    tmp_path: Path, make_record: Any, state: str, status: int, has_result: bool
) -> None:
    write_trial(tmp_path, make_record(3, state=state), [])
    assert not list((tmp_path / "trial-00003").glob("*tfevents*"))
    events = read(tmp_path / "trial-00003" / "result")
    assert plugin_data(events, metadata.SESSION_END_INFO_TAG).status == status
    assert bool(events.Tags()["scalars"]) is has_result


def test_writing_again_replaces_and_clears_what_a_killed_writer_left(tmp_path: Path, make_record: Any) -> None:
    write_trial(tmp_path, make_record(0), EPOCHS)
    (tmp_path / "trial-00000" / ".events.out.tfevents.rlsearch.abc").write_bytes(b"torn")
    write_trial(tmp_path, make_record(0), EPOCHS[:1])
    assert [point.step for point in read(tmp_path / "trial-00000").Scalars("accuracy")] == [1]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "trial-00000/events.out.tfevents.rlsearch",
        "trial-00000/result/events.out.tfevents.rlsearch",
    ]


def test_a_whole_run_agrees_with_its_tables(tmp_path: Path, run_folder: Path) -> None:
    run = read_run(run_folder)
    for record in run.records:
        path = epochs_path(run.folder, record.trial)
        write_trial(tmp_path, record, read_epochs(path) if path.exists() else [], run.objectives)
    for record in run.records:
        events = read(tmp_path / f"trial-{record.trial:05d}" / "result")
        final = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
        expected = {name: record.metric(name) for name in run.objectives} if record.state == "COMPLETE" else {}
        assert final == pytest.approx(expected, rel=1e-6)


def test_neither_torch_nor_tensorflow_is_needed() -> None:
    code = (
        "import sys, rlsearch.results.tensorboard; print({'torch', 'tensorflow', 'ray', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
