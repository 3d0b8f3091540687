"""``rlsearch search`` and ``rlsearch resume`` as a user runs them: real processes, real signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlsearch.cli.search import show_result
from rlsearch.errors import RunFolderError, UserError
from rlsearch.results.tables import read_epochs, read_run
from rlsearch.search.run import SearchResult, resume_search

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from rlsearch.cli import main; main()"]
SPACE = """
model: {name: resnet20}
data: {name: digits, limit: 150}
training: {epochs: 2, batch_size: 32}
space:
  replacement: {units: "layer*", blocks: [skip, scalar], max_fraction: 0.5}
search: {trials: 6, max_concurrent: 2}
resources: {cpu: 1, gpu: 0}
"""


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, as a terminal or a batch system would start it."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Reads until a line that holds ``text``."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} was never printed, but: {''.join(seen)}")


def members(session: int) -> list[str]:
    """What still runs of a session: the driver and all of its Ray."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [row[-1] for row in rows if row[0] == str(session) and not row[1].startswith("Z")]


def study_of(folder: Path) -> optuna.Study:
    """The one study of a run."""
    (name,) = optuna.get_all_study_names(f"sqlite:///{folder}/study.db")
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db")


def check_whole(folder: Path, trials: int) -> None:
    """Study, tables and TensorBoard say the same: exactly ``trials`` trials, each once, none open."""
    study = study_of(folder)
    assert [trial.number for trial in study.trials] == list(range(trials))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    records = read_run(folder).records
    assert [record.trial for record in records] == list(range(trials))
    assert records[0].origin == "baseline"
    assert [[r.accuracy, r.params, r.memory, r.train_flops] for r in records] == [t.values for t in study.trials]
    assert len({(record.policy_hash, record.seed) for record in records}) == trials
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == [f"trial-{i:05d}" for i in range(trials)]
    for record in records:
        rows = read_epochs(folder / "epochs" / f"trial-{record.trial:05d}.parquet")
        assert [row["epoch"] for row in rows] == [1, 2]
        events = EventAccumulator(str(folder / "tensorboard" / f"trial-{record.trial:05d}"))
        events.Reload()
        assert [event.value for event in events.Scalars("accuracy")] == pytest.approx([row["accuracy"] for row in rows])


@pytest.mark.cluster
def test_a_killed_search_leaves_no_process_and_is_resumed_to_exactly_its_trials(space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(tmp_path, "search", str(space), "--run-dir", "run", "--trials", "100") as search:
        wait_for(search, "trial 1:")
        with pytest.raises(RunFolderError, match=f"is in use by process {search.pid} of "):
            resume_search(folder)
        search.send_signal(signal.SIGKILL)
        assert search.wait() == -signal.SIGKILL
        before = read_run(folder).records
        deadline = time.monotonic() + 20
        while (left := members(search.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    states = [trial.state.name for trial in study_of(folder).trials]
    assert set(states) <= {"COMPLETE", "RUNNING"}  # what was under way is left open, for the resume to take up

    total = len(states) + 1
    resumed = run(tmp_path, "resume", "run", "--trials", str(total), "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{total} of {total} trials done" in resumed.stderr  # progress, apart from the JSON
    summary = json.loads(resumed.stdout)
    assert summary["counts"] == {"COMPLETE": total, "PRUNED": 0, "FAIL": 0, "INFEASIBLE": 0}
    assert summary["baseline"]["trial"] == 0
    check_whole(folder, total)
    after = {record.trial: record for record in read_run(folder).records}
    assert [after[record.trial] for record in before] == list(before)  # what had ended is as it was
    assert (folder / "report.html").is_file()
    assert (folder / "front.png").is_file()


@pytest.mark.cluster
def test_sigterm_ends_with_143_and_says_how_to_go_on(space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    options = ["--run-dir", "my run", "--trials", "100", "--seed", "7"]
    options += ["--set", "training.batch_size=50", "--set", "search.max_concurrent=1"]
    with started(tmp_path, "search", str(space), *options) as search:
        wait_for(search, "trial 0:")
        search.send_signal(signal.SIGTERM)
        assert search.stdout is not None
        told = search.stdout.read()
        assert search.wait() == 143
        assert members(search.pid) == []
    assert "resume with: rlsearch resume 'my run'" in told
    assert "Traceback" not in told
    states = [trial.state.name for trial in study_of(folder).trials]
    assert states[0] == "COMPLETE"
    assert set(states) <= {"COMPLETE", "WAITING"}  # nothing RUNNING: what was under way waits to be taken up again
    assert len(read_run(folder).records) == states.count("COMPLETE")
    records = read_run(folder).records
    assert {json.loads(record.training)["batch_size"] for record in records} == {50}
    assert {record.seed for record in records} == {7}

    shown = io.StringIO()
    show_result(SearchResult(folder, records), Path("my run"), Console(file=shown, width=200), as_json=False)
    for text in ("end-to-end", "against the end-to-end baseline: ", "report.html", "rlsearch export 'my run' --out"):
        assert text in shown.getvalue()


@pytest.mark.cluster
def test_a_second_ctrl_c_ends_at_once_and_nothing_stays(space: Path, tmp_path: Path) -> None:
    with started(tmp_path, "search", str(space), "--run-dir", "run", "--set", "training.epochs=200") as search:
        wait = time.monotonic() + 120
        while not (tmp_path / "run" / "space.yaml").exists():
            assert time.monotonic() < wait
            time.sleep(0.1)
        # To the whole group, as a terminal does; the second one while the first one is being worked on.
        os.killpg(search.pid, signal.SIGINT)
        while search.poll() is None:
            time.sleep(0.01)
            if search.poll() is None:
                os.killpg(search.pid, signal.SIGINT)
        assert search.returncode == 130
        deadline = time.monotonic() + 20
        while (left := members(search.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    with pytest.raises(UserError, match="--trials: must be at least "):  # past the lock
        resume_search(tmp_path / "run", trials=0)


def test_a_search_that_a_rule_has_ended_says_which_and_how_to_go_on(run_folder: Path) -> None:
    shown = io.StringIO()
    result = SearchResult(
        run_folder, read_run(run_folder).records, None, "the time budget is spent", "--time-budget 2h"
    )
    show_result(result, Path("my run"), Console(file=shown, width=60), as_json=False)
    first, second = shown.getvalue().splitlines()[:2]
    assert first == "the time budget is spent: ended after 24 trials"
    assert second == "to go on all the same: rlsearch resume 'my run' --time-budget 2h"
    told = "".join(shown.getvalue().split())
    for title, name in (("report", "report.html"), ("picture", "front.png"), ("layers", "units.png")):
        assert f"{title}:{run_folder / name}" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--trials", "0", "--time-budget", "soon"], "search.time_budget: must be a time above 0, as in 2h"),
        (["--set", "data.name=imagefolder:nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(space: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    ended = run(tmp_path, "search", str(space), "--run-dir", "run", *arguments)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]
