"""A disk that is full, at every write: a clear error, the old file whole, nothing lost. Real disks, really full."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from child import SmallDisk, command_line, in_child
from driven_search import Search, content
from made_up_run import SPACE, made_up_records, record, write_run
from tiny_run import tiny_run
from torch import nn

from rlsearch.policy import ModelSpec, Policy, Replacement
from rlsearch.results.confirmed import ConfirmedTraining, write_confirmed
from rlsearch.results.tables import epochs_path, read_epochs, read_trials, write_epochs, write_trials
from rlsearch.results.tensorboard import write_trial
from rlsearch.search.failures import explained
from rlsearch.search.prepare import Prepared, prepare
from rlsearch.search.run import _begin
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.searcher import StopSearch
from rlsearch.search.space import parse_space
from rlsearch.search.study import RunStudy
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.worker import Job, WorkerSettings
from rlsearch.training.checkpoint import save_checkpoint, save_weights
from rlsearch.training.data import DataSpec, load_data
from rlsearch.training.loop import TrainingSpec
from rlsearch.training.trial_spec import TrialSpec

FULL = (errno.ENOSPC, errno.EFBIG)
EPOCHS = [{"epoch": epoch, "epochs": 40, "accuracy": 0.5} for epoch in range(1, 41)]


def trials(folder: Path, version: int) -> None:
    write_trials(folder / "trials.parquet", [record(0, accuracy=version / 10)], SPACE)


def epochs(folder: Path, version: int) -> None:
    write_epochs(folder / "trial-00000.parquet", [{**row, "accuracy": version / 10} for row in EPOCHS])


def curves(folder: Path, version: int) -> None:
    write_trial(folder, record(0, accuracy=version / 10), [{**row, "accuracy": version / 10} for row in EPOCHS])


def confirmed(folder: Path, version: int) -> None:
    write_confirmed(folder / "confirmed.parquet", [ConfirmedTraining(0, "hash", 1, test_accuracy=version / 10)])


def checkpoint(folder: Path, version: int) -> None:
    save_checkpoint(folder / "last.pt", {"weight": torch.full((5000,), float(version)), "epoch": version})


def weights(folder: Path, version: int) -> None:
    model = nn.Linear(100, 50, bias=False)
    nn.init.constant_(model.weight, float(version))
    save_weights(folder / "model.safetensors", model)


def policy(folder: Path, version: int) -> None:
    replaced = tuple(Replacement(f"layer1.{unit}", "skip") for unit in range(1, 80))
    Policy(ModelSpec("resnet20"), replaced[version:]).save(folder / "policy.json")


def search_space(folder: Path, version: int) -> None:
    run = RunFolder(folder)
    run.write_space({**SPACE, "search": {"trials": version}, "padding": "x" * 10_000})
    (folder / "versions.json").unlink()  # it is longer every time


@pytest.mark.parametrize("write", [trials, epochs, curves, confirmed, checkpoint, weights, policy, search_space])
def test_the_old_file_stays_whole(tmp_path: Path, write: Callable[[Path, int], None]) -> None:
    def body() -> int:
        disk = SmallDisk(tmp_path / "disk", 200)
        old, new, place = contents_of(write, tmp_path / "old", 1), contents_of(write, tmp_path / "new", 2), disk.folder
        write(place, 1)
        assert contents(place) == old != new
        count = 0
        for error in disk.failures(lambda: write(place, 2)):
            assert isinstance(error, OSError)
            assert error.errno in FULL
            assert Path(str(error.filename)).name in old
            found = contents(place)
            # Of two files the first may be the new one: each of them is whole, and nothing lies beside them.
            assert all(content in (old[name], new[name]) for name, content in found.items())
            assert found.keys() == old.keys()
            count += 1
        assert contents(place) == ({**new, "last.previous.pt": old["last.pt"]} if write is checkpoint else new)
        return count

    assert in_child(body) > 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def contents_of(write: Callable[[Path, int], None], folder: Path, version: int) -> dict[str, bytes]:
    """What a version consists of."""
    folder.mkdir()
    write(folder, version)
    return contents(folder)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(parse_space(content()))


@pytest.mark.parametrize("study", ["on the disk", "elsewhere"])
def test_a_search_stops_at_any_write_of_a_trials_end_and_loses_nothing(
    tmp_path: Path, prepared: Prepared, study: str
) -> None:
    """With the study elsewhere (as in a database) it is the tables, one by one, that find no room."""

    def body() -> list[int]:
        disk, kept = SmallDisk(tmp_path / "disk", 1000), []
        begun = Search(tmp_path / "begun", prepared)
        begun.start("a")
        begun.end("a", accuracy=0.9)
        for pages in itertools.count():
            path = Path(shutil.copytree(begun.folder.path, disk.folder / "run"))
            if study == "elsewhere":
                shutil.move(path / "study.db", tmp_path / f"{pages}.db")
                (path / "study.db").symlink_to(tmp_path / f"{pages}.db")
            search = Search(path, prepared)
            search.start("b")
            disk.leave(pages)
            why = stopped_by(lambda search=search: search.end("b", accuracy=0.8))  # type: ignore[misc]
            disk.free()
            again = Search(path, prepared)
            kept.append(len(again.study.records()))
            assert again.states()[1] == ("COMPLETE" if kept[-1] == 2 else "WAITING")
            if kept[-1] < 2:
                again.start("again")
                again.end("again", accuracy=0.8)
            assert again.states() == ["COMPLETE"] * 2
            records = read_trials(again.folder.trials_path)
            assert [(item.trial, item.accuracy) for item in records] == [(0, 0.9), (1, 0.8)]
            assert records == again.study.records()
            assert len(read_epochs(epochs_path(path, 1))) == 2
            assert again.folder.remove_leftovers() == []
            if why is None:
                return kept
            told = str(explained(why, search.folder))
            assert "cannot be written (" in told
            assert "disk" in told or "No space left" in told or "File too large" in told
            shutil.rmtree(path)
        raise AssertionError

    kept = in_child(body)
    assert len(kept) > 3
    assert set(kept) == ({1, 2} if study == "on the disk" else {2})


def stopped_by(act: Callable[[], object]) -> Exception | None:
    """The error that ended the search; None where it went on."""
    try:
        act()
    except StopSearch as stop:
        return stop.cause
    return None


def test_a_search_that_finds_no_room_to_begin_leaves_the_folder_free(tmp_path: Path, prepared: Prepared) -> None:
    def body() -> int:
        disk = SmallDisk(tmp_path / "disk", 1000)
        folder = RunFolder(disk.folder / "run")
        folder.path.mkdir()
        count = 0
        for error in disk.failures(lambda: _begin(prepared.space, folder, []), step=16):
            assert "nothing was trained yet: mend it, then start again" in str(explained(error, folder))
            folder.check_free()
            assert list(folder.path.iterdir()) == []
            count += 1
        folder.check_space(RunStudy.open(folder.study_path).space)
        return count

    assert in_child(body) > 1


@pytest.fixture
def tiny_net(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a net so small that its files take a few pages."""
    monkeypatch.syspath_prepend(request.path.parent / "training")
    return "tiny_net:make"


