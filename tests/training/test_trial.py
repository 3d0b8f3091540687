"""A trial: real trainings on the digits, straight and interrupted, with blocks and with layers that leave."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlsearch
from rlsearch import DataSpec, EpochMetrics, LearnDrop, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec
from rlsearch.errors import ConfigError, DivergedError, SurgeryError, UserError
from rlsearch.learn_drop import feature_store
from rlsearch.replacement import learnable_params, materialize
from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.trial import Trial, run_trial

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataSpec("digits", limit=400)
REPLACED = (Replacement("layer1.1", "scalar"), Replacement("layer2.2", "skip"))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DATA)


def spec(policy: Policy | None = None, seed: int = 0, **training: Any) -> TrialSpec:
    # Without a warm-up of the rate the first epoch moves the layers most: they have settled soon after.
    settings = TrainingSpec(**{"epochs": 4, "batch_size": 32, "lr": 0.05, "warmup_epochs": 0.0} | training)
    return TrialSpec(ModelSpec("resnet20"), DATA, settings, policy or Policy(), seed)


def drop(features: str = "recompute", **settings: Any) -> LearnDrop:
    return LearnDrop(**{"threshold": 0.9, "patience": 1, "warmup": 0.0, "features": features} | settings)


def without_times(metrics: EpochMetrics) -> dict[str, Any]:
    return {k: v for k, v in metrics.to_dict().items() if k not in ("train_seconds", "samples_per_second")}


def test_a_trial_learns_and_reports(digits: ImageData) -> None:
    history = list(run_trial(spec(epochs=6), data=digits, device="cpu"))
    assert [item.epoch for item in history] == [1, 2, 3, 4, 5, 6]
    last = history[-1]
    assert last.accuracy > 0.7
    assert last.train_loss < 0.5 * history[0].train_loss
    images = 6 * len(digits.train.labels)
    cost = rlsearch.estimate_cost(rlsearch.build_model("resnet20"), Policy(), (3, 8, 8), 32)
    assert last.params == last.params_total == last.learnable_params == cost.params == 272_474
    assert last.memory == last.memory_predicted == cost.memory
    assert last.train_flops == pytest.approx(cost.step_flops * images)
    assert last.forward_flops == pytest.approx(cost.forward_flops * images)
    assert last.samples_per_second == pytest.approx(images / last.train_seconds)
    assert (last.dropped_units, last.device) == (0, "cpu")
    assert last.lr < history[1].lr


def test_the_same_seed_gives_the_same_numbers(digits: ImageData) -> None:
    def run(seed: int) -> list[dict[str, Any]]:
        return [without_times(item) for item in run_trial(spec(seed=seed, epochs=2), data=digits, device="cpu")]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_replaced_units_train_and_materialize(digits: ImageData) -> None:
    trial = Trial(spec(Policy(replacements=REPLACED), epochs=2), data=digits, device="cpu")
    before = [parameter.detach().clone() for parameter in trial.model.parameters()]
    while not trial.done:
        metrics = trial.run_epoch()
    assert all(not torch.equal(a, b) for a, b in zip(before, trial.model.parameters(), strict=True))
    assert metrics.params == learnable_params(trial.model) < 272_474
    assert metrics.params_total == sum(p.numel() for p in materialize(trial.model).parameters())
    images = torch.randn(4, 3, 8, 8)
    plain = materialize(trial.model).eval()
    assert torch.allclose(plain(images), trial.model.eval()(images), atol=1e-5)


@pytest.mark.parametrize("features", ["recompute", "stored"])
def test_dropped_layers_stand_still_and_cost_less(digits: ImageData, features: str) -> None:
    trial = Trial(spec(Policy(learn_drop=drop(features)), epochs=6), data=digits, device="cpu")
    cuts, frozen = [], {}
    while not trial.done:
        metrics = trial.run_epoch()
        cuts.append(metrics.dropped_units)
        for name, tensor in frozen.items():
            assert torch.equal(tensor, trial.model.state_dict()[name]), name
        active = {id(p) for p in trial.model.parameters() if p.requires_grad}
        frozen = {
            name: parameter.detach().clone()
            for name, parameter in trial.model.named_parameters()
            if id(parameter) not in active
        }
    assert cuts == sorted(cuts)
    assert 0 < cuts[1] <= cuts[-1]
    assert metrics.learnable_params < metrics.params == 272_474
    full = rlsearch.estimate_cost(rlsearch.build_model("resnet20"), Policy(), (3, 8, 8), 32)
    images = len(digits.train.labels) * 6
    assert metrics.train_flops < 0.9 * full.step_flops * images
    if features == "recompute":
        assert metrics.forward_flops == pytest.approx(full.forward_flops * images)
    else:
        assert metrics.forward_flops < 0.9 * full.forward_flops * images


def test_a_unit_leaves_with_all_that_its_parts_borrow_from(digits: ImageData) -> None:
    policy = Policy(
        replacements=(
            Replacement("layer1.1.conv1", "scalar", {"sources": "nearest"}),
            Replacement("layer1.2.conv1", "scalar", {"sources": "nearest"}),
            Replacement("layer1.1.conv2", "scalar"),
            Replacement("layer2.2", "skip"),
        ),
        learn_drop=drop(max_fraction=1.0),
    )
    trial = Trial(replace(spec(policy), model=ModelSpec("resnet32")), data=digits, device="cpu")
    dropper = trial._dropper
    assert dropper is not None
    assert {unit: set(sources) for unit, sources in dropper._sources.items()} == {
        "layer1.1": {"layer1.0", "layer1.2", "layer1.3"},
        "layer1.2": {"layer1.0", "layer1.3"},
        "layer2.2": set(),
    }
    # The stem and the first three units have settled; layer1.1 and layer1.2 wait for layer1.3.
    dropper._score = lambda: None  # type: ignore[method-assign]
    dropper._settled_for = [1, 1, 1, 1, *[0] * 12]
    assert dropper.end_epoch()
    assert dropper.cut == 2
    dropper._settled_for = [1, 1, 1, 1, 1, *[0] * 11]
    assert dropper.end_epoch()
    assert (dropper.cut, dropper.dropped_units) == (5, 4)


def test_stored_features_are_the_recomputed_ones(digits: ImageData) -> None:
    trial = Trial(spec(Policy(learn_drop=drop("stored"))), data=digits, device="cpu")
    while not trial._inputs.stored:
        trial.run_epoch()
    trial.model.eval()
    indices = torch.arange(len(digits.train.labels))
    views = torch.zeros_like(indices)
    cache = trial._inputs._cache
    assert cache is not None
    with torch.no_grad():
        logits = trial._dropper.suffix(cache.batch(indices, views))  # type: ignore[union-attr]
        assert torch.allclose(logits, trial.model(trial._data.view(indices)), atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(replacements=REPLACED, learn_drop=drop()),
        Policy(learn_drop=drop("stored")),
        Policy(learn_drop=drop("stored", interval=2, max_fraction=0.5)),
    ],
)
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_trial_gives_the_same_numbers(
    digits: ImageData, tmp_path: Path, policy: Policy, stop: int
) -> None:
    straight = list(run_trial(spec(policy), data=digits, device="cpu"))
    checkpoint = tmp_path / "last.pt"
    first = []
    for item in run_trial(spec(policy), data=digits, device="cpu", checkpoint=checkpoint):
        first.append(item)
        if len(first) == stop:
            break
    rest = list(run_trial(spec(policy), data=digits, device="cpu", checkpoint=checkpoint))
    assert [without_times(item) for item in first + rest] == [without_times(item) for item in straight]
    assert list(run_trial(spec(policy), data=digits, device="cpu", checkpoint=checkpoint)) == []


def test_resuming_gives_the_same_weights(digits: ImageData, tmp_path: Path) -> None:
    policy = Policy(replacements=REPLACED, learn_drop=drop("stored"))
    straight = Trial(spec(policy), data=digits, device="cpu")
    while not straight.done:
        straight.run_epoch()
    first = Trial(spec(policy), data=digits, device="cpu")
    first.run_epoch()
    first.run_epoch()
    save_checkpoint(tmp_path / "last.pt", first.state_dict())
    resumed = Trial(spec(policy), data=digits, device="cpu")
    resumed.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    while not resumed.done:
        resumed.run_epoch()
    for (name, a), b in zip(straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_stored_features_give_way_when_memory_is_short(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(feature_store, "available_disk_bytes", lambda folder: 1000)
    short = list(run_trial(spec(Policy(learn_drop=drop("stored"))), data=digits, device="cpu"))
    assert "stored features need" in caplog.text
    recomputed = list(run_trial(spec(Policy(learn_drop=drop("recompute"))), data=digits, device="cpu"))
    assert [item.accuracy for item in short] == [item.accuracy for item in recomputed]


def test_features_that_fit_no_memory_are_stored_in_a_file_for_as_long_as_they_are_used(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_memory = list(run_trial(spec(Policy(learn_drop=drop("stored"))), data=digits, device="cpu"))
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 1000)
    trial = Trial(spec(Policy(learn_drop=drop("stored"))), data=digits, device="cpu", scratch=tmp_path)
    files: list[int] = []
    accuracies = []
    while not trial.done:
        accuracies.append(trial.run_epoch().accuracy)
        files.append(len(list(tmp_path.rglob("*"))))
    assert max(files) > 0
    assert files[-1] == 0
    assert accuracies == [item.accuracy for item in in_memory]


def test_auto_decides_once_and_a_resume_keeps_to_it(digits: ImageData, tmp_path: Path) -> None:
    first = Trial(spec(Policy(learn_drop=drop("auto"))), data=digits, device="cpu")
    while first.state_dict()["dropper"]["cut"] == 0:
        first.run_epoch()
    save_checkpoint(tmp_path / "last.pt", first.state_dict())
    resumed = Trial(spec(Policy(learn_drop=drop("auto"))), data=digits, device="cpu")
    resumed.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    assert resumed.state_dict()["inputs"] == first.state_dict()["inputs"]
    cut, compared = first.state_dict()["dropper"]["cut"], 0
    # A further cut is decided about anew, in each of the two by times of its own.
    while not first.done and first.state_dict()["dropper"]["cut"] == cut:
        assert first.run_epoch().accuracy == resumed.run_epoch().accuracy
        compared += 1
    assert compared


def test_a_checkpoint_of_another_training_is_refused(digits: ImageData) -> None:
    state = Trial(spec(), data=digits, device="cpu").state_dict()
    other = Trial(spec(Policy(learn_drop=drop()), seed=1), data=digits, device="cpu")
    with pytest.raises(UserError, match="with another policy, seed"):
        other.load_state_dict(state)
    other = Trial(spec(lr=0.01), data=digits, device="cpu")
    with pytest.raises(UserError, match="with another training;"):
        other.load_state_dict(state)


def test_a_diverging_trial_says_so(digits: ImageData) -> None:
    with pytest.raises(DivergedError, match="became"):
        list(run_trial(spec(lr=1e30, warmup_epochs=0.0), data=digits, device="cpu"))


def test_wrong_input_is_refused_before_training(digits: ImageData) -> None:
    wrong = TrialSpec(ModelSpec("resnet20", num_classes=7), DATA)
    with pytest.raises(ConfigError, match="10 classes"):
        next(run_trial(wrong, data=digits))
    with pytest.raises(SurgeryError, match=r"layer9\.0"):
        next(run_trial(spec(Policy(replacements=(Replacement("layer9.0", "skip"),))), data=digits))


def test_mixed_precision_trains_as_well(digits: ImageData) -> None:
    history = list(run_trial(spec(precision="bf16", epochs=6), data=digits, device="cpu"))
    assert math.isfinite(history[-1].train_loss)
    assert history[-1].accuracy > 0.6
    assert np.isclose(history[-1].train_flops, list(run_trial(spec(epochs=6), data=digits))[-1].train_flops)


def test_a_trial_goes_with_its_last_reference() -> None:
    """A process that trains many has no room for two at once: the collector of cycles may come late."""
    spec = TrialSpec(ModelSpec("resnet20"), DataSpec("digits", limit=60), TrainingSpec(epochs=1, batch_size=32))
    dropping = replace(spec, policy=Policy(learn_drop=LearnDrop("schedule", warmup=0.0, features="stored")))
    gc.collect()
    gc.disable()
    try:
        for what in (spec, dropping):
            trial = Trial(what, device="cpu")
            trial.run_epoch()
            gone = weakref.ref(trial), weakref.ref(trial.model)
            del trial
            assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
