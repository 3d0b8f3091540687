"""Files that were cut, altered, or written by somebody who guessed: a clear error or the right answer, nothing else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_up_run import SPACE, made_up_records, write_run

from rlsearch.errors import RlsearchError
from rlsearch.policy import Policy
from rlsearch.results import front, read_run, select
from rlsearch.results.confirmed import ConfirmedTraining, write_confirmed
from rlsearch.results.tables import read_epochs
from rlsearch.results.tensorboard import is_whole, write_trial
from rlsearch.run_lock import run_lock
from rlsearch.search.outcome import Outcome
from rlsearch.search.sampler import Proposal
from rlsearch.search.space import load_space, parse_space
from rlsearch.search.study import RunStudy
from rlsearch.training.checkpoint import load_checkpoint, read_weights, save_checkpoint, save_weights

COUNT = 125
LEAVES = [None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x", "../../etc/passwd", [], {}, [1, "a"], {"a": 1}]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One of the ways in which disks, transfers and editors damage a file."""
    place, length = rng.randrange(len(content)), rng.choice([1, 1, 2, 16, 300])
    kind = rng.choice(["cut", "flip", "zero", "delete", "repeat", "insert"])
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    if kind == "zero":
        return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]
    if kind == "delete":
        return content[:place] + content[place + length :]
    if kind == "repeat":
        return content[:place] + content[place : place + length] * 2 + content[place + length :]
    return content[:place] + rng.randbytes(length) + content[place:]


