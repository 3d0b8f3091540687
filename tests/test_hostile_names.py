"""Names and links in a run of somebody else's lead nowhere else: nothing outside of its folder is read or changed."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_run import SPACE, record, write_run
from safetensors.torch import save_file
from studied_run import studied_run

from rlsearch.errors import RlsearchError, RunFolderError
from rlsearch.export import export_trial
from rlsearch.files import check_inside
from rlsearch.policy import ModelSpec, Policy, Replacement
from rlsearch.results import read_run, summary
from rlsearch.results.report import write_report
from rlsearch.results.tensorboard import write_trial
from rlsearch.run_lock import run_lock
from rlsearch.search.repair import repair_run
from rlsearch.search.run import resume_search
from rlsearch.training.checkpoint import load_weights
from rlsearch.training.models import build_model

NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "~/x",
    "x" * 250,
    "ünïcödé",
    "a b",
    "$(x)",
    "C:\\x",
    "%2e%2e",
    "-rf",
]
NO_NAMES = ["", "x" * 257, "a\0b", "\x1b[2J", "a\nb", "\ud800"]


def everything(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, with its content."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run beside something that is none of its business."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("precious")
    (tmp_path / "mine" / "trial-00009.parquet").write_text("precious")
    return studied_run(tmp_path / "run")


def _checkpoints_of_one(run: Path) -> Path:
    return run / "checkpoints" / "trial-00002"


LINKS: dict[str, Callable[[Path], Path]] = {
    "a trial's checkpoints": _checkpoints_of_one,
    "all checkpoints": lambda run: run / "checkpoints",
    "a trial's curves": lambda run: run / "tensorboard" / "trial-00001",
    "epochs": lambda run: run / "epochs",
    "a trial's epochs": lambda run: run / "epochs" / "trial-00001.parquet",
    "table": lambda run: run / "trials.parquet",
    "study": lambda run: run / "study.db",
    "lock": lambda run: run / "run.lock",
    "report": lambda run: run / "report.html",
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("to", ["mine", "mine/precious", "nowhere"])
def test_links_are_refused(run: Path, name: str, to: str) -> None:
    link, mine = LINKS[name](run), run.parent / "mine"
    if link.is_dir():
        link.rename(run.parent / "was")
    else:
        link.unlink(missing_ok=True)
    link.symlink_to(run.parent / to)
    before = everything(mine)
    for command in (repair_run, resume_search):
        with pytest.raises(RunFolderError, match=r"is a link, or no ordinary file|is missing|no such folder"):
            command(run)
    assert everything(mine) == before
    if link.parent in (run, run / "epochs"):
        with pytest.raises(RunFolderError, match="is a link, or no ordinary file"):
            read_run(run)
    elif "checkpoints" in str(link):
        with pytest.raises(RunFolderError, match="is a link, or no ordinary file"):
            export_trial(read_run(run), 2, run.parent / "out")
    assert not (run.parent / "nowhere").exists()


def test_a_pipe_is_refused_and_not_waited_for(run: Path) -> None:
    os.mkfifo(run / "confirmed.parquet")
    for command in (read_run, repair_run, resume_search):
        with pytest.raises(RunFolderError, match=r"confirmed\.parquet: is a link, or no ordinary file"):
            command(run)


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunFolderError, match=r"run\.lock: is a link"), run_lock(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_files_that_a_search_removes_meanwhile_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").touch()
    check_inside(tmp_path, ["gone", "here"])
    (tmp_path / "link").symlink_to("here")
    real = os.scandir

    def late(path: Any) -> list[os.DirEntry[str]]:
        entries = list(real(path))
        (tmp_path / "link").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(os, "scandir", late)
    check_inside(tmp_path)


def test_a_journal_that_names_another_file_is_refused(run: Path) -> None:
    """SQLite deletes what it names: on a copy of the study it does."""
    victim, mark = run.parent / "mine" / "precious", bytes.fromhex("d9d505f920a163d7")

    def plant(study: Path) -> None:
        name, page = os.fsencode(victim), 4096
        start = mark + struct.pack(">IIIII", 0, 1, study.stat().st_size // page, 512, page)
        end = struct.pack(">I", 2**30 // page + 1) + name + struct.pack(">II", len(name), sum(name)) + mark
        study.with_name(f"{study.name}-journal").write_bytes(start.ljust(512, b"\0") + end)

    plant(run / "study.db")
    for command in (repair_run, resume_search):
        with pytest.raises(RunFolderError, match="names another file, which SQLite would delete"):
            command(run)
    assert victim.exists()

    copy = run.parent / "copy.db"
    copy.write_bytes((run / "study.db").read_bytes())
    plant(copy)
    with sqlite3.connect(copy) as connection:
        connection.execute("SELECT count(*) FROM trials").fetchall()
    connection.close()
    assert not victim.exists()


def test_an_ordinary_journal_is_undone(run: Path) -> None:
    (run / "study.db-journal").write_bytes(random.Random(0).randbytes(600))
    assert repair_run(run).trials == 4


def test_hostile_units_and_models_are_words(tmp_path: Path) -> None:
    policies = [Policy(replacements=(Replacement(name, "skip"), Replacement("layer1.1", name))) for name in NAMES]
    assert [Policy.from_dict(policy.to_dict()).hash for policy in policies] == [policy.hash for policy in policies]
    records = [record(trial, policy, params=9 - trial, device=NAMES[0]) for trial, policy in enumerate(policies, 1)]
    space = SPACE | {"model": {"name": NAMES[0]}, "data": {"name": NAMES[1]}}
    run = write_run(tmp_path / "run", [record(0), *records], space)
    before = {str(path) for path in tmp_path.rglob("*")}
    for path in write_report(read_run(run)).values():
        assert path.parent == run
    for item in read_run(run).records:
        write_trial(run / "tensorboard", item, [])
        with pytest.raises(RlsearchError):
            export_trial(read_run(run), item.trial, tmp_path / "out")
    json.dumps(summary(read_run(run)))
    for name in NAMES:
        with pytest.raises(RlsearchError):
            build_model(name)
    new = {str(path) for path in tmp_path.rglob("*")} - before
    assert all(path.startswith(f"{run}/") for path in new)


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused(name: str) -> None:
    for policy in (
        Policy(replacements=(Replacement(name, "skip"),)),
        Policy(replacements=(Replacement("layer1.1", name),)),
        Policy(ModelSpec(name)),
    ):
        with pytest.raises(RlsearchError, match=r"must have 1 to 256 characters|only characters that can be shown"):
            Policy.from_dict(policy.to_dict())


@pytest.mark.parametrize("name", [*NAMES, "a\0b", "\x1b[2J", ""])
def test_hostile_tensors_are_of_another_model(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RlsearchError, match=r"of another model|cannot be read"):
        load_weights(tmp_path / "model.safetensors", torch.nn.Linear(1, 1))


@pytest.mark.parametrize("number", [-1, -(10**9), 10**9, 2**63 - 1])
def test_what_is_no_number_of_a_trial_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="trial must be at least 0"):
        record(number)


def test_the_greatest_number_of_a_trial_stays_in_the_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [record(0), record(10**9 - 1, params=5)])
    write_report(read_run(run))
    with pytest.raises(RlsearchError):
        export_trial(read_run(run), 10**9 - 1, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
