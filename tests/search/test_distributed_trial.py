"""Searches whose trials are trained by two processes each: a real Ray cluster of this machine, gloo between them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from rich.console import Console

from rlsearch import Policy, TrainingSpec
from rlsearch.errors import ConfigError
from rlsearch.results.tables import read_epochs
from rlsearch.search.cluster import Slots, plan_slots, ray_cluster
from rlsearch.search.costs import ExactCosts
from rlsearch.search.distributed_trial import DistributedTrainable, Rank
from rlsearch.search.run import start_search
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.worker import WorkerSettings
from rlsearch.training.data import ImageData
from rlsearch.training.models import build_model
from rlsearch.training.trial import Trial
from rlsearch.training.trial_spec import TrialSpec

# Ray leaves its own sockets and log files to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

# Workers cannot import a test module: its classes travel as code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

GIB = 2**30
# So small that what a search takes is the start of its processes.
SMALL = """
from torch import nn


class Unit(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())


def make(num_classes):
    units = nn.Sequential(*(Unit() for _ in range(4)))
    parts = {"stem": nn.Conv2d(3, 16, 3, 1, 1), "units": units, "pool": nn.AdaptiveAvgPool2d(2), "flat": nn.Flatten()}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    model.add_module("head", nn.Linear(64, num_classes))
    return model