def test_an_export_is_whole_or_not_there(tmp_path: Path, tiny_net: str) -> None:
    run = tiny_run(tmp_path / "run", (Policy(),), model=tiny_net, measured=True)

    def body() -> list[str]:
        disk, told = SmallDisk(tmp_path / "disk", 400), []
        out = disk.folder / "out"
        for pages in itertools.count():
            disk.leave(pages)
            code, _, errors = command_line("export", run, "--trial", 0, "--out", out, "--model", tiny_net)
            disk.free()
            if code == 0:
                assert sorted(contents(out)) == ["README.md", "model.safetensors", "policy.json"]
                return told
            assert (code, list(disk.folder.iterdir())) == (1, [])
            told.append(errors)
        raise AssertionError

    errors = in_child(body)
    for told in errors:
        assert told.startswith("rlsearch: ")
        assert told.count("\n") == 1
        assert "cannot be written (" in told
    # Every one of its files was the one that found no room.
    for name in ("model.safetensors", "policy.json", "README.md"):
        assert any(f"/{name}: " in told for told in errors)


@pytest.mark.parametrize("command", ["report", "repair", "resume", "confirm"])
def test_a_full_disk_ends_a_command_with_1_and_one_message(tmp_path: Path, prepared: Prepared, command: str) -> None:
    def body() -> tuple[object, str, str]:
        disk, old = SmallDisk(tmp_path / "disk", 3000), b"the old report"
        run = disk.folder / "run"
        if command in ("repair", "resume"):
            Search(run, prepared)
        else:
            write_run(run, made_up_records())
        (run / "report.html").write_bytes(old)
        disk.leave(0)
        ended = command_line(command, run)
        disk.free()
        assert (run / "report.html").read_bytes() == old
        return ended

    assert_told(in_child(body))


def assert_told(ended: tuple[object, str, str]) -> None:
    """A command has ended with 1 and one message about the disk."""
    code, printed, errors = ended
    assert code == 1, errors
    assert "cannot be written (No space left on device)" in errors or "(File too large)" in errors
    assert "Traceback" not in printed + errors
    assert errors.startswith("rlsearch: ")
    assert errors.count("\n") == 1


def test_what_trains_on_a_full_disk(tmp_path: Path, tiny_net: str) -> None:
    """In a fresh process: torch computes no gradients in a forked one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(trainings_on_a_full_disk, (tmp_path, tiny_net)) > 3


def trainings_on_a_full_disk(folder: Path, tiny_net: str) -> int:
    """A trial's checkpoints and weights at every write, and the commands that train; how many disks were too small."""
    disk = SmallDisk(folder / "disk", 400)
    model, data = ModelSpec(tiny_net), DataSpec("digits", limit=60)
    spec, images = TrialSpec(model, data, TrainingSpec(epochs=2, batch_size=32), Policy(model)), load_data(data)

    class Here(TrialTrainable):
        def setup(self, config: dict[str, Any]) -> None:
            place = config["job"].checkpoints
            super().setup(config, WorkerSettings(place, checkpoint_seconds=0.0), images)

    def trained(place: Path) -> Any:
        place.mkdir(exist_ok=True)
        process = Here({"job": Job(0, spec, str(place))})
        while not (result := process.train())["done"]:
            pass
        return result["outcome"]

    straight = trained(folder / "straight")
    for pages in itertools.count():
        place = disk.folder / f"{pages}"
        disk.leave(pages)
        outcome = trained(place)
        disk.free()
        if outcome.state == "COMPLETE":
            break
        assert outcome.state == "FAIL"
        assert outcome.reason.startswith(f"storage: {place}/")
        assert outcome.reason.endswith(("(No space left on device)", "(File too large)"))
        again = trained(place)
        assert (again.state, again.reason) == ("COMPLETE", None)
        assert [row["accuracy"] for row in again.epochs] == [row["accuracy"] for row in straight.epochs]
        shutil.rmtree(place)

    (folder / "space.yaml").write_text(yaml.safe_dump(content()))
    disk.leave(0)
    assert_told(command_line("search", folder / "space.yaml", "--run-dir", disk.folder / "run"))
    options = ["--data", "digits", "--epochs", 1, "--set", "data.limit=60"]
    assert_told(command_line("train", tiny_net, "--out", disk.folder / "out", *options))
    return pages
