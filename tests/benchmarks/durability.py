"""What it costs that nothing is ever lost: a search of five-second trials with all its writes, and without them.

    python tests/benchmarks/durability.py                 about four minutes
    python tests/benchmarks/durability.py --quick         a quarter of a minute; its figures say only that it works

Both searches are real, two trials at once on one Ray that runs already; the training alone is replaced by a sleep
beside a real ResNet-20. One writes as every search does: the study by flushed transactions, the tables and TensorBoard
anew at the end of every trial, checkpoints, the weights. The other has SQLite's flushes, `fsync`, the tables,
TensorBoard, checkpoints and weights taken away by this benchmark. They take turns, and which is first changes. The wall
clock runs from the end of the first two trials to that of the last two, their means: how long Ray takes to start its
workers differs by more than what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import torch
from main_job import IdleTrial
from rich.console import Console
from sqlalchemy import Engine, event

import rlsearch
from rlsearch.search.cluster import ray_cluster
from rlsearch.search.run import start_search
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.trainable import TrialTrainable
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.trial_spec import TrialSpec

CONCURRENT = 2
TRIAL_SECONDS, QUICK_SECONDS = 5.0, 0.5


class SleepingTrial(IdleTrial):
    """A training of one epoch that takes as long as it is told, and has weights to be kept."""

    def __init__(self, spec: TrialSpec) -> None:
        super().__init__(spec)
        self.model = rlsearch.build_model(spec.model.name)
        self._seconds = spec.training.lr  # the only number that reaches a worker and is not used here

    def run_epoch(self, after_step: Any) -> EpochMetrics:
        """Sleeps."""
        time.sleep(self._seconds)
        return super().run_epoch(after_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return self.model.state_dict()


class DurableTrainable(TrialTrainable):
    """The real Trainable around trainings that sleep."""

    def make_trial(self, spec: TrialSpec) -> Any:
        """No training."""
        return SleepingTrial(spec)


class CarelessTrainable(DurableTrainable):
    """It keeps no checkpoint and no weights."""

    def save_result(self, folder: Path) -> None:
        """Nothing is kept."""

    def _save_state(self) -> None:
        """Nothing is kept."""


@contextlib.contextmanager
def careless() -> Iterator[None]:
    """No flush, no tables, no TensorBoard, for as long as the block runs."""

    def set_up(connection: Any, record: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    def nothing(*arguments: object) -> None:
        """Takes the place of what writes."""

    event.listen(Engine, "connect", set_up)
    try:
        with (
            patch.object(os, "fsync", nothing),
            patch.object(RunFolder, "write_trial", nothing),
            patch.object(RunFolder, "write_trials", nothing),
        ):
            yield
    finally:
        event.remove(Engine, "connect", set_up)


def space_of(trials: int, seconds: float) -> SearchSpace:
    """A search whose trials take so long."""
    return parse_space(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits", "limit": 60},
            "training": {"epochs": 1, "batch_size": 32, "lr": seconds},
            "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.5}},
            "search": {"trials": trials, "startup_trials": 4, "max_concurrent": CONCURRENT},
            "resources": {"cpu": 1, "gpu": 0},
        }
    )


def search_seconds(space: SearchSpace, durable: bool) -> float:
    """Seconds from the end of the first two trials to the end of the last two."""
    trainable, writes = (DurableTrainable, contextlib.nullcontext()) if durable else (CarelessTrainable, careless())
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, writes:
        result = start_search(space, Path(folder) / "run", console=Console(file=nowhere), trainable=trainable)
        tables = (Path(folder) / "run" / "trials.parquet").exists()
    assert tables == durable
    assert [record.state for record in result.records] == ["COMPLETE"] * space.search.trials
    ends = sorted(record.ended.timestamp() for record in result.records if record.ended is not None)
    return statistics.mean(ends[-CONCURRENT:]) - statistics.mean(ends[:CONCURRENT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few short trials, one pair")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; the digits need no folder")
    options = parser.parse_args()
    # Ray's workers cannot import a script that was run by its path: its Trainables travel as code.
    for module in ("__main__", "main_job"):
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    pairs, trials = (1, 4) if options.quick else (4, 8)
    space = space_of(trials, QUICK_SECONDS if options.quick else TRIAL_SECONDS)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with ray_cluster():
        for pair in range(pairs):
            for durable in (True, False) if pair % 2 else (False, True):
                seconds[durable].append(search_seconds(space, durable))
            print(f"pair {pair}: {seconds[True][-1]:.2f} s with, {seconds[False][-1]:.2f} s without", flush=True)
    ratios = [durable / other for durable, other in zip(seconds[True], seconds[False], strict=True)]
    for name, values in (("with all writes, s", seconds[True]), ("without, s", seconds[False]), ("ratio", ratios)):
        told = f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, n = {len(values)})"
        print(f"{name:<28} {told}")
    figures = {
        "overhead_ratio": statistics.median(ratios) - 1,
        "wall_clock_ratio": statistics.median(ratios),
        "wall_clock_ratio_range": [min(ratios), max(ratios)],
        "seconds_with": statistics.median(seconds[True]),
        "seconds_without": statistics.median(seconds[False]),
        "trials": trials,
        "trial_seconds": space.training.lr,
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps({"name": "durability", "figures": figures, "n": len(ratios), "machine": machine}))


if __name__ == "__main__":
    main()
