"""Two searches of one team in one PostgreSQL database, as users run them: side by side, killed, resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from postgresql import PASSWORD, Server, running_server

from rlsearch.results.tables import read_run

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "rlsearch"]
SPACE = """
model: {name: resnet20}
data: {name: digits, limit: 150}
training: {epochs: 1, batch_size: 32}
space:
  replacement: {units: "layer*", blocks: [skip, scalar], max_fraction: 0.5}
search: {trials: 5, max_concurrent: 1, storage: postgresql}
resources: {cpu: 1, gpu: 0}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@contextmanager
def started(folder: Path, server: Server, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, **server.environment, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.cluster
def test_two_searches_of_a_team_side_by_side_one_of_them_killed_and_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    runs, printed = ("one", "two"), list[str]()
    search = ("search", "space.yaml", "--run-dir")
    with (
        started(tmp_path, server, *search, "one") as one,
        started(tmp_path, server, *search, "two", "--set", "search.seed=1") as two,
    ):
        assert one.stdout is not None
        printed.append(next((line for line in one.stdout if "trial 1" in line and "COMPLETE" in line), ""))
        assert printed[0]
        one.kill()
        one.wait()
        with started(tmp_path, server, "resume", "one") as again:
            for process in (again, two):
                printed.append(process.communicate(timeout=240)[0])
                assert process.returncode == 0, printed[-1]
    names = []
    for run in runs:
        folder = tmp_path / run
        records = read_run(folder).records
        assert [(record.trial, record.state) for record in records] == [(n, "COMPLETE") for n in range(5)]
        names.append(json.loads((folder / "study.json").read_text())["study"])
        assert not (folder / "study.db").exists()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        storage = optuna.storages.RDBStorage("postgresql+psycopg://")
        for run, name in zip(runs, names, strict=True):
            study = optuna.load_study(study_name=name, storage=storage)
            assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5
            assert [t.values[0] for t in study.trials] == [r.accuracy for r in read_run(tmp_path / run).records]
        storage.engine.dispose()
    left = [path for path in tmp_path.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert left == []
    assert PASSWORD not in "".join(printed)


def test_doctor_looks_at_the_database_that_the_environment_names(
    server: Server, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any]
) -> None:
    def looked() -> list[tuple[str, str]]:
        printed = in_process("doctor", "--json").stdout
        assert PASSWORD not in printed
        findings = json.loads(printed)["findings"]
        return [(finding["status"], finding["found"]) for finding in findings if finding["what"] == "PostgreSQL"]

    for name in server.environment:
        monkeypatch.delenv(name, raising=False)
    assert looked() == []
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    ((status, found),) = looked()
    assert status == "ok"
    assert re.fullmatch(rf"\d+\.\S.* at 127\.0\.0\.1:{server.port}/postgres, [\d.]+ ms a query", found)
    monkeypatch.setenv("PGPORT", "1")
    ((status, found),) = looked()
    assert status == "warning"
    assert "127.0.0.1:1/postgres does not let us in" in found