def mutated_content(content: Any, rng: random.Random) -> Any:
    """A value somewhere inside is another, gone, or under another name."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    holder, key = rng.choice(places)
    kind = rng.choice(["value", "value", "value", "gone", "renamed"])
    if kind == "value":
        holder[key] = copy.deepcopy(rng.choice(LEAVES))
    elif kind == "gone":
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(["", "a b", f"{key}x", 3])] = holder.pop(key)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else []
    for key in keys:
        yield content, key
        yield from _places(content[key])


def told_or_right(read: Callable[[], Any], is_right: Callable[[Any], bool]) -> bool:
    """Whether an error was told; what is read without one must be right."""
    try:
        found = read()
    except RlsearchError as error:
        told = str(error)
    else:
        assert is_right(found)
        return False
    assert 10 < len(told) < 6000
    return True


POLICY = {
    "schema": "rlsearch.policy/1",
    "replacements": [
        {"unit": "layer1.1", "block": "scalar", "options": {"init": "half"}},
        {"unit": "layer2.1", "block": "skip", "options": {}},
    ],
    "learn_drop": {"score": "param_change", "threshold": 0.1, "patience": 2},
    "model": {"name": "resnet32", "num_classes": 10, "kwargs": {}},
}


@pytest.mark.parametrize("of", ["bytes", "content"])
def test_policies(tmp_path: Path, of: str) -> None:
    path, rng = tmp_path / "policy.json", random.Random(0)
    whole = Policy.from_dict(POLICY).to_dict()
    text = json.dumps(whole).encode()
    told = 0
    for _ in range(COUNT):
        changed = mutated_bytes(text, rng) if of == "bytes" else json.dumps(mutated_content(whole, rng)).encode()
        path.write_bytes(changed)
        told += told_or_right(lambda: Policy.load(path), lambda found: Policy.from_dict(found.to_dict()) == found)
    assert told > COUNT / 4


@pytest.mark.parametrize("of", ["bytes", "content"])
def test_search_spaces(tmp_path: Path, of: str) -> None:
    path, rng = tmp_path / "space.yaml", random.Random(1)
    whole = {**SPACE, "search": {"trials": 24, "sampler": {"name": "tpe", "n_ei_candidates": 20}, "min_epochs": 1}}
    text = yaml.safe_dump(whole).encode()
    told = 0
    for _ in range(COUNT):
        changed = mutated_bytes(text, rng) if of == "bytes" else yaml.safe_dump(mutated_content(whole, rng)).encode()
        path.write_bytes(changed)
        told += told_or_right(lambda: load_space(path), lambda found: parse_space(found.to_dict()) == found)
    assert told > COUNT / 4


@pytest.mark.parametrize(
    "name", ["trials.parquet", "epochs/trial-00005.parquet", "space.yaml", "confirmed.parquet", "run.lock"]
)
def test_runs(tmp_path: Path, name: str) -> None:
    """A file that was altered is never read as if it were whole: what is shown as the front is what was found."""
    run, rng = write_run(tmp_path / "run", made_up_records()), random.Random(2)
    first = read_run(run).records[0]
    rows = [ConfirmedTraining(0, first.policy_hash, seed, test_accuracy=0.9 + seed / 100) for seed in (1, 2)]
    write_confirmed(run / "confirmed.parquet", rows)
    with run_lock(run):
        pass
    before = read_run(run)
    members, pick = [item.trial for item in front(before)], select(before)
    epochs = read_epochs(run / "epochs" / "trial-00005.parquet")
    whole, told = (run / name).read_bytes(), 0
    for _ in range(COUNT):
        (run / name).write_bytes(mutated_bytes(whole, rng))
        if name.startswith("epochs"):
            told += told_or_right(lambda: read_epochs(run / name), lambda found: found == epochs)
        else:
            told += told_or_right(
                lambda: read_run(run),
                lambda found: (
                    (found.records, found.confirmed, found.space) == (before.records, before.confirmed, before.space)
                    and [item.trial for item in front(found)] == members
                    and select(found) == pick
                ),
            )
            with run_lock(run):  # what stands in its file only tells others who holds it
                pass
    assert told > COUNT / 4 or name == "run.lock"


def test_studies(tmp_path: Path) -> None:
    path, rng = tmp_path / "study.db", random.Random(3)
    space = parse_space(SPACE).with_num_classes(10)
    study = RunStudy.create(path, "run", space.to_dict(), 5)
    for number in range(3):
        study.add(Proposal(Policy(space.model), space.training, "baseline" if number == 0 else "sampler"), number)
        study.finish(number, Outcome("FAIL", reason="diverged: nan"), {})
    whole, records, told = path.read_bytes(), study.records(), 0
    for _ in range(2 * COUNT):  # most of an empty database is tables that hold nothing
        path.write_bytes(mutated_bytes(whole, rng))
        for side in ("-journal", "-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)
        told += told_or_right(lambda: RunStudy.open(path).records(), lambda found: found == records)
    assert told > COUNT / 4


def test_weights(tmp_path: Path) -> None:
    path, rng, told = tmp_path / "model.safetensors", random.Random(5), 0
    model = torch.nn.Linear(7, 5)
    save_weights(path, model)
    whole, state = path.read_bytes(), model.state_dict()
    for _ in range(COUNT):
        path.write_bytes(mutated_bytes(whole, rng))
        told += told_or_right(
            lambda: read_weights(path),
            lambda found: found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state),
        )
    assert told > COUNT / 2


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", made_up_records())
    trial = read_run(run).records[5]
    write_trial(tmp_path, trial, read_epochs(run / "epochs" / "trial-00005.parquet"))
    assert is_whole(tmp_path, trial)
    rng = random.Random(6)
    for place in ("", "result/"):
        path = tmp_path / "trial-00005" / f"{place}events.out.tfevents.rlsearch"
        whole = path.read_bytes()
        for _ in range(COUNT // 2):
            changed = mutated_bytes(whole, rng)
            path.write_bytes(changed)
            # Whatever stands behind the last event is not read.
            assert is_whole(tmp_path, trial) == changed.startswith(whole)
        path.write_bytes(whole)


def test_checkpoints(tmp_path: Path) -> None:
    path, rng = tmp_path / "last.pt", random.Random(4)
    state = {"model": {"weight": torch.arange(30.0)}, "epochs": [{"accuracy": 0.5}] * 3}
    save_checkpoint(path, state)
    whole, told = path.read_bytes(), 0
    for _ in range(COUNT):
        path.write_bytes(mutated_bytes(whole, rng))
        told += told_or_right(
            lambda: load_checkpoint(path),
            lambda found: (
                torch.equal(found["model"]["weight"], state["model"]["weight"]) and found["epochs"] == state["epochs"]
            ),
        )
    assert told > COUNT / 4
