"""The front and the baseline trained again: real trainings, interrupted ones, further seeds, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import DATA, SKIP, TRAINING, tiny_run

from rlsearch import DataSpec, ModelSpec, Policy, TrialSpec
from rlsearch.confirm import ConfirmPlan, ConfirmWatch, confirm_run, new_seeds, plan_confirmation
from rlsearch.errors import DataError, ModelError, RunFolderError, UserError
from rlsearch.results.confirmation import confirmations
from rlsearch.results.confirmed import ConfirmedTraining, read_confirmed
from rlsearch.results.tables import Run, read_run, write_trials
from rlsearch.run_lock import run_lock
from rlsearch.training.data import load_data, load_test
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.trial import Trial

FACTORY = """
from rlsearch import build_model

def small(num_classes):
    return build_model("resnet20", num_classes)
"""


class Told(ConfirmWatch):
    """Keeps what it is told; interrupts after so many epochs."""

    def __init__(self, epochs: int | None = None) -> None:
        self.plan: ConfirmPlan | None = None
        self.rows: list[ConfirmedTraining] = []
        self._left = epochs

    def planned(self, plan: ConfirmPlan) -> None:
        self.plan = plan

    def epoch_ended(self, metrics: EpochMetrics) -> None:
        if self._left is not None:
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt

    def training_ended(self, training: ConfirmedTraining) -> None:
        self.rows.append(training)


def results(rows: Any) -> list[dict[str, Any]]:
    """What must be the same whenever a training runs: all of a row but its times."""
    times = ("train_seconds", "samples_per_second", "ended")
    return [{name: value for name, value in asdict(row).items() if name not in times} for row in rows]


def pairs(rows: Any) -> list[tuple[int, int]]:
    return [(row.trial, row.seed) for row in rows]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the baseline and a policy on the front, and one trial that is dominated."""
    return tiny_run(tmp_path_factory.mktemp("searched") / "run")


@pytest.fixture(scope="module")
def confirmed(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Told]:
    """The same run, confirmed with two seeds without an interruption."""
    folder = tmp_path_factory.mktemp("confirmed") / "run"
    shutil.copytree(searched, folder)
    told = Told()
    return confirm_run(folder, seeds=2, watch=told), told


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    """A copy of the run to do things to."""
    return Path(shutil.copytree(searched, tmp_path / "run"))


def test_the_front_and_the_baseline_are_trained_with_the_same_new_seeds(confirmed: tuple[Run, Told]) -> None:
    run, told = confirmed
    assert told.plan is not None
    assert [record.trial for record in told.plan.records] == [0, 1]
    assert told.plan.seeds == (1, 2)
    assert told.plan.num_trainings == 4
    times = {record.trial: record.train_seconds or 0 for record in run.records}
    assert told.plan.seconds == pytest.approx(2 * (times[0] + times[1]))
    # All policies with one seed before the next seed, so that an interruption leaves pairs.
    assert pairs(told.rows) == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert pairs(read_confirmed(run.folder / "confirmed.parquet")) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert sorted(pairs(run.confirmed)) == sorted(pairs(told.rows))
    for row in told.rows:
        record = run.records[row.trial]
        assert (row.policy_hash, row.params, row.fidelity) == (record.policy_hash, record.params, record.fidelity)
        assert row.train_flops == record.train_flops
        assert (row.train_seconds or 0) > 0
    assert confirmations(run)[1].chance == 1.0  # the cheapest of two is on the front, whatever its accuracy


