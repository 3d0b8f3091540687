"""The metrics of Learn&Drop: each against a count made by hand on the training as it really runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlsearch import DataSpec, LearnDrop, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec, build_model
from rlsearch.training import trial as trial_module
from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.loop import Pass
from rlsearch.training.peak_memory import PeakMemory
from rlsearch.training.storages import Storages, peak_bytes
from rlsearch.training.trial import Trial

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataSpec("digits", limit=100)
REPLACED = (Replacement("layer1.1", "scalar"), Replacement("layer2.2", "skip"))
EPOCHS = 5


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DATA)


def dropping(features: str, replaced: tuple[Replacement, ...] = (), **settings: Any) -> Policy:
    drop = LearnDrop(**{"score": "schedule", "warmup": 0.2, "max_fraction": 0.9, "features": features} | settings)
    return Policy(replacements=replaced, learn_drop=drop)


def made(digits: ImageData, policy: Policy, **training: Any) -> Trial:
    settings = TrainingSpec(**{"epochs": EPOCHS, "batch_size": 32, "lr": 0.05} | training)
    return Trial(TrialSpec(ModelSpec("resnet20"), DATA, settings, policy), data=digits, device="cpu")


def history(trial: Trial) -> list[dict[str, Any]]:
    """The metrics of what is left of a trial, without times."""
    rows = []
    while not trial.done:
        rows.append(trial.run_epoch().to_dict())
        del rows[-1]["train_seconds"], rows[-1]["samples_per_second"]
    return rows


def counted(function: Callable[..., Any], note: Callable[[int], None]) -> Callable[..., Any]:
    """``function``, with the operations of every call noted as torch's own counter finds them."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = function(*arguments, **keywords)
        note(counter.get_total_flops())
        return result

    return call


