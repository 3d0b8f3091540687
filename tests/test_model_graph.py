"""Segments are the model, cut only where one tensor crosses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.model_graph import example_shape, fake_copy, outermost, split, why_not_cut
from rlsearch.training.models import build_model


class Long(nn.Module):
    """Three units; the input of the first is added to the output of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.units = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(3))
        self.head = nn.Linear(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        start = self.stem(images)
        features = self.units[1](self.units[0](start)) + start
        return self.head(self.units[2](features).mean((2, 3)))


class Masked(nn.Module):
    """Takes a mask too, which training does not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    def forward(self, images: Tensor, mask: Tensor | None = None, flip: bool = False) -> Tensor:
        if mask is not None:
            images = images * mask
        return self.units(images.flip(-1) if flip else images)


class Branching(nn.Module):
    """Cannot be traced: what runs depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.units(images) if images.sum() > 0 else images


class Crossing(nn.Module):
    """Two units, and a value that ``how`` carries past the first one."""

    def __init__(self, how: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        return self.how(self.units, images)


def by_method(units: nn.ModuleList, images: Tensor) -> Tensor:
    gate = images.sigmoid().mean((2, 3), keepdim=True)
    return units[1](units[0](images)).mul(gate)


def by_function(units: nn.ModuleList, images: Tensor) -> Tensor:
    return units[1](torch.cat([units[0](images * 2), images], 1)[:, :3])


def to_the_output(units: nn.ModuleList, images: Tensor) -> Tensor:
    first = images + 1
    units[1](units[0](first))
    return first


def at_the_end(units: nn.ModuleList, images: Tensor) -> Tensor:
    return units[0](images)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (by_method, "behind units.0 the value of mean(sigmoid) is still needed, by mul(units.1, mean)"),
        (by_function, "behind units.0 the value of the input images is still needed, by cat(units.0, images)"),
        (at_the_end, "units.0 ends it, and nothing behind it would go on learning"),
        (to_the_output, "its own forward calls none of its units, so that it cannot be cut at their ends (units.0, "),
    ],
)
def test_why_nothing_can_be_cut_off_is_said_in_words(
    how: Callable[[nn.ModuleList, Tensor], Tensor], reason: str
) -> None:
    names = ["units.0", "units.1"]
    assert len(split(Crossing(how), names)) == 1
    assert why_not_cut(Crossing(how), names).startswith(reason)


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_segments_are_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name).eval()
    units = [n for n, module in model.named_modules() if type(module).__name__ in ("BasicBlock", "Bottleneck")]
    segments = split(model, units)
    assert [segment.name for segment in segments] == ["stem", *units, "head"]
    assert [segment.units for segment in segments] == [(), *((unit,) for unit in units), ()]
    images = torch.randn(2, 3, 32, 32)
    features = images
    for segment in segments:
        features = segment.module(features)
    assert torch.equal(features, model(images))
    shared = [id(p) for segment in segments for p in segment.module.parameters()]
    assert sorted(shared) == sorted(id(p) for p in model.parameters())


def test_no_cut_where_a_connection_spans_it() -> None:
    model = Long()
    segments = split(model, ["units.0", "units.1", "units.2"])
    assert [(segment.name, segment.units) for segment in segments] == [
        ("stem", ()),
        ("units.2", ("units.0", "units.1", "units.2")),
        ("head", ()),
    ]
    images = torch.randn(2, 1, 5, 5)
    features = images
    for segment in segments:
        features = segment.module(features)
    assert torch.equal(features, model(images))


def test_roles_stay_in_the_units_that_hold_them() -> None:
    names = ["layer1.0", "layer1.0.conv1", "layer1.1", "layer1.1.conv1", "layer10.0.conv1"]
    assert outermost(names) == {
        "layer1.0": "layer1.0",
        "layer1.0.conv1": "layer1.0",
        "layer1.1": "layer1.1",
        "layer1.1.conv1": "layer1.1",
        "layer10.0.conv1": "layer10.0.conv1",
    }
    segments = split(build_model("resnet20"), names[:4])
    assert [segment.units for segment in segments] == [(), ("layer1.0",), ("layer1.1",), ()]


def test_arguments_with_a_default_are_not_passed() -> None:
    model = Masked()
    segments = split(model, ["units.0", "units.1"])
    assert [segment.name for segment in segments] == ["units.0", "units.1"]
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(segments[1].module(segments[0].module(images)), model(images))


def test_what_cannot_be_traced_says_why() -> None:
    with pytest.raises(ModelError, match="Branching cannot be traced"):
        split(Branching(), ["units.0", "units.1"])


def test_a_fake_copy_takes_no_memory_and_leaves_the_model_alone() -> None:
    model = build_model("resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mode, copy = fake_copy(model)
    with mode:
        assert copy(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [(n, p.shape) for n, p in copy.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert all(p.untyped_storage().device.type == "meta" for p in copy.parameters())


def test_guessed_inputs() -> None:
    assert example_shape(build_model("resnet20")) == (1, 3, 32, 32)
    assert example_shape(Long()) == (1, 1, 32, 32)
    with pytest.raises(ModelError, match="no convolution"):
        example_shape(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="accepts no guessed input"):
        example_shape(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(7, 2)))
