"""Searches on a cluster of several nodes (all on this machine): one is lost; and the same seed gives the same trials,
whether the search is interrupted or not."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from rich.console import Console

from rlsearch.results.tables import TrialRecord, read_run
from rlsearch.search.cluster import ray_cluster
from rlsearch.search.run import resume_search, start_search
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.study import RunStudy
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.worker import WorkerSettings
from rlsearch.training.data import ImageData

# Ray leaves its own sockets and log files to the collector.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::ResourceWarning")]

# Workers cannot import a test module: its Trainables travel as code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROJECT = Path(__file__).resolve().parents[2]
# A node that no longer answers is given up after a second, not after a quarter of a minute.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000}
TIMES = ("train_seconds", "samples_per_second", "started", "ended")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that trains nothing, and one node."""
    config = {**QUICK, "health_check_failure_threshold": 2}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": config})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def content(**changes: Any) -> dict[str, Any]:
    space: dict[str, Any] = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "limit": 120},
        "training": {"epochs": 2, "batch_size": 32},
        "space": {
            "replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.5},
            "learn_drop": {},
        },
        "search": {"trials": 3, "seed": 3, "baseline_seeds": 1},
        "resources": {"cpu": 1, "gpu": 0},
    }
    return space | changes


def space(**changes: Any) -> SearchSpace:
    return parse_space(content(**changes))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in RunStudy.open(folder / "study.db").study.trials]


class Traveller(TrialTrainable):
    """Notes on which node which epoch of which trial was trained; takes its time, and saves every epoch."""

    def setup(self, config: dict[str, Any], settings: WorkerSettings, data: ImageData) -> None:
        super().setup(config, dataclasses.replace(settings, checkpoint_seconds=0.0), data)

    def step(self) -> dict[str, Any]:
        result = super().step()
        with (Path(self._settings.folder) / "epochs on nodes").open("a") as file:
            file.write(f"{self._job.number} {result['epoch']} {ray.get_runtime_context().get_node_id()}\n")
        time.sleep(0.5)
        return result


def travels(folder: Path) -> list[tuple[int, int, str]]:
    """Trial, epoch and node of every epoch that was trained."""
    file = folder / "epochs on nodes"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(trial), int(epoch), node) for trial, epoch, node in map(str.split, lines)]


def test_the_trials_of_a_lost_node_move_and_finish(cluster: Cluster, tmp_path: Path) -> None:
    folder, console = tmp_path / "run", quiet()
    doomed = cluster.add_node(num_cpus=1)

    def lose_the_node() -> None:
        while not any(node == doomed.node_id and epoch == 1 for _, epoch, node in travels(folder)):
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)

    loss = threading.Thread(target=lose_the_node)
    loss.start()
    long = space(training={"epochs": 3, "batch_size": 32})
    result = start_search(long, folder, address=cluster.address, console=console, trainable=Traveller)
    loss.join()
    assert [(record.trial, record.state, record.fidelity) for record in result.records] == [
        (number, "COMPLETE", 3) for number in range(3)
    ]
    assert states(folder) == ["COMPLETE"] * 3
    found = travels(folder)
    moved = {trial for trial, _, node in found if node == doomed.node_id}
    assert len(moved) == 1
    (trial,) = moved
    assert f"trial {trial}: its process was lost; it starts once more" in console.file.getvalue()
    # It went on from its checkpoint, on the node that was left.
    assert [epoch for number, epoch, _ in found if number == trial] == [1, 2, 3]
    assert len({node for number, _, node in found if number == trial}) == 2

    assert read_run(folder).records == result.records
    assert resume_search(folder, address=cluster.address, console=quiet()).records == result.records


def told(record: TrialRecord) -> dict[str, Any]:
    """All of a trial but its times."""
    return {name: value for name, value in dataclasses.asdict(record).items() if name not in TIMES}


def killed_after(folder: Path, line: str, *arguments: str) -> int:
    """Runs the program until it prints a line, and kills it shortly after; its exit code."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "rlsearch", *arguments]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        seen = []
        for printed in process.stdout:
            seen.append(printed)
            if line in printed:
                break
        else:
            pytest.fail(f"{line!r} was never printed, but: {''.join(seen)}")
        time.sleep(0.3)
        process.kill()
    return process.returncode


class CtrlC(io.StringIO):
    """What is printed; at a line with ``text`` somebody presses Ctrl-C."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def write(self, printed: str) -> int:
        if self._text in printed:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(printed)


def test_one_seed_gives_the_same_trials_straight_or_interrupted(cluster: Cluster, tmp_path: Path) -> None:
    searched = content(search={"trials": 7, "seed": 3, "max_concurrent": 1, "baseline_seeds": 1})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(searched))
    straight = start_search(parse_space(searched), tmp_path / "straight", address=cluster.address, console=quiet())
    assert [record.origin for record in straight.records[3:]] == ["sampler"] * 4

    folder, address = tmp_path / "interrupted", cluster.address
    search = ("search", "space.yaml", "--run-dir", str(folder), "--address", address)
    assert killed_after(tmp_path, "trial 3:", *search) == -signal.SIGKILL
    stopped = resume_search(folder, address=address, console=Console(file=CtrlC("trial 5:"), width=300))
    assert stopped.signal_exit_code == 130
    assert len(stopped.records) < 7
    resumed = resume_search(folder, address=address, console=quiet())
    assert [told(record) for record in resumed.records] == [told(record) for record in straight.records]
    assert states(folder) == ["COMPLETE"] * 7


@pytest.mark.parametrize("code", [signal.SIGTERM, 1])
def test_a_sigterm_while_ray_starts_ends_with_143(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Ray puts its own handlers in place as it starts, which end the process with 15, then with 1."""

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SystemExit) as ended, ray_cluster():
        raise AssertionError
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
