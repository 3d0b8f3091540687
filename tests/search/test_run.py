"""Whole searches with a real Ray cluster of this machine: two trials at once, a few epochs, on the digits images."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
import ray
import torch
import yaml
from rich.console import Console

from rlsearch.errors import ConfigError, DataError, RunFolderError, SearchError, UserError
from rlsearch.results import front
from rlsearch.results.tables import read_epochs, read_run
from rlsearch.search.cluster import Slots, plan_slots, ray_cluster
from rlsearch.search.run import resume_search, start_search
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.search.study import RunStudy
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.worker import WorkerSettings
from rlsearch.training.data import ImageData
from rlsearch.training.trial import Trial
from rlsearch.training.trial_spec import TrialSpec

# Ray leaves its own sockets and log files to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


# Workers cannot import a test module: its Trainables travel as code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def space(**changes: Any) -> SearchSpace:
    content = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "limit": 120},
        "training": {"epochs": 2, "batch_size": 32},
        "space": {
            "replacement": {"units": "layer*", "blocks": ["skip", "scalar"], "max_fraction": 0.5},
            "learn_drop": {},
        },
        "search": {"trials": 5, "seed": 3, "max_concurrent": 2},
        "resources": {"cpu": 1, "gpu": 0},
    }
    return parse_space(content | changes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all searches of this module; each would start its own otherwise."""
    usual = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an earlier test's Ray may have left another
    with ray_cluster():
        yield
    signal.signal(signal.SIGTERM, usual)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


class Clumsy(TrialTrainable):
    """Loses its process by a real SIGKILL, after an epoch: once in trial 1, always in trial 2, and once in trial 4,
    whose checkpoint is damaged by then; hangs in trial 3."""

    def setup(self, config: dict[str, Any], settings: WorkerSettings, data: ImageData) -> None:
        super().setup(config, dataclasses.replace(settings, checkpoint_seconds=0.0), data)

    def make_trial(self, spec: TrialSpec) -> Trial:
        if self._job.number == 3:
            time.sleep(600)
        return super().make_trial(spec)

    def step(self) -> dict[str, Any]:
        number, checkpoint = self._job.number, Path(self._job.checkpoints) / "last.pt"
        mark = Path(self._settings.folder) / f"killed in trial {number}"
        if checkpoint.exists() and (number == 2 or (number in (1, 4) and not mark.exists())):
            mark.touch()
            if number == 4:
                checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().step()
        with (Path(self._settings.folder) / "epochs trained").open("a") as file:
            file.write(f"{number}.{result['epoch']}\n")
        return result


class Odd(TrialTrainable):
    """Measures what is no result, in every way."""

    VALUES: ClassVar[dict[int, Any]] = {4: math.nan, 5: math.inf, 6: "0.9", 7: True, 8: None}

    def step(self) -> dict[str, Any]:
        number, result = self._job.number, super().step()
        if number == 3:
            return {"done": True}
        if number in self.VALUES:
            name = "params" if number == 5 else "accuracy"
            for row in self._epochs:
                row[name] = self.VALUES[number]
                if number == 8:
                    del row[name]
            outcome = dataclasses.replace(result["outcome"], epochs=tuple(self._epochs))
            result = {**result, name: self.VALUES[number], "outcome": outcome}
        return result


