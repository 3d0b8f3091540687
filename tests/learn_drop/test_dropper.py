"""The cut: where it may be, what it takes out of training, and that nothing of it is lost in a checkpoint."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlsearch
from rlsearch import Dropper, LearnDrop, Policy, Replacement
from rlsearch.errors import UserError
from rlsearch.policy import SCORES

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = LearnDrop(threshold=0.2, patience=2, warmup=0.0, max_fraction=1.0)
LAYERS = ("stem", "body.0", "body.1", "body.2", "body.3", "head")


class Net(nn.Module):
    """A stem, four like blocks with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(4)))
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(images))).mean((2, 3)))


class OneDropout(nn.Module):
    """The same dropout behind every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = self.dropout(layer(inputs))
        return inputs


class Tied(nn.Module):
    """The first and the third layer have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def settings(**values: Any) -> LearnDrop:
    return LearnDrop(**{"threshold": 0.2, "patience": 1, "warmup": 0.0, "max_fraction": 1.0} | values)


def make(drop: LearnDrop = SETTINGS, epochs: int = 10) -> tuple[Net, Dropper, torch.optim.SGD]:
    torch.manual_seed(0)
    net = Net()
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": others}], lr=0.1, momentum=0.9)
    return net, Dropper(net, optimizer, epochs, drop, units=LAYERS[1:-1]), optimizer


def test_of_several_processes_all_cut_where_they_agree_to() -> None:
    wanted: list[int] = []

    def agree(cut: int) -> int:
        wanted.append(cut)
        return cut - 1

    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = settings(score="schedule", warmup=0.2)
    dropper = Dropper(net, optimizer, 10, schedule, units=["0", "1", "2", "3"], agree=agree)
    cuts = []
    for _ in range(10):
        dropper.end_epoch()
        cuts.append(dropper.cut)
    # Every decision is agreed on, also one to stay; there is none before the warm-up and after the last epoch.
    assert wanted == [1, 1, 1, 2, 2, 2, 3, 3]
    assert cuts == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def sequential(*layers: nn.Module, **values: Any) -> tuple[nn.Sequential, Dropper, torch.optim.SGD]:
    net = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    units = [str(index) for index in range(len(layers))]
    return net, Dropper(net, optimizer, 10, settings(**values), units=units), optimizer


def move(net: nn.Module, names: Iterable[str], factor: float = 1.5) -> None:
    """Changes the parameters of the named submodules by half of themselves, as far as in every other epoch."""
    with torch.no_grad():
        for name in names:
            for parameter in net.get_submodule(name).parameters():
                parameter.mul_(factor)


