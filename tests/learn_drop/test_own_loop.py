"""A loop of one's own over `Dropper.batches`: what is read is what would be recomputed, and no loop is disturbed."""

from __future__ import annotations

import gc
import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from rlsearch import Dropper, LearnDrop
from rlsearch.errors import ConfigError, DataError
from rlsearch.learn_drop import feature_store, feature_times

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, BATCH = 22, 4
EPOCHS = 40


class Net(nn.Module):
    """A stem, four like blocks with batch norm, and a head: five layers that may leave."""

    def __init__(self, classes: int = 2, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(self._block(width) for _ in range(4)))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        # The first thing that a block does to its input is to write to it.
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))


class Passes(Dataset[tuple[Tensor, Tensor]]):
    """Images whose target is their number, and whose augmentation is the number of the pass: they are scaled by it."""

    def __init__(self, count: int = COUNT) -> None:
        self.images = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        self.number = 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] * self.number, torch.tensor(index)

    def of(self, numbers: Tensor, number: int | None = None) -> Tensor:
        """The images of these numbers in one pass."""
        return self.images[numbers] * (self.number if number is None else number)


class Loop:
    """A user's loop, whose cut the test decides.

    Attributes:
        change: what the loop does to inputs before the dropper has them.
        calls: how many times it calls the dropper with each batch.
        precision: bf16 autocasts.
    """

    def __init__(self, features: str = "stored", epochs: int = EPOCHS, **options: Any) -> None:
        torch.manual_seed(0)
        self.data = Passes()
        self.loader: Any = DataLoader(self.data, BATCH, shuffle=True)
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        settings = LearnDrop(threshold=1e-9, features=features)
        self.dropper = Dropper(self.net, self.optimizer, epochs, settings, example_input=self.data.images[:2])
        self.options = options
        self.change: Callable[[Tensor], Tensor] = lambda inputs: inputs
        self.calls = 1
        self.precision = "fp32"

    def cut_to(self, cut: int) -> None:
        self.dropper._drop(cut)

    def autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.autocast():
            for _ in range(self.calls):
                logits = self.dropper(inputs)
            loss = F.cross_entropy(logits.float(), targets % 2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return logits.detach()

    def epoch(self, number: int = 1, stop: int = 1_000) -> list[tuple[Tensor, Tensor]]:
        """What the epoch's steps were given; ``stop`` leaves the pass after so many."""
        self.data.number = number
        self.dropper.train_mode()
        seen = []
        for inputs, targets in self.dropper.batches(self.loader, **self.options):
            seen.append((inputs.clone(), targets.clone()))
            self.step(self.change(inputs), targets)
            if len(seen) == stop:
                break
        self.dropper.end_epoch()
        return seen

    def weights(self) -> Tensor:
        return torch.cat([tensor.flatten().float() for tensor in self.net.state_dict().values()])


def targets_of(seen: list[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.cat([targets for _, targets in seen]).tolist()


def recorded(cut: int = 2, **options: Any) -> Loop:
    """A loop whose features are recorded: of pass 1 and of pass 2."""
    loop = Loop(**options)
    loop.epoch()
    loop.cut_to(cut)
    loop.epoch(1)
    loop.epoch(2)
    assert loop.dropper.features_in is not None
    return loop


def check_features(loop: Loop, seen: list[tuple[Tensor, Tensor]], number: int) -> None:
    """That what was read is what the prefix gives for the images of these targets, in one view."""
    loop.dropper.train_mode()
    for inputs, targets in seen:
        with loop.autocast():
            expected = loop.dropper.prefix(loop.data.of(targets, number))
        assert inputs.dtype == expected.dtype
        assert inputs.shape == expected.shape
        assert torch.allclose(inputs, expected, atol=1e-5 if inputs.dtype == torch.float32 else 2e-2)


def plain_weights(loop: Loop, epochs: int, cut_after: int = 1, cut: int = 2) -> Tensor:
    """The weights after the same training with ``recompute``, over the loader itself."""
    other = Loop("recompute")
    other.calls, other.change = loop.calls, loop.change
    for epoch in range(epochs):
        if epoch == cut_after:
            other.cut_to(cut)
        other.dropper.train_mode()
        for inputs, targets in loop.loader:
            other.step(other.change(inputs), targets)
        other.dropper.end_epoch()
    return other.weights()


# --- whole trainings ---------------------------------------------------------------------------------------------


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """The digits images, shifted at random by up to one pixel."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = torch.tensor(images, dtype=torch.float32).div_(16).sub_(0.3)[:, None].expand(-1, 3, -1, -1)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shifts = torch.randint(-1, 2, (2,)).tolist()
        return self.images[index].roll(shifts, (1, 2)), self.labels[index]


def accuracy(net: nn.Module, data: Digits) -> float:
    net.eval()
    with torch.no_grad():
        return (net(data.images).argmax(1) == data.labels).float().mean().item()


@pytest.mark.parametrize(
    ("features", "optimizer", "workers", "precision", "score"),
    [
        ("recompute", "sgd", 0, "fp32", "schedule"),
        ("stored", "sgd", 2, "fp32", "schedule"),
        ("stored", "adamw", 0, "bf16", "param_change"),
        ("auto", "adamw", 0, "fp32", "schedule"),
    ],
)
def test_a_loop_of_ones_own_converges_and_drops(
    features: str, optimizer: str, workers: int, precision: str, score: str
) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    train, test = (
        Digits(digits.images[:800], digits.target[:800]),
        Digits(digits.images[800:1300], digits.target[800:1300]),
    )
    loader = DataLoader(train, 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    epochs = 10
    net = Net(10, width=8)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    steps = kind(net.parameters(), lr=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        steps, max_lr=0.1 if optimizer == "sgd" else 0.01, total_steps=epochs * len(loader)
    )
    settings = LearnDrop(score, threshold=0.9, patience=1, interval=2, warmup=0.3, max_fraction=0.7, features=features)
    dropper = Dropper(net, steps, epochs, settings, example_input=train.images[:2])
    stored_epochs = 0
    for _ in range(epochs):
        dropper.train_mode()
        for inputs, targets in dropper.batches(loader):
            stored_epochs += inputs.shape[1] != 3
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(dropper(inputs).float(), targets)
            steps.zero_grad()
            loss.backward()
            steps.step()
            rates.step()
        dropper.end_epoch()
        accuracy(net, test)  # which leaves the model in eval mode
    assert dropper.cut > 0
    assert accuracy(net, test) > 0.8
    if features != "auto":
        assert (stored_epochs > 0) == (features == "stored")
    untouched = Net(10, width=8)
    untouched.load_state_dict(net.state_dict())
    assert accuracy(untouched, test) == accuracy(net, test)


# --- what is recorded is what would be recomputed ------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_recording_changes_nothing_in_training(workers: int) -> None:
    loop = Loop()
    loop.loader = DataLoader(loop.data, BATCH, shuffle=True, num_workers=workers)
    for epoch in range(3):
        if epoch == 1:
            loop.cut_to(2)
        assert all(inputs.shape[1] == 3 for inputs, _ in loop.epoch())
    expected = plain_weights(loop, 3)
    assert torch.equal(loop.weights(), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scratch", [False, True])
def test_features_are_the_prefixs_own_wherever_the_cut_is(
    precision: str, scratch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scratch:
        monkeypatch.setattr(feature_store, "available_bytes", lambda device: 0)
    loop = Loop(scratch=tmp_path if scratch else None)
    loop.precision = precision
    loop.epoch()
    for cut in (1, 3, 5):
        loop.cut_to(cut)
        if cut == 1:
            loop.epoch(1)
            loop.epoch(2)
            assert loop.dropper.features_in == ("file" if scratch else "device")
        loop.data.number = -1  # the images are not looked at any more
        for number in (1, 2, 1) if cut == 1 else (2, 1) if cut == 3 else (2,):
            seen = loop.epoch(number=-1)
            assert seen[0][0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
            check_features(loop, seen, number)


def test_logits_of_stored_features_are_the_recomputed_ones() -> None:
    loop = recorded()
    for cut in (2, 4):
        loop.cut_to(cut)
        loop.dropper.train_mode()
        for number, (inputs, targets) in zip(
            [1] * 6 if cut == 2 else [2] * 6, loop.dropper.batches(loop.loader), strict=True
        ):
            images = loop.data.of(targets, number)
            with torch.no_grad():
                assert torch.allclose(loop.dropper(inputs), loop.dropper(images), atol=1e-5)


def test_every_image_once_an_epoch_in_a_new_order_and_the_views_in_turn() -> None:
    loop = recorded()
    orders = []
    for number in (1, 2, 1, 2):
        seen = loop.epoch(-1)
        check_features(loop, seen, number)
        assert [len(targets) for _, targets in seen] == [4, 4, 4, 4, 4, 2]
        orders.append(targets_of(seen))
        assert sorted(orders[-1]) == list(range(COUNT))
    assert len({tuple(order) for order in orders}) == 4


def test_torchs_seed_governs_the_order() -> None:
    loop = recorded()
    orders = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        # The rows of views differ, so that the same view has to be read.
        orders.append(targets_of(loop.epoch()))
        loop.epoch()
    assert orders[0] == orders[1] != orders[2]


def test_more_views_and_one() -> None:
    for views in (1, 3):
        loop = Loop(views=views)
        loop.cut_to(2)
        for number in range(1, views + 1):
            assert loop.epoch(number)[0][0].shape[1] == 3
        for number in range(1, views + 1):
            check_features(loop, loop.epoch(-1), number)


def test_a_last_batch_of_one_is_left_out_of_larger_ones() -> None:
    loop = Loop()
    loop.data = Passes(9)
    loop.loader = DataLoader(loop.data, BATCH, shuffle=True)
    loop.cut_to(2)
    assert [len(targets) for _, targets in loop.epoch()] == [4, 4, 1]
    loop.epoch()
    assert [len(targets) for _, targets in loop.epoch()] == [4, 4]
    loop = Loop()
    loop.loader = DataLoader(loop.data, 1)
    loop.cut_to(2)
    assert [len(loop.epoch()) for _ in range(3)] == [COUNT] * 3


def test_a_loader_that_drops_its_last_batch() -> None:
    loop = Loop()
    loop.loader = DataLoader(loop.data, BATCH, shuffle=True, drop_last=True)
    loop.cut_to(2)
    first, second = (set(targets_of(loop.epoch(number))) for number in (1, 2))
    for number, numbers in ((1, first), (2, second)):
        seen = loop.epoch(-1)
        check_features(loop, seen, number)
        assert (set(targets_of(seen)), len(targets_of(seen))) == (numbers, 20)


def test_targets_may_have_any_shape_and_be_written_to() -> None:
    loop = Loop()
    soft = torch.rand(COUNT, 3, 2, 2)
    loop.loader = DataLoader(TensorDataset(loop.data.images, soft), BATCH, shuffle=True)
    loop.cut_to(2)
    for _ in range(3):
        loop.dropper.train_mode()
        rows = []
        for inputs, targets in loop.dropper.batches(loop.loader):
            rows.append(targets.clone())
            targets.zero_()
            loop.dropper(inputs)
        loop.dropper.end_epoch()
        got = torch.cat(rows).flatten(1)
        assert torch.equal(got[got[:, 0].argsort()], soft.flatten(1)[soft.flatten(1)[:, 0].argsort()])
    assert loop.dropper.features_in == "device"


def test_copies_of_inputs_in_another_layout_are_the_same_inputs() -> None:
    loop = Loop()
    loop.change = lambda inputs: inputs.clone(memory_format=torch.channels_last)
    loop.cut_to(2)
    loop.epoch(1)
    loop.epoch(2)
    check_features(loop, loop.epoch(-1), 1)


def test_a_prefix_that_writes_to_its_images() -> None:
    loop = Loop()
    loop.net.stem.register_forward_pre_hook(lambda _, inputs: inputs[0].mul_(0.5))
    loop.cut_to(2)
    loop.epoch(1)
    loop.epoch(2)
    check_features(loop, loop.epoch(-1), 1)


# --- when the cut moves --------------------------------------------------------------------------------------------


def test_a_cut_that_moves_between_two_recordings_keeps_what_is_recorded() -> None:
    loop = Loop()
    loop.cut_to(1)
    loop.epoch(1)
    loop.cut_to(3)
    assert loop.epoch(2)[0][0].shape[1] == 3
    for number in (1, 2):
        check_features(loop, loop.epoch(-1), number)


def test_a_cut_that_moves_within_a_pass_spoils_only_that(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.cut_to(1)
    loop.dropper.train_mode()
    for step, (inputs, targets) in enumerate(loop.dropper.batches(loop.loader)):
        loop.step(inputs, targets)
        if step == 2:
            loop.cut_to(2)
            loop.dropper.train_mode()
    loop.dropper.end_epoch()
    assert "the cut moved within it" in caplog.text
    for number in (1, 2):
        loop.epoch(number)
    seen = loop.epoch(-1)
    check_features(loop, seen, 1)
    assert sorted(targets_of(seen)) == list(range(COUNT))
    # Within a pass over stored features these go on through what is dropped then.
    loop.dropper.train_mode()
    for step, (inputs, targets) in enumerate(loop.dropper.batches(loop.loader)):
        with torch.no_grad():
            expected = loop.dropper.suffix(loop.dropper.prefix(loop.data.of(targets, 2)))
        assert torch.allclose(loop.step(inputs, targets), expected, atol=1e-5)
        if step == 2:
            loop.cut_to(4)
            loop.dropper.train_mode()
    loop.dropper.end_epoch()
    check_features(loop, loop.epoch(-1), 1)


def test_without_room_for_two_the_features_move_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = recorded()
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 0)
    loop.cut_to(3)
    check_features(loop, loop.epoch(-1), 1)
    assert loop.dropper.features_in == "device"


def test_too_few_epochs_left_are_not_recorded_for() -> None:
    loop = Loop(epochs=4)
    loop.epoch()
    loop.epoch()
    loop.cut_to(2)
    for _ in range(2):
        assert loop.epoch()[0][0].shape[1] == 3
    assert loop.dropper.features_in is None


# --- loops that cannot be recorded ---------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images with no end in sight."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Passes()
        return (data[index] for index in range(COUNT))


def test_a_loader_without_length(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop = Loop()
    loop.loader = DataLoader(Stream(), BATCH)
    with pytest.raises(DataError, match=r"no length .* give it, or its data set, a __len__, or choose LearnDrop\(fea"):
        loop.dropper.batches(loop.loader)
    for features in ("auto", "recompute"):
        loop = Loop(features)
        loop.loader = DataLoader(Stream(), BATCH)
        loop.cut_to(2)
        for _ in range(4):
            assert loop.epoch()[0][0].shape[1] == 3
    assert caplog.text.count("has no length") == 1


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"image": torch.zeros(2, 3, 6, 6)}, "got a dict"),
        ((torch.zeros(2, 3, 6, 6),), r"got a tuple of \(Tensor\)"),
        ((torch.zeros(2, 3, 6, 6), [0, 1]), r"got a tuple of \(Tensor, list\)"),
        ((torch.zeros(2, 3, 6, 6), torch.zeros(3)), r"\(2, 3, 6, 6\) and targets \(3,\) must have one row an image"),
        ((torch.zeros(2, 3, 6, 6), torch.zeros(())), "must have one row an image"),
    ],
)
@pytest.mark.parametrize("features", ["stored", "recompute"])
def test_batches_that_are_no_pairs_are_refused_at_once(batch: Any, said: str, features: str) -> None:
    loop = Loop(features)
    before = loop.weights()
    loop.loader = [batch]
    with pytest.raises(DataError, match=said):
        loop.epoch()
    assert torch.equal(loop.weights(), before)


def test_arguments_out_of_range(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(ConfigError, match=r"views: must be at least 1, got 0\n.*scratch: there is no folder .*none"):
        loop.dropper.batches(loop.loader, views=0, scratch=tmp_path / "none")
    with pytest.raises(ConfigError, match="views: must be a whole number"):
        loop.dropper.batches(loop.loader, views=1.5)  # type: ignore[arg-type]


def test_another_loader_in_the_same_epoch_is_refused() -> None:
    loop = Loop()
    other = DataLoader(loop.data, BATCH)
    loop.dropper.train_mode()
    for inputs, targets in loop.dropper.batches(loop.loader):
        loop.step(inputs, targets)
    with pytest.raises(DataError, match="another loader had its pass in this epoch"):
        loop.dropper.batches(other)
    loop.dropper.end_epoch()
    loop.loader = other  # a new one every epoch is fine
    loop.epoch()


def twice(loop: Loop) -> None:
    loop.calls = 2


def copied(loop: Loop) -> None:
    loop.change = lambda inputs: inputs * 0.5


def in_place(loop: Loop) -> None:
    loop.change = lambda inputs: inputs.mul_(0.5)


def of_another_type(loop: Loop) -> None:
    loop.change = lambda inputs: inputs.double().float() + 0.0 if len(inputs) == 2 else inputs.double().float() * 1.5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (twice, "was called 2 times with one batch"),
        (copied, "was not called with inputs as batches() gave them"),
        (in_place, "inputs were changed in place before dropper(inputs)"),
        (of_another_type, "was not called with inputs as batches() gave them"),
    ],
)
def test_what_cannot_be_recorded_trains_on_from_the_images(
    spoil: Callable[[Loop], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop()
    spoil(loop)
    for epoch in range(5):
        if epoch == 1:
            loop.cut_to(2)
        loop.epoch()
    assert said in caplog.text
    assert caplog.text.count("cannot be recorded") == 1, "it is said once"
    assert torch.equal(loop.weights(), plain_weights(loop, 5))


def test_a_batch_that_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.cut_to(2)
    for _ in range(3):
        loop.dropper.train_mode()
        for step, (inputs, targets) in enumerate(loop.dropper.batches(loop.loader)):
            assert inputs.shape[1] == 3
            if step != 3:
                loop.step(inputs, targets)
        loop.dropper.end_epoch()
    assert "dropper(inputs) was not called with every batch" in caplog.text


def test_steps_may_accumulate_and_look_at_other_images() -> None:
    loop = Loop()
    loop.cut_to(2)
    others = torch.randn(COUNT, 3, 6, 6)
    for _ in range(4):
        loop.dropper.train_mode()
        for step, (inputs, targets) in enumerate(loop.dropper.batches(loop.loader)):
            F.cross_entropy(loop.dropper(inputs), targets % 2).backward()
            if step % 2:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
            with torch.no_grad():
                expected = loop.dropper.suffix(loop.dropper.prefix(others))
                assert torch.equal(loop.dropper(others), expected)
        loop.dropper.end_epoch()
    assert loop.dropper.features_in == "device"


def test_a_pass_that_is_left_early_is_recorded_again(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.cut_to(2)
    assert len(loop.epoch(1, stop=3)) == 3
    assert "not recorded to its end (it was left early); the next pass is recorded instead" in caplog.text
    loop.epoch(2)
    held = loop.dropper.batches(loop.loader)  # left, but held
    loop.dropper.train_mode()
    loop.step(*next(held))
    loop.dropper.end_epoch()
    loop.change = lambda inputs: (held.close(), inputs)[1]  # it ends while the next is recorded
    loop.epoch(3)
    loop.change = lambda inputs: inputs
    assert caplog.text.count("left early") == 2
    loop.epoch(-1, stop=2)  # stored ones may be left at any time
    for number in (3, 2):
        seen = loop.epoch(-1)
        check_features(loop, seen, number)
        assert sorted(targets_of(seen)) == list(range(COUNT))


def test_an_error_in_the_loop_leaves_nothing_behind() -> None:
    loop = Loop()
    loop.cut_to(2)
    loop.change = lambda inputs: inputs / 0 if len(inputs) == 2 else inputs.reshape(-1)
    with pytest.raises(RuntimeError):
        loop.epoch()
    loop.change = lambda inputs: inputs
    loop.epoch(1)
    loop.epoch(2)
    check_features(loop, loop.epoch(-1), 1)


class Shrinking:
    """A loader that gives an image less in every pass, though it says otherwise."""

    def __init__(self, data: Passes, step: int) -> None:
        self.data, self.step, self.count = data, step, COUNT

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.count += self.step
        for start in range(0, self.count, BATCH):
            numbers = torch.arange(start, min(start + BATCH, self.count)) % COUNT
            yield self.data.of(numbers), numbers


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (-1, "one pass over the loader gave 20 images, and one before it 21"),
        (1, "the loader gave more than the 23 images that its length stands for"),
        (3, "the loader gave more than the 24 images that its length stands for"),
    ],
)
def test_a_number_of_images_that_differs(step: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.loader = Shrinking(loop.data, step)
    loop.cut_to(2)
    for _ in range(4):
        assert loop.epoch()[0][0].shape[1] == 3
    assert said in caplog.text
    loop.loader = Shrinking(loop.data, step)
    assert torch.equal(loop.weights(), plain_weights(loop, 4, cut_after=0))


def test_images_of_several_sizes(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.loader = [(torch.randn(4, 3, size, size), torch.arange(4)) for size in (6, 6, 8)]
    loop.cut_to(2)
    for _ in range(4):
        assert loop.epoch()[0][0].shape[1] == 3
    assert "of shape (4, 8, 8) (torch.float32), and those of another of (4, 6, 6)" in caplog.text


def test_a_prefix_that_shares_what_learns_on_is_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    net = Net()
    net.body[3][1].weight = net.body[0][1].weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loop.dropper = Dropper(net, optimizer, EPOCHS, loop.dropper.settings, example_input=loop.data.images[:2])
    loop.cut_to(2)
    for _ in range(4):
        assert loop.epoch()[0][0].shape[1] == 3
    assert "share parameters or statistics with layers that learn on" in caplog.text


def test_stored_features_that_were_changed_are_refused() -> None:
    loop = recorded()
    loop.dropper.train_mode()
    batches = loop.dropper.batches(loop.loader)
    inputs, _ = next(batches)
    with pytest.raises(DataError, match="are stored features, but not the batch that batches"):
        loop.dropper(inputs * 0.5)
    with pytest.raises(DataError, match="were changed in place since batches"):
        loop.dropper(inputs.mul_(0.5))
    assert loop.dropper(next(batches)[0]).shape == (BATCH, 2)
    del batches
    with pytest.raises(DataError, match="within their pass"):
        loop.dropper(inputs)


# --- memory and files ----------------------------------------------------------------------------------------------


class Long(list[Any]):
    """A loader that says it has very many batches."""

    def __len__(self) -> int:
        return 1 << 40


def test_no_room_is_recomputing(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.loader = Long([loop.data.images[start : start + 4], torch.arange(4)] for start in range(0, 16, 4))
    for epoch in range(4):
        if epoch == 1:
            loop.cut_to(2)
        loop.epoch()
    assert "stored features need" in caplog.text
    assert "the dropped prefix runs at every step instead" in caplog.text
    assert torch.equal(loop.weights(), plain_weights(loop, 4))
    loop.loader = DataLoader(loop.data, BATCH)
    loop.cut_to(3)  # the next cut tries again
    for number in (1, 2):
        loop.epoch(number)
    check_features(loop, loop.epoch(-1), 1)


def test_views_that_do_not_fit_together_lie_a_tier_further_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of half of this, one view takes two thirds.
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 2 * 20_000)
    loop = recorded(scratch=tmp_path)
    assert loop.dropper.features_in == "file"
    for number in (1, 2):
        check_features(loop, loop.epoch(-1), number)
    loop = recorded(scratch=tmp_path, views=1)
    assert loop.dropper.features_in == "device"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Forbids this process files beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_recomputing(
    no_memory: None, small_files: Callable[[int], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(scratch=tmp_path)
    loop.data = Passes(2_000)
    loop.loader = DataLoader(loop.data, 100)
    loop.cut_to(2)
    loop.epoch(1)
    small_files(1 << 18)
    for _ in range(2):
        assert loop.epoch(2)[0][0].shape[1] == 3
    assert "found no room (file: [Errno 27] File too large)" in caplog.text
    assert (loop.dropper.features_in, list(tmp_path.iterdir())) == (None, [])


def test_a_disk_that_is_full_when_the_cut_moves(
    no_memory: None, small_files: Callable[[int], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(scratch=tmp_path)
    loop.data = Passes(2_000)
    loop.loader = DataLoader(loop.data, 100)
    loop.net.body[1][1] = nn.Conv2d(4, 8, 3, padding=1)  # the features grow, so that they cannot move in place
    loop.net.body[1][2], loop.net.body[2][1] = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
    loop.optimizer = torch.optim.SGD(loop.net.parameters(), lr=0.05)
    names = [f"body.{index}" for index in range(4)]
    loop.dropper = Dropper(loop.net, loop.optimizer, EPOCHS, loop.dropper.settings, units=names)
    loop.cut_to(2)
    for number in (1, 2):
        loop.epoch(number)
    check_features(loop, loop.epoch(-1), 1)
    small_files(1 << 18)
    loop.cut_to(3)
    assert loop.epoch()[0][0].shape[1] == 3
    assert "File too large" in caplog.text
    assert (loop.dropper.features_in, list(tmp_path.iterdir())) == (None, [])


def test_files_go_with_the_dropper(no_memory: None, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.iterdir()))

    loop = recorded(scratch=tmp_path)
    assert (loop.dropper.features_in, files()) == ("file", 4)  # features and targets of two views
    assert not list(tmp_path.glob("*partial*"))
    loop.cut_to(3)
    loop.epoch()
    assert files() == 4
    loop.dropper.close()
    assert files() == 0
    assert loop.epoch()[0][0].shape[1] == 3
    loop.cut_to(4)
    assert [loop.epoch()[0][0].shape[1] for _ in range(3)] == [3] * 3, "closed is closed"
    gc.disable()  # the dropper goes with its last name, not with the next collection
    try:
        loop = recorded(scratch=tmp_path)
        batches = loop.dropper.batches(loop.loader)
        next(batches)
        del loop
        assert files() == 4
        del batches
        assert files() == 0
        loop = Loop(scratch=tmp_path)
        loop.cut_to(2)
        for inputs, targets in loop.dropper.batches(loop.loader, scratch=tmp_path):
            loop.step(inputs, targets)
            assert files() == 2
            break
        assert files() == 0
    finally:
        gc.enable()


def test_close_within_a_pass() -> None:
    loop = recorded()
    steps = 0
    for inputs, targets in loop.dropper.batches(loop.loader):
        steps += 1
        loop.step(inputs, targets)
        loop.dropper.close()
    assert steps == 1
    assert len(loop.epoch()) == 6


# --- auto ----------------------------------------------------------------------------------------------------------


def slow_stem(loop: Loop) -> None:
    """Every run of the prefix takes four milliseconds longer."""
    loop.net.stem.register_forward_hook(lambda *_: time.sleep(0.004))


def test_auto_with_times_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop = Loop("auto")
    slow_stem(loop)
    loop.cut_to(2)
    loop.epoch(1)
    loop.epoch(2)
    check_features(loop, loop.epoch(-1), 1)
    loop.cut_to(3)
    check_features(loop, loop.epoch(-1), 2)
    assert caplog.text.count("auto stores them") == 2
    assert f"auto stores them, {EPOCHS - 2} epochs left" in caplog.text


@pytest.mark.parametrize(("remaining", "stored"), [(1, False), (2, True)])
def test_auto_stores_what_pays_off(
    remaining: int, stored: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # A batch's prefix, nothing before it is written, writing it, and reading it; two views are written.
    values = iter([1.0, 0.0, 0.5, 0.1])
    monkeypatch.setattr(feature_times, "seconds", lambda work, device: (work(), next(values))[1])
    loop = Loop("auto", epochs=remaining + 2)
    loop.cut_to(2)
    for epoch in range(remaining + 2):
        assert (loop.epoch()[0][0].shape[1] == 4) == (stored and epoch >= 2)
    assert f"auto {'stores' if stored else 'recomputes'} them, {remaining} epochs left" in caplog.text


@pytest.mark.parametrize(("write", "stored"), [(0.5, True), (2.0, False)])
def test_auto_decides_again_when_the_cut_moves(write: float, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Recording; then the way to the new cut (twice), writing and reading. Three epochs are left: 3 * (1 + 0.5), since
    # what the prefix took up to the old cut is known, against 2 * (0.5 + write) + 3 * 0.1.
    values = iter([1.0, 0.0, 0.1, 0.1, 0.5, 0.5, write, 0.1])
    monkeypatch.setattr(feature_times, "seconds", lambda work, device: (work(), next(values))[1])
    loop = Loop("auto", epochs=6)
    loop.cut_to(2)
    for number in (1, 2, -1):
        loop.epoch(number)
    loop.cut_to(3)
    assert loop.epoch(-1)[0][0].shape[1] == (4 if stored else 3)


# --- going on elsewhere --------------------------------------------------------------------------------------------


def test_after_a_resume_features_are_recorded_anew() -> None:
    loop = recorded()
    loop.epoch(-1)
    state = loop.dropper.state_dict()
    resumed = Loop()
    resumed.net.load_state_dict(loop.net.state_dict())
    resumed.dropper.load_state_dict(state)
    loop.dropper.load_state_dict(state)
    for other in (loop, resumed):
        assert other.dropper.features_in is None
        for number in (3, 4):
            assert other.epoch(number)[0][0].shape[1] == 3
        check_features(other, other.epoch(-1), 3)


def test_the_model_is_evaluated_and_saved_as_ever() -> None:
    loop = recorded()
    images = torch.randn(5, 3, 6, 6)
    for _ in range(2):
        loop.epoch(-1)
        loop.net.eval()
        with torch.no_grad():
            logits = loop.net(images)
        loop.net.train()  # as a loop may that knows nothing of dropping
        untouched = Net()
        untouched.load_state_dict(loop.net.state_dict())
        untouched.eval()
        with torch.no_grad():
            assert torch.equal(untouched(images), logits)


def test_what_was_dropped_stands_still_whatever_the_mode() -> None:
    loop = Loop()
    loop.cut_to(2)
    loop.net.train()
    before = loop.net.body[0][2].running_mean.clone()
    for inputs, targets in loop.dropper.batches(loop.loader):
        loop.step(inputs, targets)
    assert torch.equal(loop.net.body[0][2].running_mean, before)