def test_the_accuracy_is_that_of_the_trained_model_on_the_test_split(confirmed: tuple[Run, Told]) -> None:
    _, told = confirmed
    spec = TrialSpec(ModelSpec("resnet20"), DataSpec(**DATA), TRAINING, replace(SKIP, model=ModelSpec("resnet20")), 2)
    data, test = load_data(spec.data), load_test(spec.data)
    trial = Trial(spec, data=data, device="cpu")
    while not trial.done:
        metrics = trial.run_epoch()
    pixels = torch.from_numpy(test.images).float().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        found = trial.model.eval()((pixels - mean) / std).argmax(1).numpy()
    (row,) = [row for row in told.rows if (row.trial, row.seed) == (1, 2)]
    # Batches of another size may round a tie otherwise.
    assert row.test_accuracy == pytest.approx(np.mean(found == test.labels), abs=1.5 / len(test.labels))
    assert row.accuracy == metrics.accuracy
    # Another seed is another training.
    assert len({row.test_accuracy for row in told.rows}) > 1


def test_further_seeds_are_added_and_nothing_is_repeated(confirmed: tuple[Run, Told], tmp_path: Path) -> None:
    run, _ = confirmed
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    told = Told()
    more = confirm_run(folder, seeds=3, watch=told)
    assert pairs(told.rows) == [(0, 3), (1, 3)]
    rows = read_confirmed(folder / "confirmed.parquet")
    assert [row for row in rows if row.seed < 3] == read_confirmed(run.folder / "confirmed.parquet")
    assert confirmations(more)[0].seeds == (1, 2, 3)
    again = Told()
    before = (folder / "confirmed.parquet").read_bytes()
    assert confirm_run(folder, seeds=2, watch=again).confirmed == tuple(rows)
    assert again.rows == []
    assert again.plan is not None
    assert again.plan.remaining == ()
    assert (folder / "confirmed.parquet").read_bytes() == before


def test_an_interrupted_confirmation_goes_on_where_it_was(folder: Path, confirmed: tuple[Run, Told]) -> None:
    # In the middle of the second training.
    with pytest.raises(KeyboardInterrupt):
        confirm_run(folder, seeds=2, watch=Told(epochs=TRAINING.epochs + 1))
    kept = read_confirmed(folder / "confirmed.parquet")
    assert pairs(kept) == [(0, 1)]
    told = Told()
    confirm_run(folder, seeds=2, watch=told)
    assert pairs(told.rows) == [(1, 1), (0, 2), (1, 2)]
    rows = read_confirmed(folder / "confirmed.parquet")
    assert rows[0] == kept[0]
    assert results(rows) == results(read_confirmed(confirmed[0].folder / "confirmed.parquet"))
    # No file of a write that was cut off stays.
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_new_seeds_are_those_that_no_trial_had(searched: Path) -> None:
    run = read_run(searched)
    assert new_seeds(run, 3) == (1, 2, 3)
    assert new_seeds(run, 5)[:3] == new_seeds(run, 3)
    used = replace(run, records=(*run.records, replace(run.records[1], trial=9, seed=2)))
    assert new_seeds(used, 3) == (1, 3, 4)
    last = replace(run, records=tuple(replace(record, seed=2**32 - 1) for record in run.records))
    assert new_seeds(last, 2) == (0, 1)


def test_trials_and_the_pick_may_be_named(searched: Path) -> None:
    run = read_run(searched)

    def planned(**arguments: Any) -> list[int]:
        return [record.trial for record in plan_confirmation(run, 3, **arguments).records]

    assert planned() == [0, 1]
    assert planned(trials=[2]) == [0, 2]
    assert planned(trials=[0]) == [0]
    assert planned(key="params") == [0, 1]
    assert planned(trials=[2, 2], key="knee") == [0, *sorted({2, planned(key="knee")[-1]} - {0})]
    # The baseline is trained too where it broke a constraint, and left out where it has no result.
    broke = replace(run, records=(replace(run.records[0], state="INFEASIBLE"), *run.records[1:]))
    assert [record.trial for record in plan_confirmation(broke).records] == [0, 1]
    lost = replace(run, records=(replace(run.records[0], state="FAIL", accuracy=None), *run.records[1:]))
    assert [record.trial for record in plan_confirmation(lost).records] == [1]