"""


def space(**changes: Any) -> SearchSpace:
    content = {
        "model": {"name": "small_net:make"},
        "data": {"name": "digits", "limit": 200},
        "training": {"epochs": 3, "batch_size": 32, "lr": 0.05},
        "space": {
            "replacement": {"units": "units*", "blocks": ["skip", "scalar"], "max_fraction": 0.5},
            "learn_drop": {},
        },
        "search": {"trials": 4, "seed": 3},
        "resources": {"cpu": 1, "gpu": 0, "workers": 2},
    }
    return parse_space(content | changes)


class ClumsyRank(Rank):
    """The second one is lost once in trial 1, by a real SIGKILL after an epoch, has read another checkpoint than the
    first one in trial 2, and runs out of memory in trial 3."""

    def __init__(self, settings: WorkerSettings, data: ImageData, rank: int) -> None:
        super().__init__(dataclasses.replace(settings, checkpoint_seconds=0.0), data, rank)
        self._tell("processes", str(os.getpid()))

    def step(self) -> dict[str, Any]:
        number, epochs = self._job.number, len(self._epochs)
        mark = Path(self._settings.folder) / "killed"
        if self._rank == 1 and number == 1 and epochs == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().step()
        self._tell("steps", f"{number}.{self._rank}.{result.get('epoch')}")
        return result

    def make_trial(self, spec: TrialSpec) -> Trial:
        trial = super().make_trial(spec)
        if self._rank == 1 and self._job.number == 2:
            trial.epochs_done = 1
        if self._rank == 1 and self._job.number == 3:
            trial.model.register_forward_pre_hook(lambda module, args: args[0].new_empty(2**50))
        return trial

    def _tell(self, file: str, line: str) -> None:
        with (Path(self._settings.folder) / file).open("a") as told:
            told.write(f"{line}\n")


class Clumsy(DistributedTrainable):
    rank_class: ClassVar[type[Rank]] = ClumsyRank


@pytest.mark.cluster
def test_a_search_of_trials_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_net.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder, console = tmp_path / "run", Console(file=io.StringIO(), width=300)
    searched = space()
    with ray_cluster():
        records = start_search(searched, folder, console=console, trainable=Clumsy).records
        assert_all_gone(folder)
    assert [record.state for record in records] == ["COMPLETE", "COMPLETE", "FAIL", "INFEASIBLE"]
    assert "not all of the trial's processes could read its checkpoint" in (records[2].reason or "")
    assert (records[3].reason or "").startswith("out_of_memory: ")

    # The lost process's trial went on from its checkpoint, in both processes.
    assert "trial 1: its process was lost; it starts once more" in console.file.getvalue()
    told = (folder / "steps").read_text().split()
    assert [line for line in told if line.startswith("1.0")] == ["1.0.1", "1.0.2", "1.0.3"]
    assert [line for line in told if line.startswith("1.1")] == ["1.1.1", "1.1.2", "1.1.3"]

    # Two processes serve trial after trial, one that both fail too, until one of them is lost.
    assert len((folder / "processes").read_text().split()) == 4
    for record in records[:2]:
        rows = read_epochs(folder / "epochs" / f"trial-{record.trial:05d}.parquet")
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        assert (folder / "checkpoints" / f"trial-{record.trial:05d}" / "model.safetensors").is_file()

    policy = Policy.from_dict(json.loads(records[0].policy))
    alone = Trial(TrialSpec(policy.model, searched.data, searched.training, policy, records[0].seed), device="cpu")
    while not alone.done:
        expected = alone.run_epoch()
    for name in ("params", "params_total", "train_flops", "forward_flops"):
        assert records[0].metric(name) == pytest.approx(getattr(expected, name)), name
    assert records[0].accuracy == pytest.approx(expected.accuracy, abs=0.2)
    assert records[0].memory is not None
    assert 0.4 * expected.memory < records[0].memory < 0.8 * expected.memory  # a device has half of a batch


def assert_all_gone(folder: Path) -> None:
    """No process of a trial outlives its search, though the cluster does."""
    processes = [int(line) for line in (folder / "processes").read_text().split()]
    assert processes
    deadline = time.monotonic() + 10
    while (left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.mark.parametrize(
    ("asked", "machine", "expected"),
    [
        ({"cpu": 1, "gpu": None}, {"CPU": 2}, Slots(1, 1, 0.0, 2)),
        ({"cpu": 1, "gpu": None}, {"CPU": 5}, Slots(2, 1, 0.0, 2)),
        ({"cpu": 0.5, "gpu": 0}, {"CPU": 2, "GPU": 8}, Slots(2, 0.5, 0, 2)),
        ({"cpu": 2, "gpu": None}, {"CPU": 64, "GPU": 8}, Slots(4, 2, 1.0, 2)),  # one whole GPU each
        ({"cpu": 2, "gpu": None, "workers": 8}, {"CPU": 64, "GPU": 8}, Slots(1, 2, 1.0, 8)),
        ({"cpu": 2, "gpu": 1, "workers": 3}, {"CPU": 64, "GPU": 8}, Slots(2, 2, 1, 3)),
        ({"cpu": 8, "gpu": 1, "workers": 2}, {"CPU": 20, "GPU": 8}, Slots(1, 8, 1, 2)),  # as many as the cores feed
        ({"cpu": 1, "gpu": None, "most": 1}, {"CPU": 16}, Slots(1, 1, 0.0, 2)),
    ],
)
def test_how_many_trials_run_at_once(asked: dict[str, Any], machine: dict[str, float], expected: Slots) -> None:
    usual = {"predicted_bytes": GIB // 4, "workers": 2, "gpu_bytes": 24 * GIB if "GPU" in machine else None}
    assert plan_slots(**usual | asked, resources=machine) == expected


@pytest.mark.parametrize(
    ("asked", "machine", "told"),
    [
        (
            {"cpu": 1, "gpu": None},
            {"CPU": 2},
            "3 of them with 1 cores each need 3, and there are 2; ask for fewer workers, or set a lower resources.cpu",
        ),
        (
            {"cpu": 1, "gpu": None},
            {"CPU": 16, "GPU": 2},
            "3 of them with 1 GPUs each need 3, and there are 2; ask for fewer workers, or set resources.gpu to 0",
        ),
    ],
)
def test_workers_without_the_resources(asked: dict[str, Any], machine: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=f"resources.workers: {told}"):
        plan_slots(**asked, predicted_bytes=GIB, resources=machine, workers=3)


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({"workers": 0}, "resources.workers: must be at least 1, got 0"),
        ({"workers": 2, "gpu": 0.5}, "resources.gpu: with 2 workers each trains on a GPU of its own: .* got 0.5"),
        ({"workers": 2, "gpu": 2}, "resources.gpu: with 2 workers each trains on a GPU of its own: .* got 2"),
    ],
)
def test_what_workers_may_be(resources: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        space(resources=resources)
    assert space().to_dict()["resources"] == {"cpu": 1.0, "gpu": 0.0, "workers": 2}
    assert space(resources={}).resources.workers == 1


def test_memory_is_predicted_for_one_process_with_its_part_of_a_batch() -> None:
    model, training = build_model("resnet20"), TrainingSpec(batch_size=64)
    two = ExactCosts(model, (3, 8, 8), workers=2).cost(Policy(), training)
    assert two == ExactCosts(model, (3, 8, 8)).cost(Policy(), dataclasses.replace(training, batch_size=32))