class OneProcess(TrialTrainable):
    """Notes which process trained which trial."""

    def step(self) -> dict[str, Any]:
        with (Path(self._settings.folder) / "processes").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().step()


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_search_and_more_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    console = quiet()
    result = start_search(space(), folder, console=console, trainable=OneProcess)
    assert (len(result.records), result.signal_exit_code, result.why_ended) == (5, None, None)
    run = read_run(folder)
    assert run.records == result.records
    assert [record.origin for record in run.records][:3] == ["baseline", "skip control", "freeze control"]
    assert {record.state for record in run.records} == {"COMPLETE"}
    assert len(set((folder / "processes").read_text().split())) == 2  # two at once, and both reused
    for record in run.records:
        rows = read_epochs(folder / "epochs" / f"trial-{record.trial:05d}.parquet")
        assert [row["epoch"] for row in rows] == [1, 2]
        assert rows[-1]["accuracy"] == record.accuracy
        assert (folder / "checkpoints" / f"trial-{record.trial:05d}" / "model.safetensors").is_file()
    assert {path.name for path in folder.iterdir()} == {
        *("space.yaml", "study.db", "trials.parquet", "versions.json", "run.lock"),
        *("epochs", "tensorboard", "checkpoints", "processes"),
    }
    assert parse_space(yaml.safe_load((folder / "space.yaml").read_text())).search.seed == 3
    assert json.loads((folder / "versions.json").read_text())["history"][0]["ray"] == ray.__version__
    shown = console.file.getvalue()
    assert "5 of 5 trials done" in shown
    assert "best accuracy" in shown
    assert "hypervolume" in shown

    more = resume_search(folder, trials="+2", console=quiet())
    assert [record.trial for record in more.records] == list(range(7))
    assert more.records[:5] == result.records
    study = optuna.load_study(study_name=_study_name(folder), storage=f"sqlite:///{folder}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 7
    assert resume_search(folder, console=quiet()).records == more.records  # nothing is left: nothing is done
    with pytest.raises(UserError, match="--trials: must be at least 7, as many as the run has already, got 6"):
        resume_search(folder, trials="6", console=quiet())
    with pytest.raises(RunFolderError, match="holds a search already; go on with it by `rlsearch resume"):
        start_search(space(), folder)

    told, warm = quiet(), tmp_path / "warm"
    start_search(space(search={"trials": 4, "max_concurrent": 1}), warm, warm_start=folder, console=told)
    assert f"warm start: 7 trials of {folder}" in told.file.getvalue()
    assert len(resume_search(warm, trials="+1", console=quiet()).records) == 5
    assert len(RunStudy.open(warm / "study.db").warm_start) == 7


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_search_that_has_settled_goes_on_where_a_resume_asks_for_more(tmp_path: Path) -> None:
    settled = {"trials": 12, "max_concurrent": 1, "startup_trials": 1, "min_gain": 0.999, "gain_window": 2}
    folder = tmp_path / "run"
    brief = space(search=settled, training={"epochs": 1, "batch_size": 32})
    result = start_search(brief, folder, console=quiet())
    assert len(result.records) == 3
    assert result.why_ended is not None
    assert "the last 2 trials added less than 99.9 % to the front's hypervolume" in result.why_ended
    again = resume_search(folder, console=quiet())  # one that asks for nothing finds it as it was
    assert (again.records, again.why_ended) == (result.records, result.why_ended)
    more = resume_search(folder, trials="+50", console=quiet())
    assert (len(more.records), more.why_ended, more.resume_with) == (5, result.why_ended, "--trials +50")
    by_time = resume_search(folder, time_budget=3600.0, console=quiet())
    assert len(by_time.records) == 7
    with pytest.raises(ConfigError, match=r"search\.gpu_hours: limits GPU time, but trials take no GPU here"):
        resume_search(folder, gpu_hours="+1", console=quiet())
    assert resume_search(folder, console=quiet()).records == by_time.records  # the refused limit is forgotten


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_parts_of_units_with_searched_options_are_trained_and_resumed(tmp_path: Path) -> None:
    replacement = {
        "units": "layer*",
        "roles": ["conv1", "conv2"],
        "blocks": ["scalar"],
        "options": {"operator": ["same"], "init": ["half", "previous"], "sources": "nearest"},
    }
    searched = space(
        space={"replacement": replacement},
        training={"epochs": 1, "batch_size": 32},
        search={"trials": 3, "max_concurrent": 1, "seed": 2, "baseline_seeds": 1},
    )
    folder = tmp_path / "run"
    start_search(searched, folder, console=quiet())
    records = resume_search(folder, trials="+1", console=quiet()).records
    assert [(record.state, record.origin) for record in records] == [
        ("COMPLETE", "baseline"),
        ("COMPLETE", "skip control"),
        ("COMPLETE", "sampler"),
        ("COMPLETE", "sampler"),
    ]
    replaced = [json.loads(record.policy)["replacements"] for record in records]
    assert replaced[2] != replaced[3]
    for item in (item for items in replaced[2:] for item in items):
        assert item["unit"].rpartition(".")[2] in ("conv1", "conv2")
        assert item["block"] == "scalar"
        assert item["options"] in [{"operator": "same", "init": i, "sources": "nearest"} for i in ("half", "previous")]
    assert [record.params < records[0].params for record in records[2:]] == [bool(items) for items in replaced[2:]]
    assert any(replaced[2:])


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_lost_worker_is_replaced_and_a_users_model_comes_from_where_the_driver_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "from rlsearch import build_model\n\n\ndef small(num_classes):\n"
        "    return build_model('resnet20', num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the command line does that
    console = quiet()
    settings = {"trials": 5, "max_concurrent": 2, "epoch_timeout": 15}
    searched = space(model={"name": "my_models:small"}, search=settings)
    result = start_search(searched, tmp_path / "run", console=console, trainable=Clumsy)
    assert [record.state for record in result.records] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert result.records[1].fidelity == 2
    # The second time it went on from its checkpoint; the fourth one could not, and says so.
    trained = (tmp_path / "run" / "epochs trained").read_text().split()
    assert [line for line in trained if line.startswith("1.")] == ["1.1", "1.2"]
    assert [line for line in trained if line.startswith("4.")] == ["4.1", "4.1", "4.2"]
    assert result.records[1].reason is None
    # On a slow machine a checkpoint within the epoch was written too.
    before = r"(started again, its checkpoint|went on from the checkpoint before the last, which) could not be used"
    assert re.match(before + ": UserError: ", result.records[4].reason or "")
    assert result.records[2].reason is not None
    assert result.records[2].reason.startswith("worker_lost: ")
    assert "trial 1: its process was lost; it starts once more" in console.file.getvalue()
    assert result.records[3].reason == "timeout: an epoch took longer than 15 s (search.epoch_timeout)"
    outcome = RunStudy.open(tmp_path / "run" / "study.db").study.trials[3].user_attrs["outcome"]
    assert "in make_trial" in outcome["detail"]


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_sigterm_means_what_it_did_before_ray_was_started() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_trials_without_a_result_fail_and_the_search_goes_on(tmp_path: Path) -> None:
    racing = {"trials": 10, "max_concurrent": 2, "baseline_seeds": 1, "min_epochs": 1, "eta": 2}
    result = start_search(space(search=racing), tmp_path / "run", console=quiet(), trainable=Odd)
    run = read_run(tmp_path / "run")
    assert run.records == result.records
    assert [record.state for record in run.records] == ["COMPLETE"] * 3 + ["FAIL"] * 6 + ["COMPLETE"]
    no_number = "no_result: every objective must be a finite number, but "
    assert [record.reason for record in run.records[3:9]] == [
        "no_result: it reported nothing",
        *(f"{no_number}{name} is {value}" for name, value in [("accuracy", "nan"), ("params", "inf")]),
        *(f"{no_number}accuracy is {value}" for value in ("0.9", "True", "None")),
    ]
    assert {item.trial for item in front(run)} <= {0, 1, 2, 9}
    study = RunStudy.open(tmp_path / "run" / "study.db")
    assert study.records() == list(run.records)
    assert {trial.state.name for trial in study.study.trials} == {"COMPLETE", "FAIL"}


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_search_whose_trials_keep_failing_stops_and_says_why(tmp_path: Path) -> None:
    failing = space(
        training={"epochs": 1, "batch_size": 32, "lr": 1e30},
        search={"trials": 9, "max_concurrent": 1, "max_failures": 1},
    )
    told = r"more than 1 trials have failed \(search\.max_failures\); the last one: diverged: "
    with pytest.raises(SearchError, match=told):
        start_search(failing, tmp_path / "run", console=quiet())
    assert [record.state for record in read_run(tmp_path / "run").records] == ["FAIL"] * 2
    states = [trial.state.name for trial in RunStudy.open(tmp_path / "run" / "study.db").study.trials]
    assert states[:2] == ["FAIL"] * 2
    assert set(states[2:]) <= {"WAITING"}


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_when_all_trials_fail_the_search_says_so(tmp_path: Path) -> None:
    diverging = space(training={"epochs": 2, "batch_size": 32, "lr": 1e30}, search={"trials": 4, "max_concurrent": 1})
    with pytest.raises(SearchError, match=r"all 4 trials failed; the reason of [1-4] of them: diverged: "):
        start_search(diverging, tmp_path / "run", console=quiet())
    assert [record.state for record in read_run(tmp_path / "run").records] == ["FAIL"] * 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": {"name": "digits", "root": "nowhere", "image_size": -1}}, UserError),
        ({"data": {"name": "imagefolder:nowhere"}}, DataError),
        ({"model": {"name": "resnet21"}}, ConfigError),
        ({"model": {"name": "resnet20", "num_classes": 3}}, ConfigError),
        ({"constraints": {"params": "<= 0.01x"}}, ConfigError),
    ],
)
def test_bad_input_leaves_no_folder_behind(tmp_path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        start_search(space(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_trial_that_asks_for_more_than_there_is_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resources\.cpu: must be at most the \d+ cores there are, got 4096"):
        start_search(space(resources={"cpu": 4096}), tmp_path / "run")
    if not torch.cuda.is_available():
        limited = space(search={"trials": 4, "gpu_hours": 3}, resources={"gpu": "auto"})
        with pytest.raises(ConfigError, match=r"search\.gpu_hours: limits GPU time, but trials take no GPU here"):
            start_search(limited, tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"is not empty \(thesis\.tex\) and holds no run; give another --run-dir"):
        start_search(space(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="so there is no run to resume"):
        resume_search(tmp_path)
    with pytest.raises(RunFolderError, match="there is no such folder"):
        resume_search(tmp_path / "nowhere")


def test_a_changed_search_space_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    content = space().to_dict()
    folder.write_space(content)
    folder.check_space(content)
    file = tmp_path / "space.yaml"
    file.write_text(file.read_text().replace("batch_size: 32", "batch_size: 64"))
    with pytest.raises(RunFolderError, match=r"(?s)no longer what .*-  batch_size: 32\n\+  batch_size: 64"):
        folder.check_space(content)
    file.unlink()
    folder.check_space(content)
    assert yaml.safe_load(file.read_text()) == content


def test_a_lock_names_its_holder_and_is_free_when_that_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom rlsearch.search.run_folder import RunFolder\n"
            "with RunFolder(sys.argv[1]).locked():\n    print('held', flush=True)\n    time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = RunFolder(tmp_path).locked()
        with pytest.raises(RunFolderError, match=rf"is in use by process {holder.pid} of .+ on .+, since 20"):
            refused.__enter__()
        holder.kill()
    with RunFolder(tmp_path).locked():
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("auto", "must be local or a cluster's HOST:PORT"),
        ("", "must be local or a cluster's HOST:PORT"),
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1 (.*); start the cluster's head first"),
    ],
)
def test_an_address_names_one_cluster_that_answers(tmp_path: Path, address: str, told: str) -> None:
    with pytest.raises(UserError, match=f"--address: {told}"):
        start_search(space(), tmp_path / "run", address=address)
    assert not (tmp_path / "run").exists()


GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "machine", "expected"),
    [
        ({"cpu": 1, "gpu": None}, {"CPU": 2}, Slots(2, 1, 0.0)),
        ({"cpu": 0.5, "gpu": None}, {"CPU": 2}, Slots(4, 0.5, 0.0)),
        ({"cpu": 2, "gpu": None}, {"CPU": 3}, Slots(1, 2, 0.0)),
        ({"cpu": 1, "gpu": None}, {"CPU": 16, "GPU": 1}, Slots(8, 1, 1 / 8)),  # plenty of memory: eight at most
        ({"cpu": 4, "gpu": None}, {"CPU": 16, "GPU": 1}, Slots(4, 4, 1 / 4)),  # as many as the cores feed
        ({"cpu": 1, "gpu": None, "predicted_bytes": 4 * GIB}, {"CPU": 16, "GPU": 1}, Slots(3, 1, 1 / 3)),
        ({"cpu": 1, "gpu": None, "predicted_bytes": 90 * GIB}, {"CPU": 16, "GPU": 1}, Slots(1, 1, 1.0)),
        ({"cpu": 1, "gpu": None}, {"CPU": 16, "GPU": 4}, Slots(16, 1, 1 / 4)),
        ({"cpu": 1, "gpu": 0.5}, {"CPU": 16, "GPU": 2}, Slots(4, 1, 0.5)),
        ({"cpu": 1, "gpu": 2}, {"CPU": 16, "GPU": 5}, Slots(2, 1, 2)),
        ({"cpu": 1, "gpu": 0}, {"CPU": 3, "GPU": 1}, Slots(3, 1, 0)),
        ({"cpu": 1, "gpu": None, "most": 2}, {"CPU": 16}, Slots(2, 1, 0.0)),
    ],
)
def test_how_many_trials_run_at_once(asked: dict[str, Any], machine: dict[str, float], expected: Slots) -> None:
    gpu_bytes = 24 * GIB if "GPU" in machine else None
    found = plan_slots(**{"predicted_bytes": GIB // 4} | asked, resources=machine, gpu_bytes=gpu_bytes)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))


def test_more_gpus_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"resources\.gpu: must be at most the 0 GPUs there are, got 0\.5; auto"):
        plan_slots(1, 0.5, GIB, {"CPU": 2})


def _study_name(folder: Path) -> str:
    (name,) = optuna.get_all_study_names(f"sqlite:///{folder}/study.db")
    return name
