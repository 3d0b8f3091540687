"""Everything in a run's folder follows from its study again, whatever has happened to it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlsearch.errors import RunFolderError
from rlsearch.policy import Policy, Replacement
from rlsearch.results import front, read_run
from rlsearch.results.tables import epochs_path, read_epochs
from rlsearch.run_lock import run_lock
from rlsearch.search.outcome import Outcome
from rlsearch.search.repair import Repaired, repair_run
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.sampler import Proposal
from rlsearch.search.space import parse_space
from rlsearch.search.study import RunStudy
from rlsearch.training.metrics import EpochMetrics

SPACE = parse_space(
    {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "training": {"epochs": 2},
        "objectives": {"accuracy": "maximize", "params": "minimize"},
        "space": {"replacement": {"blocks": ["skip", "scalar"]}},
        "search": {"trials": 8},
    }
).with_num_classes(10)


def rows(count: int, accuracy: float, params: int) -> tuple[Mapping[str, Any], ...]:
    sizes = {"params": params, "params_total": params, "learnable_params": params, "memory": 9, "memory_predicted": 9}
    fixed: dict[str, Any] = {**sizes, "validation_loss": 0.4, "train_loss": 0.5, "lr": 0.1, "dropped_units": 0}
    fixed |= {"train_flops": 1e9, "forward_flops": 3e8, "train_seconds": 1.5, "samples_per_second": 80.0}
    fixed |= {"device": "cpu", "step_memory": 8, "forward_share": 1.0, "mean_learnable_params": float(params)}
    return tuple(
        EpochMetrics(epoch=e, epochs=2, accuracy=accuracy, **fixed, learning=(), left=()).to_dict()
        for e in range(1, count + 1)
    )


def finish(folder: RunFolder, study: RunStudy, number: int) -> None:
    record = study.finish(number, Outcome("COMPLETE", rows(2, 0.9 - 0.01 * number, 9000 - 100 * number)), {})
    folder.checkpoints(number).mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, folder.checkpoints(number) / "model.safetensors")
    folder.write_trial(record, study.epochs(number), list(study.objectives))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four complete trials, one that was left running, and one that had ended and was not closed."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    study = RunStudy.create(folder.study_path, "run", SPACE.to_dict(), 8)
    folder.write_space(SPACE.to_dict())
    for number in range(6):
        replaced = tuple(Replacement(f"layer{stage}.1", "skip") for stage in range(1, 1 + number % 4))
        policy = Policy(SPACE.model, replaced)
        study.add(Proposal(policy, SPACE.training, "baseline" if number == 0 else "sampler"), 0)
        if number < 4:
            finish(folder, study, number)
    folder.write_trials(study.records())
    return folder.path


def whole(run: Path) -> Repaired:
    """The run without its open trials."""
    repair_run(run)
    return repair_run(run)


def test_a_whole_run_has_nothing_to_mend(run: Path) -> None:
    assert whole(run) == Repaired(4, (), ())
    assert {"report.html", "front.png"} <= {path.name for path in run.iterdir()}


def test_open_trials_are_closed_or_queued(run: Path) -> None:
    study = RunStudy.open(run / "study.db")
    study._keep(study._trial_id(5), Outcome("COMPLETE", rows(2, 0.8, 10)))
    told = repair_run(run)
    assert told.mended == (
        "trial 4: was left running; a resume takes it up again",
        "trial 5: had ended as COMPLETE, and was not closed",
        "tensorboard/trial-00005: is missing",
    )
    assert told.lost == ("checkpoints/trial-00005/model.safetensors: is missing; trial 5 cannot be exported",)
    assert [record.trial for record in read_run(run).records] == [0, 1, 2, 3, 5]
    assert len(read_epochs(epochs_path(run, 5))) == 2


DAMAGES = {
    "trials.parquet": "is damaged",
    "epochs/trial-00002.parquet": "is damaged",
    "space.yaml": "space.yaml: ",
    "checkpoints/trial-00001/model.safetensors": "cannot be exported",
    "tensorboard/trial-00003/events.out.tfevents.rlsearch": "tensorboard/trial-00003: is damaged",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_cut_short_is_written_anew_or_told(run: Path, name: str) -> None:
    whole(run)
    before, members = read_run(run).records, [item.trial for item in front(read_run(run))]
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    told = repair_run(run)
    (line,) = told.mended + told.lost
    assert DAMAGES[name] in line
    assert read_run(run).records == before
    assert [item.trial for item in front(read_run(run))] == members
    assert repair_run(run).mended == ()


@pytest.mark.parametrize(
    "name", ["trials.parquet", "space.yaml", "epochs", "tensorboard", "epochs/trial-00003.parquet"]
)
def test_what_was_deleted_is_written_anew(run: Path, name: str) -> None:
    whole(run)
    before = read_run(run).records
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    assert repair_run(run).mended
    assert read_run(run).records == before
    assert len(read_epochs(epochs_path(run, 3))) == 2
    assert (run / "tensorboard" / "trial-00003" / "result").is_dir()
    assert repair_run(run).mended == ()


def test_an_altered_search_space_is_noticed_and_mended(run: Path) -> None:
    whole(run)
    before, file = read_run(run), run / "space.yaml"
    file.write_text(file.read_text().replace("params: minimize", "params: maximize"))
    with pytest.raises(RunFolderError, match=r"space\.yaml: was changed since .* `rlsearch repair"):
        read_run(run)
    assert repair_run(run).mended == ("space.yaml: was not what the study was made for",)
    assert read_run(run) == before


def test_flipped_bits_never_make_a_wrong_table(run: Path) -> None:
    whole(run)
    before, table = read_run(run).records, run / "trials.parquet"
    content, rng = table.read_bytes(), random.Random(0)
    for place in rng.sample(range(len(content)), 8):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        table.write_bytes(flipped)
        repair_run(run)
        assert read_run(run).records == before


def test_what_belongs_to_no_trial_and_what_a_kill_has_left_is_removed(run: Path) -> None:
    whole(run)
    shutil.copy(epochs_path(run, 1), epochs_path(run, 77))
    (run / ".trials.parquet.abc12_x9").write_bytes(b"half")
    assert set(repair_run(run).mended) == {
        "epochs/trial-00077.parquet: the study has no such trial",
        ".trials.parquet.abc12_x9: left by a process that was killed",
    }
    assert not (run / ".trials.parquet.abc12_x9").exists()


def test_a_run_in_use_or_without_its_study_is_refused(run: Path) -> None:
    with run_lock(run), pytest.raises(RunFolderError, match="in use"):
        repair_run(run)
    study = run / "study.db"
    study.write_bytes(study.read_bytes()[:5000])
    with pytest.raises(RunFolderError, match=r"study.db: is damaged .* restore it from a copy"):
        repair_run(run)
    assert json.loads((run / "versions.json").read_text())
