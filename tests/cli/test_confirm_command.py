"""``rlsearch confirm`` as a user types it, and what the other commands show afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run

from rlsearch.results.confirmed import read_confirmed

# As in a terminal: a test run in the background inherits an ignored SIGINT.
CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlsearch.cli import main
main()
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("searched") / "run")


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


def test_ctrl_c_says_how_to_go_on_and_it_does(in_process: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-u", "-c", CODE, "confirm", "run", "--seeds", "2", "--select", "params"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdout is not None
        told = next(process.stdout)
        assert told.startswith("4 trainings: trials 0, 1, each with seeds 1, 2; about ")
        assert next(process.stdout).startswith("trial 0, seed 1: ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with: rlsearch confirm run --seeds 2 --select params" in out
    assert "Traceback" not in out + err
    kept = read_confirmed(folder / "confirmed.parquet")
    assert 1 <= len(kept) < 4

    done = in_process("confirm", "run", "--seeds", "2", "--select", "params", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"; {len(kept)} are done; about " in lines[0]
    assert "(4 of 4 trainings done, 0s left)" in done.stdout
    assert "confirmed on the test split: trials 0, 1 (2 new seeds each): all of the front and the baseline" in lines[-2]
    assert lines[-1] == "report: run/report.html"
    assert "Confirmed with new seeds" in (folder / "report.html").read_text(encoding="utf-8")

    again = in_process("confirm", folder, "--seeds", "2", "--json")
    assert again.returncode == 0
    content = json.loads(again.stdout)
    assert [item["trial"] for item in content["confirmed"]] == [0, 1]
    assert "all of them are done" in again.stderr

    shown = in_process("pareto", folder)
    assert "P(front)" in shown.stdout
    front = json.loads(in_process("pareto", folder, "--json").stdout)
    assert front["selected"]["why"].endswith("its accuracy as confirmed on the test split")
    for item in front["front"]:
        (entry,) = [entry for entry in content["confirmed"] if entry["trial"] == item["trial"]]
        assert item["confirmed"] | {"trial": item["trial"]} == entry


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds"),
        (["--trial", "9"], "has no trial 9"),
        (["--select", "acuracy"], "did you mean 'accuracy'?"),
        (["--model", "resnet32"], "--model is 'resnet32', but the model of"),
    ],
)
def test_a_mistake_ends_with_2_and_one_message(
    in_process: Callable[..., Any], folder: Path, arguments: list[str], message: str
) -> None:
    done = in_process("confirm", folder, *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (folder / "confirmed.parquet").exists()
