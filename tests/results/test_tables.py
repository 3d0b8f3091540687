"""The tables: what is written is what is read, and nothing damaged is ever read."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlsearch.errors import RunFolderError
from rlsearch.results.tables import (
    METRICS,
    TrialRecord,
    epochs_path,
    read_epochs,
    read_run,
    read_trials,
    write_epochs,
    write_trials,
)

COLUMNS = {
    *("trial", "state", "reason", "policy", "policy_hash", "seed", "fidelity", "dropped_units", "device", "started"),
    *("accuracy", "params", "params_total", "memory", "memory_predicted", "train_flops", "forward_flops"),
    *("train_seconds", "samples_per_second", "ended", "origin", "training"),
    *("forward_share", "mean_learnable_params", "step_memory", "packed"),
}


def test_the_columns_are_those_of_the_contract(tmp_path: Path, make_record: Any) -> None:
    write_trials(tmp_path / "trials.parquet", [make_record(0)])
    assert set(pq.read_schema(tmp_path / "trials.parquet").names) == COLUMNS
    assert {item.name for item in fields(TrialRecord)} == COLUMNS
    assert set(METRICS) < COLUMNS


def test_records_come_back_as_they_were_sorted_by_trial(tmp_path: Path, make_record: Any) -> None:
    bare = TrialRecord(trial=2, state="FAIL", policy="{}", policy_hash="00", seed=7, reason="diverged")
    odd = make_record(1, accuracy=0.1 + 0.2, train_flops=8.1e18, reason='"quoted", ü\n')
    zone = timezone(timedelta(hours=2))
    moved = make_record(0, started=datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=zone))
    write_trials(tmp_path / "trials.parquet", [bare, moved, odd])
    assert read_trials(tmp_path / "trials.parquet") == [moved, odd, bare]
    assert read_trials(tmp_path / "trials.parquet")[0].started.tzinfo is UTC


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    write_trials(tmp_path / "trials.parquet", [])
    assert read_trials(tmp_path / "trials.parquet") == []


def test_a_trial_twice_is_refused_and_the_old_table_stays(tmp_path: Path, make_record: Any) -> None:
    path = tmp_path / "trials.parquet"
    write_trials(path, [make_record(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="twice: 3"):
        write_trials(path, [make_record(3), make_record(1), make_record(3)])
    with pytest.raises(ValueError, match="'much'"):
        write_trials(path, [make_record(0, memory="much")])
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["trials.parquet"]


@pytest.mark.parametrize(
    ("column", "value"), [("state", "DONE"), ("origin", "control"), ("started", datetime(2026, 1, 1))]
)
def test_a_record_checks_its_words_and_times(make_record: Any, column: str, value: object) -> None:
    with pytest.raises(ValueError, match=column):
        make_record(0, **{column: value})


def test_every_cut_and_every_flipped_byte_is_noticed(tmp_path: Path, make_record: Any) -> None:
    path = tmp_path / "trials.parquet"
    records = [make_record(0), make_record(1, accuracy=0.95, params=400_000)]
    write_trials(path, records)
    whole = path.read_bytes()
    noticed = []
    for place in range(0, len(whole), 41):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            try:
                # Some bytes say nothing about the rows; what is read must then be what was written.
                assert read_trials(path) == records
            except RunFolderError as error:
                noticed.append(str(error))
    assert len(noticed) > len(whole) / 41
    assert all(message.startswith(f"{path}: is damaged") and "rlsearch resume" in message for message in noticed)


def test_a_changed_row_in_a_sound_file_is_noticed(tmp_path: Path, make_record: Any) -> None:
    path = tmp_path / "trials.parquet"
    write_trials(path, [make_record(0)])
    table = pq.read_table(path)
    column = table.schema.get_field_index("accuracy")
    changed = table.set_column(column, table.schema.field(column), [[0.999]])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(RunFolderError, match="its rows are not those that were written"):
        read_trials(path)


def test_another_table_is_refused(tmp_path: Path, make_record: Any) -> None:
    path = tmp_path / "table.parquet"
    write_epochs(path, [{"epoch": 1}])
    with pytest.raises(RunFolderError, match="its columns are not those"):
        read_trials(path)
    path.write_text("no table")
    with pytest.raises(RunFolderError, match="is damaged"):
        read_epochs(path)
    with pytest.raises(RunFolderError, match="is missing"):
        read_trials(tmp_path / "none.parquet")


def test_epochs_come_back_as_they_were(tmp_path: Path) -> None:
    path = epochs_path(tmp_path, 17)
    assert path == tmp_path / "epochs" / "trial-00017.parquet"
    rows = [{"epoch": 1, "accuracy": 0.5, "device": "cpu"}, {"epoch": 2, "accuracy": 0.75, "params": 466_906}]
    write_epochs(path, rows)
    read = read_epochs(path)
    assert [{name: value for name, value in row.items() if value is not None} for row in read] == rows
    with pytest.raises(ValueError, match="'acuracy' is no column of the epochs table; did you mean 'accuracy'"):
        write_epochs(path, [{"acuracy": 0.5}])
    assert read_epochs(path) == read


def test_the_epochs_table_holds_what_a_trial_reports(tmp_path: Path) -> None:
    metrics = pytest.importorskip("rlsearch.training.metrics")
    values = {"device": "cpu", "accuracy": 0.5, "lr": 0.1, "train_flops": 1.5e12}
    values |= {"forward_share": 0.75, "mean_learnable_params": 1.5, "learning": ["b", "head"], "left": ["stem", "a"]}
    row = {item.name: values.get(item.name, 3) for item in fields(metrics.EpochMetrics)}
    write_epochs(tmp_path / "epochs.parquet", [metrics.EpochMetrics(**row).to_dict()])
    assert read_epochs(tmp_path / "epochs.parquet") == [row]


def test_a_run_is_read_from_its_folder(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert dict(run.objectives) == {
        "accuracy": "maximize",
        "params": "minimize",
        "memory": "minimize",
        "train_flops": "minimize",
    }
    assert run.directions == ("maximize", "minimize", "minimize", "minimize")
    assert run.constraints == {"params": "<= 1.0x"}
    assert [record.trial for record in run.records] == list(range(24))
    assert run.space["model"] == {"name": "resnet32"}


def test_a_run_whose_first_trial_has_not_ended_has_no_records(run_folder: Path) -> None:
    (run_folder / "trials.parquet").unlink()
    (run_folder / "study.db").touch()
    assert read_run(run_folder).records == ()


def test_what_is_no_run_is_named(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"space\.yaml: is missing, so .* holds no run"):
        read_run(tmp_path)
    (run_folder / "trials.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"trials\.parquet: is missing"):
        read_run(run_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("objectives: {acuracy: maximize}", "did you mean 'accuracy'"),
        ("objectives: {accuracy: up}", "objectives.accuracy: must be maximize or minimize, got 'up'"),
        ("objectives: {}", "objectives must map metrics to directions"),
        ("- a list", "is no search space"),
        ("objectives: {accuracy: maximize", "cannot be read"),
        ("x: !!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_damaged_space_is_named(run_folder: Path, content: str, message: str) -> None:
    (run_folder / "space.yaml").write_text(content)
    with pytest.raises(RunFolderError, match=r"space\.yaml") as caught:
        read_run(run_folder)
    assert message in str(caught.value)


def test_metric_reads_any_of_the_metrics(make_record: Any) -> None:
    item = replace(make_record(0), **{name: index for index, name in enumerate(METRICS)})
    assert [item.metric(name) for name in METRICS] == list(range(len(METRICS)))
