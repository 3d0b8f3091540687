"""An export stands alone, and measures as its trial did; otherwise it is no export."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlsearch import DataSpec, LearnDrop, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec, build_model
from rlsearch.errors import ModelError, RlsearchError, RunFolderError, UserError
from rlsearch.export import export_trial, load_exported
from rlsearch.replacement import materialize
from rlsearch.results.confirmed import ConfirmedTraining, write_confirmed
from rlsearch.results.tables import TrialRecord, read_run, write_trials
from rlsearch.training.checkpoint import save_weights
from rlsearch.training.data import load_data
from rlsearch.training.trial import Trial

DATA = {"name": "digits", "limit": 600}
FACTORY = """
from rlsearch import build_model

def small(num_classes):
    return build_model("resnet20", num_classes)
"""


def trained_run(folder: Path, model: ModelSpec, policy: Policy) -> Trial:
    """The folder of a run with one trial, really trained, as a search leaves it."""
    training = TrainingSpec(epochs=6, batch_size=32, lr=0.05)
    data = DataSpec(**DATA)  # type: ignore[arg-type]
    policy = replace(policy, model=model)
    trial = Trial(TrialSpec(model, data, training, policy), data=load_data(data), device="cpu")
    while not trial.done:
        metrics = trial.run_epoch()
    weights = folder / "checkpoints" / "trial-00000"
    weights.mkdir(parents=True)
    save_weights(weights / "model.safetensors", trial.model)
    names = ("accuracy", "params", "params_total", "memory", "memory_predicted", "train_flops", "device")
    record = TrialRecord(
        trial=0,
        state="COMPLETE",
        policy=json.dumps(policy.to_dict()),
        policy_hash=policy.hash,
        seed=0,
        training=json.dumps({"epochs": 6, "batch_size": 32, "lr": 0.05}),
        fidelity=6,
        **{name: getattr(metrics, name) for name in names},
    )
    write_trials(folder / "trials.parquet", [record])
    space = {"objectives": {"accuracy": "maximize", "params": "minimize"}, "data": DATA, "model": {"name": model.name}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return trial


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trial]:
    folder = tmp_path_factory.mktemp("run")
    policy = Policy(
        replacements=(Replacement("layer1.1", "scalar"), Replacement("layer2.2", "skip")),
        learn_drop=LearnDrop(threshold=0.3, patience=1, warmup=0.5),
    )
    return folder, trained_run(folder, ModelSpec("resnet20"), policy)


def test_an_export_is_the_trained_model(run: tuple[Path, Trial], tmp_path: Path) -> None:
    folder, trial = run
    report = export_trial(read_run(folder), 0, tmp_path / "out")
    # Well above chance, so that other weights cannot measure alike.
    assert report.validation_accuracy == report.recorded_accuracy > 0.5
    assert 0.5 < report.test_accuracy <= 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "model.safetensors",
        "policy.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = load_exported(tmp_path / "out")
    images = torch.randn(5, 3, 8, 8)
    # Only the memory format may differ.
    assert torch.allclose(model(images), materialize(trial.model).eval()(images), atol=1e-5)
    # Everything but the skipped unit is the untouched architecture's own.
    untouched = {name for name in build_model("resnet20").state_dict() if not name.startswith("layer2.2.")}
    assert set(model.state_dict()) == untouched
    policy = Policy.load(tmp_path / "out" / "policy.json")
    assert policy.hash == trial.spec.policy.hash
    assert policy.provenance["training"]["lr"] == 0.05
    assert policy.provenance["input_shape"] == [3, 8, 8]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "scalar layer1.1" in card
    assert f"{100 * report.test_accuracy:.2f} %" in card


def test_the_card_tells_what_was_confirmed(run: tuple[Path, Trial], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    policy = read_run(folder).records[0].policy_hash
    rows = [ConfirmedTraining(0, policy, seed, test_accuracy=0.9 + seed / 100, params=1) for seed in (1, 2, 3)]
    write_confirmed(folder / "confirmed.parquet", rows)
    export_trial(read_run(folder), 0, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n## Confirmed with new seeds\n\n- this policy: on the test split 92.00 ± 2.48 % over 3 trainings" in card
    assert card.index("## Confirmed") < card.index("\n\n## Use\n")


def test_nothing_is_written_over(run: tuple[Path, Trial], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists; export to a new folder"):
        export_trial(read_run(run[0]), 0, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_other_weights_are_noticed(run: tuple[Path, Trial], tmp_path: Path) -> None:
    folder, trial = run
    weights = folder / "checkpoints" / "trial-00000" / "model.safetensors"
    before = weights.read_bytes()
    torch.manual_seed(1)
    other = Trial(replace(trial.spec, seed=1), device="cpu").model
    save_weights(weights, other)
    try:
        with pytest.raises(RlsearchError, match="the weights or the data have changed since"):
            export_trial(read_run(folder), 0, tmp_path / "out")
    finally:
        weights.write_bytes(before)
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_and_incomplete_trials(run: tuple[Path, Trial], tmp_path: Path, make_record: Any) -> None:
    folder, _ = run
    (tmp_path / "space.yaml").write_bytes((folder / "space.yaml").read_bytes())
    records = list(read_run(folder).records)
    write_trials(
        tmp_path / "trials.parquet", [*records, make_record(1, state="FAIL", reason="diverged", accuracy=None)]
    )
    with pytest.raises(ModelError, match="there are no weights here"):
        export_trial(read_run(tmp_path), 0, tmp_path / "out")
    with pytest.raises(UserError, match="trial 1 is FAIL"):
        export_trial(read_run(tmp_path), 1, tmp_path / "out")
    with pytest.raises(UserError, match="no trial 7"):
        export_trial(read_run(tmp_path), 7, tmp_path / "out")


def test_damaged_versions_are_named(run: tuple[Path, Trial], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    (folder / "versions.json").write_text('{"history": [{"event"')
    with pytest.raises(RunFolderError, match=r"versions\.json: is damaged .* delete it, or restore it from a copy"):
        export_trial(read_run(folder), 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_code_runs_only_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    trained_run(tmp_path / "run", ModelSpec("my_models:small"), Policy())
    sys.modules.pop("my_models")
    with pytest.raises(ModelError, match="--model my_models:small"):
        export_trial(read_run(tmp_path / "run"), 0, tmp_path / "out")
    assert "my_models" not in sys.modules
    report = export_trial(read_run(tmp_path / "run"), 0, tmp_path / "out", model="my_models:small")
    assert report.validation_accuracy == report.recorded_accuracy
    with pytest.raises(ModelError, match="but the model of"):
        export_trial(read_run(tmp_path / "run"), 0, tmp_path / "other", model="my_models:large")