POLICIES = [
    Policy(),
    Policy(replacements=REPLACED),
    dropping("recompute"),
    dropping("stored"),
    dropping("stored", REPLACED),
    dropping("recompute", REPLACED),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_are_those_that_really_ran(
    digits: ImageData, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = made(digits, policy)
    forward: list[int] = []
    steps: list[int] = []
    building: list[int] = []
    plain = trial._step._plain
    monkeypatch.setattr(plain, "_forward", counted(plain._forward, forward.append))
    monkeypatch.setattr(trial_module, "train_epoch", counted(trial_module.train_epoch, steps.append))
    is_building = False
    if trial._dropper:
        prefix, follow_cut = trial._dropper.prefix, trial._inputs.follow_cut

        def follow(*arguments: Any) -> Any:
            nonlocal is_building
            is_building = True
            try:
                return follow_cut(*arguments)
            finally:
                is_building = False

        def run(images: Tensor, start: int = 0) -> Tensor:
            # A single image shows the features' shape, and is not counted.
            note = building.append if is_building and len(images) > 1 else lambda flops: None
            found: Tensor = counted(prefix, note)(images, start)
            return found

        monkeypatch.setattr(trial._dropper, "prefix", run)
        monkeypatch.setattr(trial._inputs, "follow_cut", follow)
    with FlopCounterMode(display=False) as counter:
        build_model("resnet20")(torch.zeros(2, 3, 8, 8))
    for epoch, row in enumerate(history(trial), start=1):
        assert row["epoch"] == epoch
    images = EPOCHS * len(digits.train.labels)
    untouched = counter.get_total_flops() / 2 * images
    assert bool(building) == (policy.learn_drop is not None and policy.learn_drop.features == "stored")
    assert row["forward_flops"] == pytest.approx(sum(forward) + sum(building), rel=1e-12)
    assert row["train_flops"] == pytest.approx(sum(steps) + sum(building), rel=1e-12)
    assert row["forward_share"] == pytest.approx((sum(forward) + sum(building)) / untouched, rel=1e-12)
    assert (row["forward_share"] < 0.99) == bool(building or policy.replacements)


def test_learnable_parameters_are_averaged_over_the_images(digits: ImageData) -> None:
    trial = made(digits, dropping("recompute", REPLACED))
    sizes = []
    while not trial.done:
        sizes.append(sum(p.numel() for p in set(trial.model.parameters()) if p.requires_grad))
        metrics = trial.run_epoch()
        assert metrics.mean_learnable_params == pytest.approx(sum(sizes) / len(sizes), rel=1e-12)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == metrics.params
    assert sizes[-1] == metrics.learnable_params < sizes[1] < sizes[0]


def test_the_layers_that_learn_and_leave_are_named(digits: ImageData) -> None:
    trial = made(digits, dropping("recompute"))
    layers = ["stem", *(f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(3)), "head"]
    cuts = [0]
    while not trial.done:
        row = trial.run_epoch().to_dict()
        frozen = [
            name
            for name, module in zip(layers, trial._dropper._segments, strict=True)  # type: ignore[union-attr]
            if not any(parameter.requires_grad for parameter in module.module.parameters())
        ]
        # Named only where they are others than before: a long training would repeat them in every row.
        assert row["learning"] == (layers[len(frozen) :] if len(cuts) == 1 or len(frozen) > cuts[-1] else [])
        assert [*layers[: cuts[-1]], *row["left"]] == frozen
        assert row["dropped_units"] == sum("." in name for name in frozen)
        cuts.append(len(frozen))
    assert len(set(cuts)) > 3


def test_without_learn_drop_nothing_is_saved(digits: ImageData) -> None:
    (row,) = history(made(digits, Policy(), epochs=1))
    assert (row["learning"], row["left"]) == ([], [])
    assert row["forward_share"] == 1
    assert row["mean_learnable_params"] == row["learnable_params"] == row["params"] == 272_474
    assert row["step_memory"] == row["memory"] == row["memory_predicted"]


class Peaks:
    """What each epoch's second step holds at once, from its forward pass to its optimizer's step, read off all storages
    but those of the images."""

    def __init__(self, log: Storages, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
        self._log = log
        self._images = {log.number(item) for item in vars(trial._data).values() if isinstance(item, Tensor)}
        self._trial = trial
        self._train_epoch = trial_module.train_epoch
        self.num_bytes: list[int] = []
        monkeypatch.setattr(trial_module, "train_epoch", self._run)

    def _run(self, step: Any, batches: Any, optimizer: torch.optim.Optimizer, *rest: Any) -> Pass:
        starts: list[int] = []
        ends: list[int] = []

        def marked(inputs: Tensor) -> Tensor:
            starts.append(len(self._log.events))
            logits: Tensor = forward(inputs)
            return logits

        plain = self._trial._step._plain
        forward, plain._forward = plain._forward, marked
        hook = optimizer.register_step_post_hook(lambda *_: ends.append(len(self._log.events)))
        result = self._train_epoch(step, batches, optimizer, *rest)
        hook.remove()
        plain._forward = forward
        events = [(number, size) for number, size in self._log.events[: ends[1]] if number not in self._images]
        skipped = ends[1] - len(events)
        start = starts[1] - skipped
        self.num_bytes.append(peak_bytes(events[start:], sum(size for _, size in events[:start])))
        return result


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_memory_of_a_step_is_what_it_holds(
    digits: ImageData, policy: Policy, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(digits, policy, optimizer=optimizer, lr=0.01)  # what predicts is kept, and should not be noted
    with Storages() as log:
        trial = made(digits, policy, optimizer=optimizer, lr=0.01)
        peaks = Peaks(log, trial, monkeypatch)
        rows = history(trial)
    # Beside the step lie the order of the images and where they are cropped, a batch of them in the frame that they are
    # cropped from, stored features as they were before that, and, until the next collection of garbage, modules with
    # which a cut was costed.
    frame = 32 * digits.train.images.shape[1] * (8 + 2 * digits.crop) ** 2
    beside = frame + (12_000 if policy.learn_drop is None else 200_000)
    assert [row["step_memory"] for row in rows] == pytest.approx(peaks.num_bytes, abs=beside)
    assert all(row["memory"] == rows[0]["step_memory"] == row["memory_predicted"] for row in rows)
    if policy.learn_drop is not None and policy.learn_drop.features == "recompute":
        assert rows[-1]["step_memory"] < 0.8 * rows[0]["step_memory"]


@pytest.mark.parametrize("policy", [dropping("stored", REPLACED), dropping("recompute")])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_trial_reports_the_same(digits: ImageData, tmp_path: Path, policy: Policy, stop: int) -> None:
    straight = history(made(digits, policy))
    first = made(digits, policy)
    for _ in range(stop):
        first.run_epoch()
    save_checkpoint(tmp_path / "last.pt", first.state_dict())
    second = made(digits, policy)
    second.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    assert history(second) == straight[stop:]


def test_on_cuda_each_epoch_has_a_peak_of_its_own(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: torch's counters are stood in for, and the steps do nothing."""
    trial = made(digits, dropping("recompute"), batch_size=20)
    peaks = iter([9_000_000, 7_000_000, 5_000_000])
    events: list[object] = []

    def steps(step: Any, batches: Any, *rest: Any) -> Pass:
        for number, _ in enumerate(batches):
            events.append(number)
        return Pass(1.0, len(digits.train.labels))

    monkeypatch.setattr(trial_module, "train_epoch", steps)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    trial.device = torch.device("cuda")
    trial._peak = PeakMemory(trial.device, trial._data.num_bytes)
    assert [trial._train().step_memory for _ in range(3)] == [
        peak - trial._data.num_bytes for peak in (9_000_000, 7_000_000, 5_000_000)
    ]
    assert trial._spending.sums.memory == 9_000_000 - trial._data.num_bytes
    assert events == ["wait", "reset", 0, 1, 2, "reset", 3, 4, "wait"] * 3