def test_the_baseline_is_trained_once_a_seed_whatever_its_repeats_were(searched: Path) -> None:
    run = read_run(searched)
    best = replace(run.records[0], trial=3, origin="baseline repeat", seed=1, accuracy=1.0)
    repeated = replace(run, records=(*run.records, best))
    plan = plan_confirmation(repeated)
    assert [record.trial for record in plan.records] == [0, 1]
    assert plan.seeds == (2, 3, 4)
    assert [record.trial for record in plan_confirmation(repeated, key="accuracy").records] == [0]
    with pytest.raises(UserError, match="trial 3 is the baseline again, with another seed; the baseline is always"):
        plan_confirmation(repeated, 3, [3])


def test_what_cannot_be_confirmed_is_refused(searched: Path, folder: Path, tmp_path: Path) -> None:
    run = read_run(searched)
    with pytest.raises(UserError, match="--seeds: must be at least 2"):
        plan_confirmation(run, 1)
    with pytest.raises(UserError, match="has no trial 7"):
        plan_confirmation(run, 3, [7])
    with pytest.raises(UserError, match="unknown objective 'acuracy'"):
        plan_confirmation(run, 3, (), "acuracy")
    failed = replace(run.records[2], state="FAIL", reason="diverged", accuracy=None)
    with pytest.raises(UserError, match=r"trial 2 is FAIL \(diverged\); only COMPLETE trials can be confirmed"):
        plan_confirmation(replace(run, records=(*run.records[:2], failed)), 3, [2])
    with pytest.raises(RunFolderError, match="no trial is complete"):
        plan_confirmation(replace(run, records=(failed,)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="holds no run"):
        confirm_run(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_no_two_write_to_one_run(folder: Path) -> None:
    told = Told()
    with run_lock(folder), pytest.raises(RunFolderError, match="is in use by process"):
        confirm_run(folder, watch=told)
    assert told.plan is None
    assert not (folder / "confirmed.parquet").exists()


def test_a_set_without_a_test_split_is_refused_before_anything_trains(
    make_record: Any, make_run: Any, tmp_path: Path
) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / "images" / "train" / label / f"{number}.png")
    space = {"objectives": {"accuracy": "maximize"}, "data": {"name": f"imagefolder:{tmp_path / 'images'}"}}
    folder = make_run([make_record(0)], space)
    told = Told()
    with pytest.raises(DataError, match="test"):
        confirm_run(folder, watch=told)
    assert told.plan is None
    assert not (folder / "confirmed.parquet").exists()


def test_a_training_that_diverges_is_kept_as_such(folder: Path) -> None:
    run = read_run(folder)
    wild = json.dumps(json.loads(run.records[1].training) | {"lr": 1e30, "warmup_epochs": 0.0})
    write_trials(folder / "trials.parquet", [run.records[0], replace(run.records[1], training=wild), run.records[2]])
    told = Told()
    done = confirm_run(folder, seeds=2, watch=told)
    lost = [row for row in told.rows if row.trial == 1]
    assert [(row.reason or "").split(":")[0] for row in lost] == ["diverged"] * 2
    assert {row.test_accuracy for row in lost} == {None}
    found = confirmations(done)
    assert (found[1].num_diverged, found[1].accuracy, found[1].is_confirmed) == (2, None, False)
    assert found[0].is_confirmed
    again = Told()
    confirm_run(folder, seeds=2, watch=again)
    assert again.rows == []


def test_model_code_runs_only_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tiny_run(tmp_path / "run", [Policy()], model="our_models:small")
    sys.modules.pop("our_models")
    with pytest.raises(ModelError, match="--model our_models:small"):
        confirm_run(folder, seeds=2)
    with pytest.raises(ModelError, match="but the model of"):
        confirm_run(folder, seeds=2, model="our_models:large")
    assert "our_models" not in sys.modules
    assert not (folder / "confirmed.parquet").exists()
    assert pairs(confirm_run(folder, seeds=2, model="our_models:small").confirmed) == [(0, 1), (0, 2)]
