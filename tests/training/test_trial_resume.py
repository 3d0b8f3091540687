"""Interrupted trainings: after any epoch, and killed at any moment, they end as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsearch import DataSpec, EpochMetrics, LearnDrop, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec
from rlsearch.learn_drop import feature_store
from rlsearch.policy import FEATURES, SCORES
from rlsearch.training import feature_inputs
from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.feature_views import Views
from rlsearch.training.trial import Trial

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataSpec("digits", limit=120, flip=True, crop=1)
EPOCHS = 6
TIMES = ("train_seconds", "samples_per_second")
REPLACED = (Replacement("units.1", "scalar"), Replacement("units.3", "skip"))
# So that layers leave in the middle of the training, some of them later than others.
THRESHOLDS = {"param_change": 0.87, "param_change_per_lr": 0.93, "grad_change": 0.8, "schedule": 0.5}
LEARNING = {"param_change_per_lr": {"lr": 0.1, "momentum": 0.0}}

State = dict[str, Any]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DATA)


def spec(score: str = "schedule", features: str = "stored", replaced: tuple[Replacement, ...] = ()) -> TrialSpec:
    drop = LearnDrop(score, THRESHOLDS[score], patience=1, warmup=0.0, max_fraction=1.0, features=features)
    learning = {"lr": 0.05} | LEARNING.get(score, {})
    training = TrainingSpec(epochs=EPOCHS, batch_size=32, warmup_epochs=0.0, **learning)
    return TrialSpec(ModelSpec("tiny_net:make"), DATA, training, Policy(replacements=replaced, learn_drop=drop))


def trial_of(digits: ImageData, what: TrialSpec, scratch: Path, checkpoint: Path | None = None) -> Trial:
    trial = Trial(what, data=digits, device="cpu", scratch=scratch)
    if checkpoint is not None:
        trial.load_state_dict(load_checkpoint(checkpoint))
    return trial


def without_times(metrics: EpochMetrics | dict[str, Any]) -> dict[str, Any]:
    row = metrics if isinstance(metrics, dict) else metrics.to_dict()
    return {key: value for key, value in row.items() if key not in TIMES}


def epochs_of(trial: Trial, folder: Path) -> Iterator[tuple[dict[str, Any], State, Path]]:
    """Trains to the end: metrics and state after every epoch, the state as it stands in a file."""
    while not trial.done:
        metrics = trial.run_epoch()
        path = folder / f"{trial.epochs_done}.pt"
        save_checkpoint(path, trial.state_dict())
        state = load_checkpoint(path)
        del state["sums"]["train_seconds"]
        yield without_times(metrics), state, path


def same(ours: Any, theirs: Any) -> bool:
    """Whether two states are equal, to the bit."""
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def moves(rows: list[dict[str, Any]]) -> int:
    """How often layers left."""
    return sum(bool(row["left"]) for row in rows)


CASES = [(score, features, ()) for score in SCORES for features in FEATURES]
CASES += [("param_change", "stored", REPLACED), ("schedule", "recompute", REPLACED)]


@pytest.mark.parametrize(("score", "features", "replaced"), CASES)
def test_interrupted_after_any_epoch_it_ends_the_same(
    digits: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    score: str,
    features: str,
    replaced: tuple[Replacement, ...],
) -> None:
    what = spec(score, features, replaced)
    decided_before = EPOCHS + 1

    def decide(times: object, remaining: int) -> bool:
        assert remaining < decided_before, "what was decided before the interruption is not decided again"
        return remaining % 2 == 0

    monkeypatch.setattr(feature_inputs, "worth_storing", decide)
    (tmp_path / "straight").mkdir()
    straight = list(epochs_of(trial_of(digits, what, tmp_path), tmp_path / "straight"))
    rows = [row for row, _, _ in straight]
    assert moves(rows) >= (2 if score in ("param_change", "schedule") else 1)
    for done, (_, _, checkpoint) in enumerate(straight[:-1], start=1):
        decided_before = EPOCHS - done
        rest = epochs_of(trial_of(digits, what, tmp_path, checkpoint), tmp_path)
        # Two epochs show what is made again and what goes on from it; the first interruption is followed to the end.
        for expected, expected_state, _ in straight[done : None if done == 1 else done + 2]:
            row, state, _ = next(rest)
            assert row == expected
            assert same(state, expected_state)


# What an interrupted process left of its features, and what is said of it.
LEFT: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "whole": (lambda own, other: own, ""),
    "truncated": (lambda own, other: own[:-1], "are truncated"),
    "of another run": (lambda own, other: other, "are of another run"),
    "empty": (lambda own, other: b"", "no readable key"),
}


@pytest.mark.parametrize("left", sorted(LEFT))
def test_a_file_of_features_is_taken_up_or_built_again(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 0)

    def interrupted(what: TrialSpec, folder: Path) -> tuple[Path, bytes]:
        """The checkpoint after the first cut, and the content of the file of features, which goes with the trial."""
        folder.mkdir()
        trial = trial_of(digits, what, folder)
        _, _, checkpoint = next(epochs_of(trial, folder))
        assert trial.features_in == "file"
        return checkpoint, next(folder.glob("*.bin")).read_bytes()

    what, scratch = spec(), tmp_path / "own"
    checkpoint, own = interrupted(what, scratch)
    _, other = interrupted(replace(what, seed=1), tmp_path / "other")
    straight = list(epochs_of(trial_of(digits, what, tmp_path / "other"), tmp_path))
    resumed = trial_of(digits, what, scratch, checkpoint)
    content, said = LEFT[left]
    (scratch / f"rlsearch-features-{resumed._inputs._run_name}.bin").write_bytes(content(own, other))
    filled = []
    fill = Views.fill
    monkeypatch.setattr(Views, "fill", lambda self, *rest: (filled.append(1), fill(self, *rest)))
    rest = list(epochs_of(resumed, scratch))
    assert [row for row, _, _ in rest] == [row for row, _, _ in straight[1:]]
    assert same(rest[-1][1], straight[-1][1])
    assert bool(filled) == (left != "whole"), "a whole file is not built again"
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)
    assert not list(scratch.glob("*.bin")), "it goes with the training"


# Forks a process for every line with arguments of `rlsearch train`, and says how it ended: what takes its time (torch,
# and a first look at the model) is there already. Memory is refused, so that features are stored in a file.
NURSERY = """
import json, os, sys
import torch
torch.set_num_threads(1)
import rich.console, torch.distributed.tensor
from rlsearch.cli import main, train_folder, train_spec, train_words
from rlsearch.learn_drop import feature_store
from rlsearch.model_graph import fake_copy
from rlsearch.results import dropping
from rlsearch.training.data import DataSpec, load_data
load_data(DataSpec("digits"))
fake_copy(torch.nn.Linear(1, 1))
feature_store.available_bytes = lambda device: 0
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["rlsearch", "train", *json.loads(line)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Starts `rlsearch train` processes."""

    def __init__(self) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", NURSERY]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def start(self, *arguments: object) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self.process.stdin.flush()
        return self._number()

    def ended(self) -> int:
        """The exit code of what was started, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(self._number())

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    running = Nursery()
    yield running
    running.process.kill()
    running.process.communicate()


def wait_for(folder: Path, pattern: str, known: set[Path]) -> None:
    """Waits for a file that was not there before."""
    deadline = time.monotonic() + 60
    while not set(folder.glob(pattern)) - known:
        assert time.monotonic() < deadline, f"no {pattern} was written"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path, nursery: Nursery) -> None:
    drop = "score=schedule,features=stored,warmup=0,max_fraction=1"
    settings = ("data.limit=200", "data.flip=true", "data.crop=1", "training.batch_size=32")
    given = ["tiny_net:make", "--learn-drop", drop, "--data", "digits", "--epochs", 14, "--device", "cpu"]
    given += [part for setting in settings for part in ("--set", setting)]
    straight, out = tmp_path / "straight", tmp_path / "killed"
    nursery.start(*given, "--out", straight)
    assert nursery.ended() == 0
    expected = json.loads((straight / "metrics.json").read_text())
    source = random.Random(0)
    # While features are built (first of all: behind the last cut they are built no more), while a checkpoint is
    # written, and at any moment of the epoch and a half after one, so that epochs are left for all kills. The first
    # epoch's time would not do for that: it is several times the others'.
    writing, epoch = "*.partial.bin", expected[-1]["train_seconds"] / len(expected)
    moments = [(writing, 0.0), (writing, 0.0), (".checkpoint.pt.*", 0.0)]
    moments += [(".checkpoint.pt.*", source.uniform(0, 1.5 * epoch)) for _ in range(3)]
    for pattern, delay in moments:
        known = set(out.glob(pattern))
        child = nursery.start(*given, "--out", out)
        wait_for(out, pattern, known)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert nursery.ended() == -signal.SIGKILL
    nursery.start(*given, "--out", out)
    assert nursery.ended() == 0
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    rows = json.loads((out / "metrics.json").read_text())
    assert [without_times(row) for row in rows] == [without_times(row) for row in expected]
    assert moves(rows) >= 3
    assert not list(out.glob("*.bin")), "the features of those that were killed are gone"


