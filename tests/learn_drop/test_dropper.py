"""The cut: where it may be, what it takes out of training, and that nothing of it is lost in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlsearch.learn_drop import Dropper
from rlsearch.model_graph import split
from rlsearch.policy import LearnDrop

UNITS = ["body.0", "body.1", "body.2", "body.3"]
SETTINGS = LearnDrop(threshold=0.1, patience=2, warmup=0.0, max_fraction=1.0)


class Net(nn.Module):
    """A stem, four like blocks with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(4)))
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(images))).mean((2, 3)))


def make(settings: LearnDrop = SETTINGS, epochs: int = 10, **kwargs: object) -> tuple[Net, Dropper, torch.optim.SGD]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, Dropper(net, split(net, UNITS), settings, epochs, optimizer, **kwargs), optimizer  # type: ignore[arg-type]


def move(net: Net, names: Iterable[str], factor: float = 1.5) -> None:
    """Changes the parameters of the named submodules by half of themselves: far above the threshold."""
    with torch.no_grad():
        for name in names:
            for parameter in net.get_submodule(name).parameters():
                parameter.mul_(factor)


def step(net: Net, dropper: Dropper, optimizer: torch.optim.SGD) -> None:
    optimizer.zero_grad()
    dropper.train_mode()
    dropper.forward(torch.randn(8, 3, 4, 4)).square().sum().backward()
    optimizer.step()


def test_the_settled_prefix_is_dropped_after_patience() -> None:
    net, dropper, _ = make()
    # The stem changes by a half in the first epoch alone: its average is 0.5, 0.25, 0.125, 0.0625, 0.03125.
    for epoch, still_learning in enumerate(["stem", "body.2", "body.2", "body.2"], start=1):
        move(net, [still_learning])
        assert not dropper.end_epoch(epoch)
    move(net, ["body.2"])
    assert dropper.end_epoch(5)
    assert (dropper.cut, dropper.dropped_units) == (3, 2)


def test_the_head_is_never_dropped_and_the_cap_holds() -> None:
    _, dropper, _ = make()
    assert [dropper.end_epoch(epoch) for epoch in (1, 2)] == [False, True]
    assert dropper.cut == 5  # the stem and four units; the head learns on
    _, dropper, _ = make(LearnDrop(threshold=0.1, patience=1, warmup=0.0, max_fraction=0.5))
    assert dropper.end_epoch(1)
    assert dropper.cut == 2  # half of five layers, rounded down


def test_warmup_interval_and_the_last_epoch() -> None:
    _, dropper, _ = make(LearnDrop(threshold=0.1, patience=1, warmup=0.5, max_fraction=1.0))
    assert [dropper.end_epoch(epoch) for epoch in range(1, 6)] == [False, False, False, False, True]
    _, dropper, _ = make(LearnDrop(threshold=0.1, patience=1, interval=3, warmup=0.0, max_fraction=1.0))
    assert [dropper.end_epoch(epoch) for epoch in range(1, 4)] == [False, False, True]
    _, dropper, _ = make(LearnDrop(threshold=0.1, patience=1, warmup=1.0, max_fraction=1.0), epochs=3)
    assert not any(dropper.end_epoch(epoch) for epoch in range(1, 4))


def test_dropped_layers_stand_still_in_every_respect() -> None:
    net, dropper, optimizer = make(LearnDrop(threshold=0.1, patience=1, warmup=0.0, max_fraction=0.6))
    step(net, dropper, optimizer)
    for parameter in net.parameters():
        assert parameter in optimizer.state
    dropper._settled_for = [1, 1, 1, 0, 0]  # three layers have settled
    dropper._measure = lambda: None  # type: ignore[method-assign]
    assert dropper.end_epoch(1)
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


def test_a_replaced_unit_leaves_only_with_both_its_sources() -> None:
    settings = LearnDrop(threshold=0.1, patience=1, warmup=0.0, max_fraction=1.0)
    _, dropper, _ = make(settings, sources={"body.1": ("body.0", "body.2")})
    dropper._settled_for = [0] * 5
    dropper._measure = lambda: None  # type: ignore[method-assign]
    dropper._settled_for = [1, 1, 1, 0, 0]
    assert dropper.end_epoch(1)
    assert dropper.cut == 2  # body.1 is settled, but its source body.2 still learns
    dropper._settled_for = [1, 1, 1, 1, 0]
    assert dropper.end_epoch(2)
    assert dropper.cut == 4


def test_the_last_segment_is_never_dropped_though_it_holds_units() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    segments = split(net, ["0", "1", "2"])
    assert segments[-1].units == ("2",)
    settings = LearnDrop(threshold=0.1, patience=1, warmup=0.0, max_fraction=1.0)
    dropper = Dropper(net, segments, settings, 10, optimizer)
    assert dropper.end_epoch(1)
    assert (dropper.cut, dropper.dropped_units) == (2, 2)
    assert not dropper.end_epoch(2)
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2


def test_a_model_of_one_segment_drops_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    settings = LearnDrop(threshold=0.1, patience=1, warmup=0.0, max_fraction=1.0)
    dropper = Dropper(net, split(net, ["0"]), settings, 10, torch.optim.SGD(net.parameters(), lr=0.1))
    assert not any(dropper.end_epoch(epoch) for epoch in (1, 2, 3))


def test_prefix_and_suffix_are_the_model() -> None:
    net, dropper, optimizer = make(LearnDrop(threshold=0.1, patience=1, warmup=0.0, max_fraction=0.6))
    step(net, dropper, optimizer)
    images = torch.randn(8, 3, 4, 4)
    dropper.end_epoch(1)
    dropper.end_epoch(2)
    net.eval()
    whole = net(images)
    assert torch.equal(dropper.suffix(dropper.prefix(images)), whole)
    assert dropper.prefix(images).requires_grad is False


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    settings = LearnDrop(threshold=0.2, patience=2, warmup=0.0, max_fraction=0.6)

    def run(
        dropper: Dropper, net: Net, optimizer: torch.optim.SGD, epochs: range
    ) -> list[tuple[int, list[float | None]]]:
        seen = []
        for epoch in epochs:
            torch.manual_seed(epoch)
            step(net, dropper, optimizer)
            dropper.end_epoch(epoch)
            seen.append((dropper.cut, list(dropper._averages)))
        return seen

    net, dropper, optimizer = make(settings)
    straight = run(dropper, net, optimizer, range(1, 9))
    assert 0 < straight[-1][0] < 5
    net, dropper, optimizer = make(settings)
    first = run(dropper, net, optimizer, range(1, 5))
    state = {"net": net.state_dict(), "dropper": dropper.state_dict(), "optimizer": optimizer.state_dict()}
    net, dropper, optimizer = make(settings)
    net.load_state_dict(state["net"])
    dropper.load_state_dict(state["dropper"])
    optimizer.load_state_dict(state["optimizer"])
    assert first + run(dropper, net, optimizer, range(5, 9)) == straight
