"""A process that trains many trials, as Tune's actors do, takes no more memory than after the first ones."""

from __future__ import annotations

import gc
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsearch.policy import LearnDrop, ModelSpec, Policy, Replacement
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.worker import Job, WorkerSettings
from rlsearch.training.data import DataSpec, load_data
from rlsearch.training.loop import TrainingSpec
from rlsearch.training.trial_spec import TrialSpec

MODEL = ModelSpec("tiny_net:make")
DATA = DataSpec("digits", limit=40)
TRIALS = 200
# By then every kind of trial was there, of which one small description each is kept.
SETTLED = 20
MEGABYTE = 2**20


def job(number: int, folder: Path) -> Job:
    """Every kind of trial by turns: replaced units, stored features, another batch size, one that diverges."""
    source = random.Random(number)
    blocks = ["scalar", "skip", "channel", "lowrank"]
    replaced = (Replacement(f"units.{source.choice([1, 2])}", source.choice(blocks)),) if number % 3 else ()
    drop = LearnDrop("schedule", warmup=0.3, features="stored") if number % 2 else None
    training = TrainingSpec(epochs=2, batch_size=16 if number % 5 else 8, lr=1e30 if number % 10 == 4 else 0.05)
    spec = TrialSpec(MODEL, DATA, training, Policy(MODEL, replaced, drop), seed=number)
    return Job(number, spec, str(folder / f"trial-{number:05d}"))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def train_many(folder: Path) -> tuple[dict[int, int], dict[int, int], set[str]]:
    """Trains all trials in this process: resident bytes and live tensors after so many, and how they ended."""
    settings, images = WorkerSettings(str(folder)), load_data(DATA)

    class Here(TrialTrainable):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config, settings, images)

    process = Here({"job": job(0, folder)})
    sizes, tensors, states = {}, {}, set()
    for number in range(TRIALS):
        process.reset_config({"job": job(number, folder)})
        result = process.train()
        while not result["done"]:
            result = process.train()
        states.add(result["outcome"].state)
        if number + 1 in (5, SETTLED, TRIALS):
            sizes[number + 1], tensors[number + 1] = resident_bytes(), live_tensors()
    return sizes, tensors, states


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_after_200_trials_a_process_is_as_large_as_after_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In a fresh process: one that other tests have run in has holes of theirs to fill, and grows by their sizes."""
    monkeypatch.syspath_prepend(request.path.parent.parent / "training")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sizes, tensors, states = pool.apply(train_many, (tmp_path,))
    assert states == {"COMPLETE", "FAIL"}
    assert sizes[TRIALS] - sizes[5] < 10 * MEGABYTE
    assert tensors[TRIALS] - tensors[SETTLED] < 20