@pytest.mark.parametrize(
    ("score", "features", "replaced"),
    [("grad_change", "stored", REPLACED), ("param_change_per_lr", "recompute", ()), ("schedule", "stored", ())],
)
def test_interrupted_at_any_step_it_ends_the_same(
    digits: ImageData, tmp_path: Path, score: str, features: str, replaced: tuple[Replacement, ...]
) -> None:
    what = spec(score, features, replaced)
    trial = trial_of(digits, what, tmp_path)
    saved: list[tuple[int, Path]] = []

    def save() -> None:
        saved.append((trial.epochs_done, tmp_path / f"{len(saved)}.pt"))
        save_checkpoint(saved[-1][1], trial.state_dict())

    rows = []
    while not trial.done:
        rows.append(without_times(trial.run_epoch(save)))
    assert moves(rows) > 0
    assert len(saved) == EPOCHS * trial._inputs.num_steps
    for epoch, path in saved[1::5]:
        again = trial_of(digits, what, tmp_path, path)
        steps: list[int] = []
        assert [without_times(again.run_epoch(lambda steps=steps: steps.append(1)))] == rows[epoch : epoch + 1]
        assert len(steps) == (epoch + 1) * trial._inputs.num_steps - 1 - saved.index((epoch, path))
        while not again.done:
            assert without_times(again.run_epoch()) == rows[again.epochs_done - 1]
        ours, theirs = again.state_dict(), trial.state_dict()
        del ours["sums"]["train_seconds"], theirs["sums"]["train_seconds"]
        assert same(ours, theirs)


def test_the_time_before_an_interruption_within_an_epoch_counts_once(digits: ImageData, tmp_path: Path) -> None:
    trial = trial_of(digits, spec(), tmp_path)
    states: list[State] = []

    def wait() -> None:
        time.sleep(0.1)
        states.append(trial.state_dict())
        states.append(trial.state_dict())  # asking twice counts nothing twice

    straight = trial.run_epoch(wait).train_seconds
    steps = trial._inputs.num_steps
    assert [state["progress"]["steps"] for state in states[::2]] == list(range(1, steps + 1))
    assert 0.1 * steps <= straight < 0.1 * steps + 3
    again = trial_of(digits, spec(), tmp_path)
    again.load_state_dict(states[-1])
    assert again.run_epoch().train_seconds >= 0.1 * steps
