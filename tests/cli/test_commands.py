"""The command line: exit codes, one message for a mistake, and the commands that need no run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlsearch import LearnDrop, ModelSpec, Policy, Replacement, __version__, build_model
from rlsearch.export import load_exported

COMMANDS = ["validate", "profile", "search", "resume", "pareto", "report", "export", "train", "doctor"]


def rlsearch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "rlsearch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250, check=False)


def test_version_and_help() -> None:
    assert rlsearch("--version").stdout == f"rlsearch {__version__}\n"
    shown = rlsearch("--help").stdout
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = rlsearch(command, "--help")
    assert done.returncode == 0
    assert f"Example: rlsearch {command}" in done.stdout


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    replacements = (Replacement("layer1.1", "scalar"), Replacement("layer2.2", "skip"))
    Policy(ModelSpec("resnet20"), replacements, LearnDrop()).save(path)
    return path


def test_train_goes_on_where_it_was(policy: Path, tmp_path: Path) -> None:
    arguments = ("train", policy, "--data", "digits", "--epochs", 2, "--set", "data.limit=200", "--out", "trained")
    done = rlsearch(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2: accuracy" in done.stdout
    again = rlsearch(*arguments, "--json", cwd=tmp_path)
    assert "going on after epoch 2" in again.stderr
    assert json.loads(again.stdout)["epoch"] == 2
    model = load_exported(tmp_path / "trained")
    assert model.layer1[1].conv1.weight.shape == build_model("resnet20").layer1[1].conv1.weight.shape
    other = rlsearch(*arguments, "--seed", 3, cwd=tmp_path)
    assert (other.returncode, "another seed" in other.stderr) == (2, True)


def test_doctor() -> None:
    content = json.loads(rlsearch("doctor", "--json").stdout)
    found = {finding["what"]: finding["status"] for finding in content["findings"]}
    assert {"Python", "torch", "ray", "optuna", "Ray", "run folders", "temporary files"} <= found.keys()
    assert "error" not in found.values()


MISTAKES = {
    "unknown model": (["profile", "resnet23"], "resnet23"),
    "policy for another model": (["profile", "resnet32", "--policy", "{policy}"], "resnet20"),
    "missing policy": (["profile", "resnet20", "--policy", "none.json"], "none.json"),
    "no run": (["pareto", "nowhere"], "nowhere"),
    "no run to resume": (["resume", "nowhere"], "nowhere"),
    "no run to export": (["export", "nowhere", "--out", "out"], "nowhere"),
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
def test_a_mistake_ends_with_2_and_one_message(mistake: str, policy: Path, tmp_path: Path) -> None:
    arguments, named = MISTAKES[mistake]
    done = rlsearch(*(argument.format(policy=policy) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_model_code_of_a_policy_runs_only_when_it_is_named(tmp_path: Path) -> None:
    code = "open('ran', 'w')\nfrom rlsearch import build_model\nmake = lambda num_classes: build_model('resnet20')"
    (tmp_path / "mine.py").write_text(code)
    Policy(ModelSpec("mine:make")).save(tmp_path / "policy.json")
    given = ("train", "policy.json", "--data", "digits", "--epochs", 1, "--set", "data.limit=100", "--out", "out")
    refused = rlsearch(*given, cwd=tmp_path)
    assert (refused.returncode, "add --model mine:make" in refused.stderr) == (2, True)
    assert not (tmp_path / "ran").exists()
    assert rlsearch(*given, "--model", "mine:make", cwd=tmp_path).returncode == 0
    assert (tmp_path / "ran").exists()


def test_a_policy_for_another_model_is_refused(policy: Path, tmp_path: Path) -> None:
    content = json.loads(policy.read_text())
    content["model"]["name"] = "resnet18"
    content["replacements"][0]["unit"] = "layer1.9"
    (tmp_path / "policy.json").write_text(json.dumps(content))
    done = rlsearch("train", "policy.json", "--data", "digits", "--out", "out", cwd=tmp_path)
    assert (done.returncode, "layer1.9" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
