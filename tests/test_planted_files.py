"""A run of somebody else's: whatever was planted in it, no command runs any of it.

One process runs all commands, each on a folder of its own, under an audit hook that sees every unpickled class, every
import, and every command that is started.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from studied_run import studied_run

PROJECT = Path(__file__).resolve().parents[1]
RUNS = """
import contextlib, io, json, sys
seen = []

def hook(event, arguments):
    if event in ("pickle.find_class", "import", "os.system", "subprocess.Popen"):
        seen.append(f"{event} {' '.join(map(str, arguments[:2]))}")

sys.addaudithook(hook)
from rlsearch.cli import main

asked, answer, found = sys.argv[1], sys.argv[2], []
for words in json.load(open(asked)):
    seen.clear()
    sys.argv = ["rlsearch", *words]
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        code, _ = repr(error), told.write(repr(error))
    found.append({"words": words, "code": code, "told": told.getvalue(), "seen": list(seen)})
json.dump(found, open(answer, "w"))
"""
PLANTED_MODULE = """
import os
open(os.environ["RAN"], "a").write("imported")

def make(num_classes, **kwargs):
    raise SystemExit("made")
"""


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('echo unpickled >> "$RAN"',)


_SHORT = ["--data", "digits", "--set", "data.limit=64", "--epochs", "1"]


def commands(run: str, out: str) -> dict[str, list[str]]:
    """Every command that reads a run, or what an export leaves."""
    return {
        "pareto": ["pareto", run],
        "report": ["report", run],
        "export": ["export", run, "--trial", "1", "--out", out],
        "confirm": ["confirm", run, "--seeds", "2"],
        "train": ["train", f"{run}/policy.json", "--out", f"{run}/trained", *_SHORT],
        "warm start": ["search", "space.yaml", "--run-dir", out, "--warm-start", run],
        "repair": ["repair", run],
        "resume": ["resume", run],
    }


def _weights(run: Path) -> None:
    for file in run.glob("checkpoints/*/model.safetensors"):
        torch.save({"weight": torch.ones(3), "payload": Payload()}, file)


def _raw_pickles(run: Path) -> None:
    for file in run.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(pickle.dumps(Payload()))
    for name in ("versions.json", "policy.json", "run.lock", "front.png", "report.html"):
        (run / name).write_bytes(pickle.dumps(Payload()))


def _tables(run: Path) -> None:
    """Metadata as pandas writes them, and a type that old versions of Arrow unpickled; the rows are as they were."""
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload())}
    for file in [*run.glob("epochs/*.parquet"), run / "trials.parquet"]:
        table = pq.read_table(file)
        fields = [field.with_metadata(extension) for field in table.schema]
        metadata = {**(table.schema.metadata or {}), b"pandas": pickle.dumps(Payload())}
        pq.write_table(table.cast(pa.schema(fields, metadata)), file)


def _tune(run: Path) -> None:
    """What Tune would leave, and would unpickle itself."""
    for name in (
        "tuner.pkl",
        "trainable.pkl",
        "searcher-state-1.pkl",
        "search_gen_state-1.json",
        "experiment_state.pkl",
    ):
        for folder in (run, run / "tune", run / "checkpoints" / "trial-00004"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(pickle.dumps(Payload()))


def _checkpoints(run: Path) -> None:
    for folder in (run / "checkpoints" / "trial-00004", run / "trained"):
        folder.mkdir()
        for name in ("last.pt", "last.previous.pt", "checkpoint.pt"):
            torch.save({"trial": {"epochs_done": Payload()}, "epochs": []}, folder / name)


def _space(run: Path) -> None:
    text = (run / "space.yaml").read_text()
    (run / "space.yaml").write_text(text + "planted: !!python/object/apply:os.system ['echo yaml >> \"$RAN\"']\n")


def _study(run: Path) -> None:
    shutil.copy(run / "study.db", run / "copy.db")
    (run / "study.db").write_bytes(pickle.dumps(Payload()))


# What was planted, and which commands it stops, with a word of what they say; the others end well.
PLANTED: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
    "weights": (_weights, {"export": "cannot be read as safetensors"}),
    "raw pickles": (_raw_pickles, {"export": "cannot be read as safetensors", "train": "is not valid JSON"}),
    "tables": (_tables, {}),
    "tune": (_tune, {}),
    "checkpoints": (_checkpoints, {"train": "is no readable checkpoint"}),
    "space": (
        _space,
        dict.fromkeys(("pareto", "report", "export", "confirm", "resume"), "space.yaml: cannot be"),
    ),
    "study": (_study, dict.fromkeys(("repair", "resume", "warm start"), "study.db: is damaged")),
}
# Without a further option these would train; what they would need first is looked at all the same.
STOPPED = {
    "export": "another model",
    "confirm": "--model is 'resnet32'",
    "resume": "--trials: must be at least",
    "warm start": "that run searched another model",
}
# These take long, and read little of a run: where what was planted is in their way.
SLOW = {"train": ("raw pickles", "checkpoints"), "warm start": ("tune", "study")}
OPTIONS = {"confirm": ["--model", "resnet32"], "resume": ["--trials", "1"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], str]:
    """How each command ended on each folder, and what ran of the planted."""
    work = tmp_path_factory.mktemp("work")
    whole, code = studied_run(work / "whole"), studied_run(work / "code", "planted_model:make")
    (work / "planted_model.py").write_text(PLANTED_MODULE)
    (code / "planted_model.py").write_text(PLANTED_MODULE)
    (work / "space.yaml").write_text("model: {name: resnet32}\ndata: {name: digits}\nspace: {replacement: {}}\n")
    hub = {"name": "torch.hub:load", "kwargs": {"repo_or_dir": str(work), "model": "make", "source": "local"}}
    (work / "hub.yaml").write_text(json.dumps({"model": hub, "data": {"name": "digits"}, "space": {"learn_drop": {}}}))
    (work / "hubconf.py").write_text(PLANTED_MODULE)
    asked: dict[str, list[str]] = {}
    for name, (plant, _) in PLANTED.items():
        for command in commands("", "").keys() - {slow for slow, where in SLOW.items() if name not in where}:
            run = work / f"{name}, {command}"
            shutil.copytree(whole, run)
            policy = {"schema": "rlsearch.policy/1", "model": {"name": "resnet20"}, "replacements": []}
            (run / "policy.json").write_text(json.dumps(policy))
            plant(run)
            asked[run.name] = commands(str(run), str(work / "out"))[command] + OPTIONS.get(command, [])
    for command, words in commands(str(code), str(work / "out")).items():
        asked[f"code, {command}"] = words
    policy = {"schema": "rlsearch.policy/1", "model": {"name": "planted_model:make"}, "replacements": []}
    (code / "policy.json").write_text(json.dumps(policy))
    asked["code, validate"] = ["validate", "hub.yaml"]
    asked["code, search"] = ["search", "hub.yaml", "--run-dir", str(work / "out")]
    (work / "asked.json").write_text(json.dumps(list(asked.values())))
    ran = work / "ran"
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "RAN": str(ran), "HOME": str(work)}
    command = [sys.executable, "-c", RUNS, "asked.json", "found.json"]
    subprocess.run(command, cwd=work, env=environment, check=True, timeout=250)
    results = json.loads((work / "found.json").read_text())
    assert not (work / "out").exists()
    return dict(zip(asked, results, strict=True)), ran.read_text() if ran.exists() else ""


def test_nothing_that_was_planted_ran(found: tuple[dict[str, dict[str, Any]], str]) -> None:
    results, ran = found
    assert ran == ""
    for name, result in results.items():
        loud = [event for event in result["seen"] if "planted" in event or "hubconf" in event or "echo" in event]
        assert loud == [], name
        # torch's own reader is no unpickler of Python's: nothing is looked up by name at all.
        assert [event for event in result["seen"] if event.startswith("pickle.find_class")] == [], name


def test_every_command_ends_well_or_says_what_is_wrong(found: tuple[dict[str, dict[str, Any]], str]) -> None:
    for name, result in found[0].items():
        planted, _, command = name.partition(", ")
        if planted == "code":
            continue
        expected = STOPPED | PLANTED[planted][1]
        if command in expected:
            assert (result["code"], expected[command] in result["told"]) == (2, True), (name, result)
        else:
            assert result["code"] == 0, (name, result)
        assert "Traceback" not in result["told"]


def test_code_that_a_run_names_waits_for_the_user_to_name_it(found: tuple[dict[str, dict[str, Any]], str]) -> None:
    for command in ("pareto", "report", "repair"):
        assert found[0][f"code, {command}"]["code"] == 0, command
    for command in ("export", "confirm", "train", "resume"):
        result = found[0][f"code, {command}"]
        assert result["code"] == 2, (command, result)
        told = "is code, 'planted_model:make': if you trust it, add --model planted_model:make"
        assert told in " ".join(result["told"].split()), command
    for command in ("validate", "search"):
        result = found[0][f"code, {command}"]
        assert result["code"] == 2, (command, result)
        assert "model.name: is code of an installed package, 'torch.hub:load'" in result["told"]


def test_arrays_of_objects_are_not_read_from_the_cache_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlsearch.training.decoded_cache import _mapped

    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    np.save(tmp_path / "planted.npy", np.array([Payload()] * 3, dtype=object), allow_pickle=True)
    assert _mapped(tmp_path / "planted.npy", 3) is None
    assert not (tmp_path / "ran").exists()


def test_the_payload_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others show not to happen."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "ran").read_text() == "unpickled\n"