def step(net: Net, dropper: Dropper, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    dropper.train_mode()
    dropper(torch.randn(8, 3, 4, 4)).square().sum().backward()
    optimizer.step()


def cut_to(dropper: Dropper, cut: int) -> None:
    dropper.load_state_dict(dropper.state_dict() | {"cut": cut})


def test_the_layers_and_their_scores() -> None:
    net = Net()
    dropper = Dropper(net, torch.optim.SGD(net.parameters()), 10, settings(patience=2))
    assert dropper.layers == LAYERS
    assert dropper.scores == dict.fromkeys(LAYERS[:-1])
    move(net, ["stem", "body.2"])
    dropper.end_epoch()
    move(net, ["body.2"])
    dropper.end_epoch()
    assert dropper.scores == pytest.approx({"stem": 0.5, "body.0": 0, "body.1": 0, "body.2": 1, "body.3": 0})
    move(net, ["body.2"])
    for _ in range(3):
        dropper.end_epoch()
    assert dropper.cut > 1
    assert set(dropper.scores) == set(LAYERS[dropper.cut : -1])


def test_the_settled_prefix_is_dropped_after_patience() -> None:
    net, dropper, _ = make()
    # The stem changes by a half in the first epoch alone: of its average 1, 1/2, 1/4, 1/8, 1/16 are left.
    for still_learning in ["stem", "body.2", "body.2", "body.2"]:
        move(net, [still_learning])
        assert not dropper.end_epoch()
    move(net, ["body.2"])
    assert dropper.end_epoch()
    assert (dropper.cut, dropper.dropped_units, dropper.epochs_done) == (3, 2, 5)


def test_patience_counts_measurements_in_a_row() -> None:
    net, dropper, _ = make(LearnDrop(threshold=0.6, patience=2, warmup=0.0, max_fraction=1.0))
    moved = []
    # The stem's average is 0.5, 0.25, 0.375, 0.19 and 0.09: below 0.6 of its greatest, 0.3, in the second, fourth and
    # fifth epoch.
    for stem_moves in (True, False, True, False, False):
        move(net, ["stem"] if stem_moves else [])
        moved.append(dropper.end_epoch())
    assert moved == [False, False, False, False, True]


def test_the_head_is_never_dropped_and_the_cap_holds() -> None:
    _, dropper, _ = make()
    assert [dropper.end_epoch() for _ in range(2)] == [False, True]
    assert dropper.cut == 5  # the stem and four units; the head learns on
    _, dropper, _ = make(settings(max_fraction=0.5))
    assert dropper.end_epoch()
    assert dropper.cut == 2  # half of five layers, rounded down


def test_warmup_interval_and_the_last_epoch() -> None:
    _, dropper, _ = make(settings(warmup=0.5))
    assert [dropper.end_epoch() for _ in range(5)] == [False, False, False, False, True]
    _, dropper, _ = make(settings(interval=3))
    assert [dropper.end_epoch() for _ in range(3)] == [False, False, True]
    _, dropper, _ = make(settings(warmup=1.0), epochs=3)
    assert not any(dropper.end_epoch() for _ in range(3))
    _, dropper, _ = make(settings(warmup=0.07), epochs=100)  # 0.07 * 100 lies above 7
    assert [dropper.end_epoch() for _ in range(7)] == [*[False] * 6, True]


@pytest.mark.parametrize("epochs", [1, 2, 9, 12, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("max_fraction", [0.0, 0.5, 1.0])
def test_a_schedule_drops_from_the_warmup_on_and_never_at_the_end(
    epochs: int, warmup: float, max_fraction: float
) -> None:
    _, dropper, _ = make(settings(score="schedule", warmup=warmup, max_fraction=max_fraction), epochs)
    cuts = [0]
    for epoch in range(1, epochs + 1):
        moved = dropper.end_epoch()
        cuts.append(dropper.cut)
        assert moved == (cuts[-1] > cuts[-2])
        due = 0 if epoch < warmup * epochs else sum(epoch >= epochs * (warmup + (1 - warmup) * k / 5) for k in range(5))
        assert cuts[-1] == (min(due, int(5 * max_fraction)) if epoch < epochs else cuts[-2])


def test_a_schedule_by_hand() -> None:
    _, dropper, _ = make(settings(score="schedule", warmup=0.2, threshold=1e-9, patience=99), epochs=12)
    cuts = []
    for _ in range(12):
        dropper.end_epoch()
        cuts.append(dropper.cut)
    # From 2.4 epochs on one layer more every 9.6 / 5 epochs: at 2.4, 4.32, 6.24, 8.16 and 10.08.
    assert cuts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert set(dropper.scores.values()) <= {None}


def test_a_score_that_is_no_number_settles_nothing() -> None:
    net, dropper, _ = make(settings())
    with torch.no_grad():
        net.body[1][0].weight.fill_(float("nan"))
    assert dropper.end_epoch()
    assert dropper.cut == 2
    with torch.no_grad():
        net.body[1][0].weight.fill_(1.0)
    assert not dropper.end_epoch()  # the change since nothing that was a number
    assert dropper.end_epoch()
    assert dropper.cut == 5


def test_dropped_layers_stand_still_in_every_respect() -> None:
    net, dropper, optimizer = make()
    step(net, dropper, optimizer)
    for parameter in net.parameters():
        assert parameter in optimizer.state
    cut_to(dropper, 3)
    dropped = nn.ModuleList([net.stem, net.body[0], net.body[1]])
    before = {name: tensor.clone() for name, tensor in dropped.state_dict().items()}
    active = {name: tensor.clone() for name, tensor in net.body[2].state_dict().items()}
    step(net, dropper, optimizer)
    for name, tensor in dropped.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(torch.equal(tensor, active[name]) for name, tensor in net.body[2].state_dict().items())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in dropped.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert parameter not in optimizer.state
        assert id(parameter) not in held


def test_the_last_segment_is_never_dropped_though_it_holds_units() -> None:
    torch.manual_seed(0)
    net, dropper, _ = sequential(*(nn.Linear(3, 3) for _ in range(3)))
    assert dropper.layers == ("0", "1", "2")
    assert dropper.end_epoch()
    assert (dropper.cut, dropper.dropped_units) == (2, 2)
    assert not dropper.end_epoch()
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2


def test_prefix_and_suffix_are_the_model() -> None:
    net, dropper, optimizer = make()
    step(net, dropper, optimizer)
    cut_to(dropper, 3)
    images = torch.randn(8, 3, 4, 4)
    net.eval()
    whole = net(images)
    assert torch.equal(dropper.suffix(dropper.prefix(images)), whole)
    assert torch.equal(dropper(images), whole)
    assert dropper.prefix(images).requires_grad is False
    start = dropper._segments[0].module(images)
    assert torch.equal(dropper.prefix(start, 1), dropper.prefix(images))


def test_what_runs_on_both_sides_of_the_cut_has_the_mode_of_the_side() -> None:
    torch.manual_seed(0)
    net = OneDropout()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dropper = Dropper(net, optimizer, 10, settings(), units=["layers.0", "layers.1", "layers.2"])
    # A segment ends with its layer: what stands behind the first one runs in the second segment, and in the third.
    cut_to(dropper, 2)
    dropper.train_mode()
    inputs = torch.randn(4, 64)
    assert torch.equal(dropper.prefix(inputs), net.layers[1](net.layers[0](inputs)))
    assert (dropper(inputs) == 0).float().mean() > 0.3  # the learning side drops out
    net.eval()
    assert torch.equal(dropper(inputs), net(inputs))
    assert not net.dropout.training


def test_tied_weights_learn_on_until_the_last_layer_that_has_them_leaves() -> None:
    torch.manual_seed(0)
    net = Tied()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    dropper = Dropper(net, optimizer, 10, settings(), example_input=torch.zeros(1, 3))
    for cut, learns in ((1, True), (2, True), (3, False)):
        optimizer.zero_grad()
        dropper(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        cut_to(dropper, cut)
        shared, own = net.layers[0].weight, net.layers[0].bias
        held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        assert (shared.requires_grad, id(shared) in held, shared in optimizer.state) == (learns,) * 3
        assert (own.requires_grad, id(own) in held, own in optimizer.state) == (False,) * 3


@pytest.fixture
def replaced() -> tuple[nn.Module, Dropper]:
    """layer1.1 is made of layer1.0 and layer1.2."""
    torch.manual_seed(0)
    model = rlsearch.build_model("resnet20")
    report = rlsearch.apply_policy(model, Policy(replacements=(Replacement("layer1.1", "scalar"),)))
    assert report.replaced[0].sources == ("layer1.0", "layer1.2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Dropper(model, optimizer, 10, settings(), report=report)


def test_the_cut_moves_back_while_a_source_of_a_replaced_unit_learns(
    replaced: tuple[nn.Module, Dropper], caplog: pytest.LogCaptureFixture
) -> None:
    model, dropper = replaced
    # The norm of layer1.2 stays its own: layer1.1 itself has settled.
    for _ in range(2):
        move(model, ["layer1.2.bn1"])
        with caplog.at_level(logging.INFO):
            dropper.end_epoch()
        assert dropper.cut == 2
        assert dropper.scores["layer1.1"] == 0
        assert "the cut moves back before layer1.1: layer1.1 borrows from layer1.2, which still learns" in caplog.text
    while not dropper.end_epoch():
        assert dropper.epochs_done < 10
    assert dropper.cut == 10


def test_a_replaced_unit_moves_as_the_parameters_that_are_made_for_it(replaced: tuple[nn.Module, Dropper]) -> None:
    model, dropper = replaced
    unit = model.get_submodule("layer1.1")
    before = [tensor.clone() for tensor in rlsearch.replacement.composed_parameters(unit)]
    move(model, ["layer1.2.conv1"])
    after = rlsearch.replacement.composed_parameters(unit)
    difference = torch.cat([(now - then).flatten() for now, then in zip(after, before, strict=True)])
    expected = difference.norm() / torch.cat([tensor.flatten() for tensor in before]).norm()
    assert expected > 0.01
    dropper.end_epoch()
    assert dropper._averages[2] == pytest.approx(float(expected), rel=1e-5)


def schedule_rate(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Every step has a rate of its own, and every group another course."""
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.1 / (1 + index + number % 5)


Run = tuple[Net, Dropper, torch.optim.Optimizer]


def train(run: Run, first: int, last: int, saved: list[bytes] | None = None) -> list[Any]:
    """Steps ``first`` to ``last`` of two an epoch, what was decided after each, and the checkpoint of each."""
    net, dropper, optimizer = run
    seen = []
    for number in range(first, last):
        torch.manual_seed(number)
        schedule_rate(optimizer, number)
        step(net, dropper, optimizer)
        if number % 2:
            dropper.end_epoch()
        seen.append((dropper.cut, dropper.epochs_done, list(dropper._averages), list(dropper._settled_for)))
        if saved is not None:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in run], file)
            saved.append(file.getvalue())
    return seen


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("interval", [1, 2])
def test_a_state_goes_on_as_if_nothing_had_happened(score: str, interval: int) -> None:
    drop = LearnDrop(score, threshold=1.0, patience=1, interval=interval, warmup=0.2, max_fraction=0.8)
    straight = make(drop, epochs=12)
    checkpoints: list[bytes] = []
    expected = train(straight, 0, 24, checkpoints)
    assert len({cut for cut, *_ in expected}) > 1
    # Within an epoch, between two epochs of an interval, and at its end; before the first cut and behind it.
    for stop in (1, 2, 4, 7, 9, 10, 12, 15, 18):
        run = make(drop, epochs=12)
        for part, state in zip(run, torch.load(io.BytesIO(checkpoints[stop - 1]), weights_only=True), strict=True):
            part.load_state_dict(state)
        assert train(run, stop, 24) == expected[stop:]
        for name, tensor in run[0].state_dict().items():
            assert torch.equal(tensor, straight[0].state_dict()[name]), name


@pytest.mark.parametrize("score", SCORES)
def test_a_state_in_memory_stays_what_it_was(score: str) -> None:
    drop = LearnDrop(score, threshold=0.9, patience=1, interval=2, warmup=0.0, max_fraction=0.8)
    run = make(drop)
    train(run, 0, 5)
    state = run[1].state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    train(run, 5, 12)
    other = make(drop)
    other[1].load_state_dict(state)
    train(other, 5, 12)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert str(state) == str(saved)


def test_a_state_of_another_training_is_refused() -> None:
    _, dropper, _ = make()
    state = dropper.state_dict()
    with pytest.raises(UserError, match=r"has other score \(schedule\) than this dropper \(param_change\)"):
        dropper.load_state_dict(state | {"score": "schedule"})
    with pytest.raises(UserError, match="other layers"):
        dropper.load_state_dict(state | {"layers": ["stem", "head"]})
    cut_to(dropper, 2)
    with pytest.raises(UserError, match="more has left already"):
        dropper.load_state_dict(state)
    assert dropper.cut == 2
