"""The proof of a run's books notices whatever is not in order."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from books import check_books, compare, left_behind, read_ended
from one_process_search import search_in_one_process

from rlsearch.results.tables import epochs_path, read_epochs, read_trials, write_epochs, write_trials
from rlsearch.results.tensorboard import write_trial
from rlsearch.run_lock import run_lock

TRIALS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books") / "run"
    search_in_one_process(folder, TRIALS)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def sql(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(folder / "study.db") as connection:
        assert connection.execute(statement, values).rowcount == 1
    connection.close()


def change_outcome(folder: Path) -> None:
    with sqlite3.connect(folder / "study.db") as connection:
        key = "SELECT trial_user_attribute_id, value_json FROM trial_user_attributes WHERE key = 'outcome'"
        identity, text = connection.execute(key).fetchone()
        outcome = json.loads(text)
        outcome["epochs"]["accuracy"] = [0.123]
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE trial_user_attribute_id = ?",
            (json.dumps(outcome), identity),
        )
    connection.close()


def change_record(folder: Path) -> None:
    first, *others = read_trials(folder / "trials.parquet")
    write_trials(folder / "trials.parquet", [replace(first, params=1), *others])


def change_epochs(folder: Path) -> None:
    (row,) = read_epochs(epochs_path(folder, 1))
    write_epochs(epochs_path(folder, 1), [row | {"train_loss": 0.5}])


def add_epoch(folder: Path) -> None:
    (row,) = read_epochs(epochs_path(folder, 1))
    write_epochs(epochs_path(folder, 1), [row, row])


def change_curve(folder: Path) -> None:
    record, (row,) = read_trials(folder / "trials.parquet")[1], read_epochs(epochs_path(folder, 1))
    write_trial(folder / "tensorboard", record, [row | {"accuracy": 0.123}], ["accuracy", "params", "train_flops"])


def change_status(folder: Path) -> None:
    record, rows = read_trials(folder / "trials.parquet")[1], read_epochs(epochs_path(folder, 1))
    write_trial(folder / "tensorboard", replace(record, state="FAIL"), rows)


def show_curve_twice(folder: Path) -> None:
    (path,) = (folder / "tensorboard" / "trial-00001").glob("events*")
    shutil.copy(path, path.with_name(path.name + ".again"))


def add_twin(folder: Path) -> None:
    """Trial 2 becomes the same training as trial 1."""
    copied = "SELECT value_json FROM trial_user_attributes WHERE trial_id = 2 AND key = ?"
    for key in ("policy", "training", "seed"):
        sql(
            folder, f"UPDATE trial_user_attributes SET value_json = ({copied}) WHERE trial_id = 3 AND key = ?", key, key
        )


ALTERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "running": (lambda run: sql(run, "UPDATE trials SET state = 'RUNNING' WHERE number = 1"), "trial 1: is RUNNING"),
    "waiting": (lambda run: sql(run, "UPDATE trials SET state = 'WAITING' WHERE number = 2"), "trial 2: is WAITING"),
    "gap": (lambda run: sql(run, "UPDATE trials SET number = 7 WHERE number = 1"), r"numbers are \[0, 2, 7\]"),
    "lost": (lambda run: sql(run, "DELETE FROM trials WHERE number = 2"), r"numbers are \[0, 1\]"),
    "value": (
        lambda run: sql(run, "UPDATE trial_values SET value = 0.5 WHERE trial_id = 2 AND objective = 0"),
        "trial 1: the list of values is",
    ),
    "twin": (add_twin, "1 trials train the same policy in the same way"),
    "outcome": (change_outcome, "trial 0: accuracy is 0.123 in the study"),
    "record": (change_record, "trial 0: params is .* in the study, 1 in trials.parquet"),
    "table": (lambda run: (run / "trials.parquet").unlink(), "trials.parquet: is missing"),
    "row": (
        lambda run: write_trials(run / "trials.parquet", read_trials(run / "trials.parquet")[:2]),
        r"trials.parquet has the trials \[0, 1\], the study \[0, 1, 2\]",
    ),
    "epochs": (change_epochs, "trial 1: train_loss of epoch 1 is .* in the study, 0.5 in epochs"),
    "epoch twice": (add_epoch, "epochs/trial-00001.parquet: has 2 rows, the study 1"),
    "stray epochs": (
        lambda run: shutil.copy(epochs_path(run, 1), epochs_path(run, 77)),
        "epochs/trial-00077.parquet: is there, and should not be",
    ),
    "curve": (change_curve, r"trial 1: accuracy by epoch is .* in the study, \[\(1, 0.123"),
    "status": (change_status, "trial 1: is COMPLETE in the study, and has the status"),
    "curve twice": (show_curve_twice, "trial 1: accuracy by epoch is"),
    "no curve": (lambda run: shutil.rmtree(run / "tensorboard" / "trial-00002"), "tensorboard/trial-00002: is missing"),
    "no weights": (
        lambda run: (run / "checkpoints" / "trial-00000" / "model.safetensors").unlink(),
        "trial-00000/model.safetensors: is missing",
    ),
    "torn weights": (
        lambda run: (run / "checkpoints" / "trial-00000" / "model.safetensors").write_bytes(b"torn"),
        "checkpoints/trial-00000: cannot be read",
    ),
    "checkpoint": (
        lambda run: (run / "checkpoints" / "trial-00000" / "last.pt").touch(),
        "trial-00000/last.pt: is there, and should not be",
    ),
    "temporary file": (lambda run: (run / "epochs" / ".x.parquet.abcd1234").touch(), "x.*: is a temporary file"),
    "transaction": (lambda run: (run / "study.db-journal").touch(), "study.db-journal: a transaction was left open"),
}


def test_the_books_of_a_search_are_in_order(finished: Path) -> None:
    assert check_books(finished, TRIALS) == []
    assert any("must be 0 to 3" in line for line in check_books(finished, TRIALS + 1))


@pytest.mark.parametrize("name", ALTERED)
def test_whatever_is_altered_is_noticed(run: Path, name: str) -> None:
    alter, told = ALTERED[name]
    alter(run)
    with pytest.raises(AssertionError, match=told):
        assert "\n".join(check_books(run, TRIALS)) == ""


def test_a_lock_that_is_held_is_noticed(run: Path) -> None:
    with run_lock(run):
        assert check_books(run, TRIALS) == ["run.lock: is held"]


def test_what_had_ended_may_only_grow(run: Path) -> None:
    before = read_ended(run)
    assert compare({0: before[0]}, before) == []
    assert compare(before, {0: before[0], 2: before[2]}) == ["trial 1: had ended, and is gone"]
    sql(run, "UPDATE trials SET datetime_complete = '2026-01-01 00:00:00' WHERE number = 2")
    assert compare(before, read_ended(run)) == ["trial 2: had ended, and is another one now"]


def test_processes_and_files_that_were_left_are_noticed(tmp_path: Path) -> None:
    assert left_behind(tmp_path / "nowhere") == left_behind(tmp_path) == []
    (tmp_path / "left").touch()
    code = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "left")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = left_behind(tmp_path)
        process.kill()
    assert found == [f"{tmp_path / 'left'} was left", f"process {process.pid} was left"]
