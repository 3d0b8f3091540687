"""The command line: exit codes, one message for a mistake, and the commands that need no run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsearch import __version__

COMMANDS = [
    "validate",
    "profile",
    "search",
    "resume",
    "repair",
    "pareto",
    "report",
    "confirm",
    "export",
    "train",
    "doctor",
]


def rlsearch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "rlsearch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_version_and_help() -> None:
    assert rlsearch("--version").stdout == f"rlsearch {__version__}\n"
    shown = rlsearch("--help").stdout
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(in_process: Callable[..., Any], command: str) -> None:
    done = in_process(command, "--help")
    assert done.returncode == 0
    assert f"Example: rlsearch {command}" in done.stdout


@pytest.mark.cluster
def test_doctor() -> None:
    content = json.loads(rlsearch("doctor", "--json").stdout)
    found = {finding["what"]: finding["status"] for finding in content["findings"]}
    assert {"Python", "torch", "ray", "optuna", "Ray", "run folders", "temporary files"} <= found.keys()
    assert "error" not in found.values()


MISTAKES = {
    "unknown model": (["profile", "resnet23"], "resnet23"),
    "policy for another model": (["profile", "resnet32", "--policy", "{policy}"], "resnet20"),
    "neither file nor model": (["train", "best", "--data", "digits", "--out", "out"], "there is no file 'best'"),
    "settings of Learn&Drop": (
        ["train", "resnet20", "--learn-drop", "treshold=1", "--data", "digits", "--out", "out"],
        "did you mean 'threshold'?",
    ),
    "missing policy": (["profile", "resnet20", "--policy", "none.json"], "none.json"),
    "no run": (["pareto", "nowhere"], "nowhere"),
    "no run to resume": (["resume", "nowhere"], "nowhere"),
    "no run to export": (["export", "nowhere", "--out", "out"], "nowhere"),
    "no run to confirm": (["confirm", "nowhere"], "nowhere"),
    "no space": (["search", "none.yaml", "--run-dir", "run"], "none.yaml"),
    "no data": (["train", "{policy}", "--out", "out"], "--data"),
    "unknown data": (["train", "{policy}", "--data", "digist", "--out", "out"], "digist"),
    "unknown setting": (
        ["train", "{policy}", "--data", "digits", "--set", "training.lrr=1", "--out", "out"],
        "training.lrr",
    ),
    "missing shards": (["train", "{policy}", "--data", "parquet:none", "--out", "out"], "none"),
    "unknown option": (["pareto", "nowhere", "--selct", "knee"], "--selct"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_ends_with_2_and_one_message(
    in_process: Callable[..., Any], mistake: str, policy: Path, tmp_path: Path
) -> None:
    arguments, named = MISTAKES[mistake]
    done = in_process(*(argument.format(policy=policy) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []
