"""What the learning part is fed with: fixed views, decided once, and a way back to the images when storing fails."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlsearch.learn_drop import Dropper, FeatureCache, feature_store, feature_times
from rlsearch.policy import LearnDrop
from rlsearch.training.data import ImageData, ImageSplit
from rlsearch.training.device_data import DeviceData
from rlsearch.training.feature_inputs import CacheWork, TrainingInputs
from rlsearch.training.feature_views import Views
from rlsearch.training.models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
COUNT, BATCH, SIDE = 20, 8, 8


def image_data(flip: bool = True, crop: int = 4, seed: int = 0) -> ImageData:
    source = np.random.default_rng(seed)
    split_ = ImageSplit(source.integers(0, 256, (COUNT, 3, SIDE, SIDE), np.uint8), source.integers(0, 10, COUNT))
    return ImageData(split_, split_, 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, flip, crop, "made up")


class Tokens(nn.Module):
    """Maps (B, C, H, W) to tokens (B, H * W, C)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).transpose(1, 2)


class Head(nn.Linear):
    """The mean over all positions, to logits."""

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean((2, 3)) if features.ndim == 4 else features.mean(1)
        return super().forward(mean)


def maps() -> nn.Sequential:
    """Cuts after a map of 4 x 8 x 8, of 4 x 4 x 4 and of 8 x 4 x 4."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, 1, 1)),
        Head(8, 10),
    )


def tokens() -> nn.Sequential:
    """Cuts after a map of 4 x 4 x 4, and after 16 tokens of 4 and of 6."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.Sequential(Tokens(), nn.Linear(4, 4)), nn.Linear(4, 6), nn.Linear(6, 6), Head(6, 10)
    )


class Setup:
    """A model in training whose cut the test decides."""

    def __init__(
        self,
        features: str = "stored",
        model: Callable[[], nn.Sequential] = maps,
        data: ImageData | None = None,
        precision: str = "fp32",
        weights: int = 0,
        **options: Any,
    ) -> None:
        torch.manual_seed(weights)
        self.model = model()
        self.data = DeviceData(data or image_data(), CPU)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        units = [str(index) for index in range(len(self.model))]
        self.dropper = Dropper(self.model, optimizer, 9, LearnDrop(features=features), units=units)
        self.inputs = TrainingInputs(self.data, self.model, self.dropper, BATCH, 0, precision, **options)

    def cut_to(self, cut: int, remaining: int | None = None) -> CacheWork | None:
        self.dropper.load_state_dict(self.dropper.state_dict() | {"cut": cut})
        return self.inputs.follow_cut(remaining)

    @property
    def cache(self) -> FeatureCache:
        assert self.inputs.cache is not None
        return self.inputs.cache

    def features(self) -> Tensor:
        """(V, COUNT, *shape)."""
        images = torch.arange(COUNT)
        number = self.cache.form.num_views
        return torch.stack([self.cache.batch(images, torch.full((COUNT,), view)) for view in range(number)])

    def epoch(self, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
        return list(self.inputs.batches(epoch))


def same_batches(ours: Setup, theirs: Setup) -> bool:
    pairs = zip(ours.epoch(3), theirs.epoch(3), strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("tier", ["device", "file"])
@torch.no_grad()
def test_logits_of_a_resnet_are_the_recomputed_ones(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if tier == "file":
        monkeypatch.setattr(feature_store, "available_bytes", lambda device: 0)
    torch.manual_seed(0)
    model = build_model("resnet20").to(memory_format=torch.channels_last)
    data = DeviceData(image_data(), CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in model.named_modules() if name.startswith("layer") and name.count(".") == 1]
    dropper = Dropper(model, optimizer, 9, LearnDrop(features="stored"), units=names)
    inputs = TrainingInputs(data, model, dropper, BATCH, 0, "fp32", scratch=tmp_path)
    model.train()
    model(data.view(torch.arange(COUNT)))  # moves the batch norms' statistics off their start
    for cut in (2, 5, 9):
        dropper.load_state_dict(dropper.state_dict() | {"cut": cut})
        inputs.follow_cut()
        assert inputs.cache is not None
        assert inputs.cache.store.tier == tier
        model.eval()
        for view in range(2):
            indices = torch.randperm(COUNT)
            logits = dropper.suffix(inputs.cache.batch(indices, torch.full_like(indices, view)))
            expected = model(data.view(indices, flipped=view == 1))
            assert (logits - expected).abs().max() <= 1e-5


def test_an_image_has_the_same_feature_every_time() -> None:
    for model in (maps, tokens):
        first, second = Setup(model=model), Setup(model=model)
        first.cut_to(2)
        torch.rand(7)  # torch's own random state decides nothing
        second.cut_to(2)
        assert torch.equal(first.features(), second.features())
        assert same_batches(first, second)


@pytest.mark.parametrize("model", [maps, tokens])
def test_a_resume_has_the_features_of_a_cache_that_moved(model: Callable[[], nn.Sequential]) -> None:
    straight = Setup(model=model)
    assert straight.cut_to(1) == CacheWork(2 * COUNT, 0, 1)
    straight.cut_to(2)
    work = straight.cut_to(3)
    resumed = Setup(model=model)
    resumed.inputs.load_state_dict(straight.inputs.state_dict())
    resumed.cut_to(3)
    assert torch.equal(straight.features(), resumed.features())
    assert same_batches(straight, resumed)
    assert work == CacheWork(straight.cache.form.num_views * COUNT, 2, 3)
    assert straight.inputs.follow_cut() is None, "the cut has not moved"


@torch.no_grad()
def test_maps_are_stored_plain_and_mirrored_and_shifted_when_read() -> None:
    setup = Setup()
    setup.cut_to(1)
    assert setup.cache.form.num_views == 2
    order = [indices.tolist() for indices in setup.data.epoch_order(BATCH, 5, 0)]
    setup.dropper.train_mode()
    for (features, labels), indices in zip(setup.epoch(5), order, strict=True):
        assert labels.tolist() == setup.data.labels[indices].tolist()
        for feature, index in zip(features, indices, strict=True):
            mirrored = (index + 5) % 2 == 1
            whole = setup.dropper.prefix(setup.data.view(torch.tensor([index]), flipped=mirrored))
            padded = nn.functional.pad(whole, (4, 4, 4, 4))[0]
            windows = [padded[:, row : row + 8, column : column + 8] for row in range(9) for column in range(9)]
            assert any(torch.allclose(feature, window, atol=1e-6) for window in windows)
    moved = [torch.stack([batch[0][0] for batch in setup.epoch(epoch)]) for epoch in (1, 3)]
    assert not torch.equal(*moved)


def test_views_by_the_form_of_the_features() -> None:
    both, neither = DeviceData(image_data(), CPU), DeviceData(image_data(flip=False, crop=0), CPU)
    flip, crop = DeviceData(image_data(crop=0), CPU), DeviceData(image_data(flip=False), CPU)
    assert Views.of(both, (16, 4, 4)) == Views(2, 2, cropped=False)
    assert Views.of(crop, (16, 2, 2)) == Views(1, 1, cropped=False)
    assert Views.of(neither, (16, 4, 4)) == Views(1, 0, cropped=False)
    for shape in ((16, 24), (24,), (4, 4, 24), (2, 2, 6)):
        assert Views.of(both, shape) == Views(4, 0, cropped=True), "tokens, and maps with the channels last"
        assert Views.of(flip, shape) == Views(2, 0, cropped=False)
        assert Views.of(neither, shape) == Views(1, 0, cropped=False)


@pytest.mark.parametrize("flip", [True, False])
@torch.no_grad()
def test_tokens_are_stored_in_fixed_crops(flip: bool) -> None:
    data = image_data(flip=flip)
    setup = Setup(model=tokens, data=data)
    setup.cut_to(1)
    assert setup.cache.form.num_views == (2 if flip else 1)
    assert setup.cut_to(3) == CacheWork(4 * COUNT, 0, 3), "other views than those of the maps: from the images"
    features = setup.features()
    offsets = [setup.data.view_offsets(view, 0) for view in range(4)]
    assert offsets[0] is None
    assert len({tuple(offset.flatten().tolist()) for offset in offsets if offset is not None}) == 3
    images = torch.nn.functional.pad(torch.from_numpy(data.train.images), (4, 4, 4, 4))
    for view, offset in enumerate(offsets):
        for index in range(COUNT):
            row, column = (4, 4) if offset is None else offset[:, index].tolist()
            image = images[index : index + 1, :, row : row + SIDE, column : column + SIDE]
            pixels = (image / 255 - 0.5) / 0.25
            expected = setup.dropper.prefix(pixels.flip(3) if flip and view % 2 else pixels)[0]
            assert torch.allclose(features[view, index], expected, atol=1e-5)
    order = torch.cat(list(setup.data.epoch_order(BATCH, 6, 0)))
    read = torch.cat([batch for batch, _ in setup.epoch(6)])
    assert torch.equal(read, features[(order + 6) % 4, order]), "nothing else is done to them"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_features_have_the_type_that_training_gives_them(precision: str, dtype: torch.dtype) -> None:
    setup = Setup(precision=precision)
    setup.cut_to(2)
    assert setup.cache.form.dtype == dtype
    assert all(features.dtype == dtype for features, _ in setup.epoch())


def test_a_file_serves_where_memory_is_short(tmp_path: Path, no_memory: None) -> None:
    setup, memory = Setup(scratch=tmp_path, run="one"), Setup()
    setup.cut_to(1)
    assert setup.cache.store.tier == "file"
    assert len(list(tmp_path.iterdir())) == 1
    setup.cut_to(3)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_store, "available_bytes", lambda device: 1 << 30)
        memory.cut_to(3)
    assert memory.cache.store.tier == "device"
    assert memory.inputs.stored_bytes == memory.cache.form.num_bytes
    assert setup.inputs.stored_bytes == 0
    assert same_batches(setup, memory)
    setup.inputs.close()
    assert list(tmp_path.iterdir()) == []
    assert not setup.inputs.stored


def test_the_file_goes_with_the_training(tmp_path: Path, no_memory: None) -> None:
    setup = Setup(scratch=tmp_path)
    setup.cut_to(1)
    assert len(list(tmp_path.iterdir())) == 1
    del setup
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def recomputed(cut: int) -> Setup:
    setup = Setup("recompute")
    assert setup.cut_to(cut) is None
    return setup


def test_nothing_that_fits_means_recomputing(no_memory: None, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    assert setup.cut_to(2) is None
    assert (
        "stored features need 0.00 GB, and there is room for 0.00 GB (device): the dropped prefix runs" in caplog.text
    )
    assert not setup.inputs.stored
    assert same_batches(setup, recomputed(2))
    assert setup.inputs.state_dict() == {"cut": 2, "stored": False}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("made up"), MemoryError(), OSError(28, "No space left")])
@pytest.mark.parametrize("moving", [False, True])
def test_running_short_on_the_way_means_recomputing(
    tmp_path: Path,
    no_memory: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    moving: bool,
) -> None:
    setup = Setup(scratch=tmp_path)
    if moving:
        setup.cut_to(1)
    fails_at(monkeypatch, setup, 4, error)
    assert setup.cut_to(2) is None
    assert "could not be made" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert same_batches(setup, recomputed(2))
    monkeypatch.undo()
    logits = [setup.inputs.forward(inputs) for inputs, _ in setup.epoch()]
    assert len(logits) == 3
    assert setup.cut_to(3) is not None, "the next cut tries again"


def test_a_fault_of_the_model_is_not_hidden(tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(scratch=tmp_path)
    fails_at(monkeypatch, setup, 4, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        setup.cut_to(2)
    assert list(tmp_path.iterdir()) == []


def fails_at(monkeypatch: pytest.MonkeyPatch, setup: Setup, call: int, error: Exception) -> None:
    """The dropped prefix works as it does, up to one call."""
    calls: list[int] = []
    prefix = setup.dropper.prefix

    def failing(images: Tensor, start: int = 0) -> Tensor:
        calls.append(len(images))
        if len(calls) == call:
            raise error
        return prefix(images, start)

    monkeypatch.setattr(setup.dropper, "prefix", failing)


def test_a_disk_that_fills_up_means_recomputing(
    tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    setup = Setup(scratch=tmp_path)
    assert setup.cut_to(2) is None
    assert "found no room (file: [Errno 28] No space left on device): the dropped prefix runs" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert same_batches(setup, recomputed(2))


def leftover(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """The file of a killed process: what is left is the copy of a living one's."""
    setup = Setup(scratch=folder, run="one", **options)
    setup.cut_to(2)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    setup.inputs.close()
    file.write_bytes(content)
    return file


def test_a_resumed_run_takes_its_file(tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover(tmp_path, monkeypatch)
    setup = Setup(scratch=tmp_path, run="one")
    fails_at(monkeypatch, setup, 2, AssertionError("the first call shows the shape; more are not needed"))
    assert setup.cut_to(2) == CacheWork(2 * COUNT, 0, 2), "counted as in a training that was not killed"
    assert setup.inputs.stored
    fresh = Setup()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_store, "available_bytes", lambda device: 1 << 30)
        fresh.cut_to(2)
    assert torch.equal(setup.features(), fresh.features())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": 1}, "are of another weights"),
        ({"data": image_data(seed=1)}, "are of another data"),
        ({"precision": "bf16"}, "are of another form"),
        ({"data": replace(image_data(), crop=2)}, "are of another data, views"),
    ],
)
def test_a_file_of_something_else_is_built_again(
    tmp_path: Path,
    no_memory: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    said: str,
) -> None:
    leftover(tmp_path, monkeypatch, **options)
    setup = Setup(scratch=tmp_path, run="one")
    assert setup.cut_to(2) == CacheWork(2 * COUNT, 0, 2)
    assert f"{said}: they are built again" in caplog.text


def test_a_truncated_file_is_built_again(
    tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = leftover(tmp_path, monkeypatch)
    file.write_bytes(file.read_bytes()[:-1])
    setup = Setup(scratch=tmp_path, run="one")
    assert setup.cut_to(2) == CacheWork(2 * COUNT, 0, 2)
    assert "are truncated" in caplog.text


@pytest.mark.parametrize(("remaining", "stored"), [(3, True), (2, False)])
def test_auto_stores_what_pays_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, remaining: int, stored: bool
) -> None:
    caplog.set_level(logging.INFO)
    setup = Setup("auto")
    values = iter([1.0, 0.1, 0.1])
    monkeypatch.setattr(feature_times, "seconds", lambda work, device: (work(), next(values))[1])
    # Two views cost 2 * 1.1; each epoch saves 0.9: three are worth it, two are not.
    assert setup.cut_to(2, remaining) == (CacheWork(2 * COUNT, 0, 2) if stored else None)
    assert setup.inputs.stored is stored
    assert f"auto {'stores' if stored else 'recomputes'} them, {remaining} epochs left" in caplog.text
    state = setup.inputs.state_dict()
    assert state == {"cut": 2, "stored": stored}
    resumed = Setup("auto")
    resumed.inputs.load_state_dict(state)
    assert resumed.inputs.state_dict() == state
    monkeypatch.setattr(feature_times, "seconds", lambda work, device: pytest.fail("it has been decided"))
    resumed.cut_to(2, remaining)
    assert resumed.inputs.stored is stored
    assert same_batches(setup, resumed)


@pytest.mark.parametrize(("advance", "stored"), [(0.2, True), (0.9, False)])
def test_auto_counts_only_the_way_from_the_old_cut(
    monkeypatch: pytest.MonkeyPatch, advance: float, stored: bool
) -> None:
    setup, straight = Setup("auto"), Setup()
    setup.cut_to(1)
    straight.cut_to(2)
    values = iter([1.0, advance, 0.1, 0.1])
    monkeypatch.setattr(feature_times, "seconds", lambda work, device: (work(), next(values))[1])
    setup.cut_to(2, 2)  # 2 * 1.0 over 2 * (advance + 0.1) + 2 * 0.1
    assert setup.inputs.stored is stored
    if stored:
        assert torch.equal(setup.features(), straight.features()), "measuring has changed nothing"
    setup.cut_to(3, None)
    assert setup.inputs.stored, "the next cut is a decision of its own"


def test_auto_with_times_as_they_are() -> None:
    never, ever = Setup("auto"), Setup("auto", model=slow)
    never.cut_to(1, 0)
    assert not never.inputs.stored
    ever.cut_to(1, 10_000)
    assert ever.inputs.stored


def slow() -> nn.Sequential:
    """A prefix that costs far more than reading its outputs."""
    prefix = nn.Sequential(nn.Conv2d(3, 64, 7, padding=3), nn.Conv2d(64, 64, 7, padding=3), nn.Conv2d(64, 2, 8))
    return nn.Sequential(prefix, Head(2, 10))


def test_without_a_dropper_there_is_nothing_to_store() -> None:
    model = maps()
    data = DeviceData(image_data(), CPU)
    inputs = TrainingInputs(data, model, None, BATCH, 0, "fp32")
    assert inputs.follow_cut(5) is None
    images, _ = next(iter(inputs.batches(0)))
    assert torch.equal(inputs.forward(images), model(images))


def test_fingerprints_tell_data_apart() -> None:
    seen = {DeviceData(image_data(seed=seed, crop=crop), CPU).fingerprint() for seed in (0, 1) for crop in (0, 4)}
    assert len(seen) == 4
    assert DeviceData(image_data(), CPU).fingerprint() == DeviceData(image_data(), CPU).fingerprint()
