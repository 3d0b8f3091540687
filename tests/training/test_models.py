"""Models by name: exact counts, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlsearch.errors import ModelError
from rlsearch.policy import ModelSpec
from rlsearch.training.cifar_resnet import CifarResNet
from rlsearch.training.models import build_model, build_spec

FACTORIES = """
from torch import nn

def tiny(num_classes, width=4):
    head = nn.Linear(width, num_classes)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()

class Family:
    class Net(nn.Linear):
        def __init__(self, num_classes):
            super().__init__(3, num_classes)

def fails(num_classes):
    raise KeyError("width")

def no_module(num_classes):
    return "a model"

number = 3
"""


def num_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's own, importable as from the current folder."""
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    (tmp_path / "my_broken_nets.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_nets"


@pytest.mark.parametrize(
    ("name", "count"), [("resnet20", 272_474), ("resnet32", 466_906), ("resnet56", 855_770), ("resnet110", 1_730_714)]
)
def test_cifar_resnets_have_the_reference_counts(name: str, count: int) -> None:
    assert num_params(build_model(name)) == count


@pytest.mark.parametrize("side", [8, 32])
def test_a_cifar_resnet_halves_the_image_twice(side: int) -> None:
    model = build_model("resnet20", num_classes=7).eval()
    images = torch.randn(2, 3, side, side)
    stem = model.bn1(model.conv1(images)).relu()
    assert model.layer3(model.layer2(model.layer1(stem))).shape == (2, 64, side // 4, side // 4)
    assert model(images).shape == (2, 7)


def test_a_block_adds_to_its_input() -> None:
    blocks = build_model("resnet20").layer2.eval()
    images = torch.randn(2, 16, 8, 8)
    for block in blocks:
        torch.nn.init.zeros_(block.bn2.weight)
    projected = blocks[0](images)
    assert torch.allclose(projected, blocks[0].downsample(images).relu())
    assert torch.equal(blocks[2](blocks[1](projected)), projected)


def test_a_cifar_resnet_of_impossible_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(21)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_torchvision_resnets_have_their_published_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=1000)
    assert num_params(model) == count
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_small_stem_keeps_the_resolution() -> None:
    model = build_model("resnet18", small_stem=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert model.maxpool(model.conv1(images)).shape == (1, 64, 32, 32)
    assert model(images).shape == (1, 10)
    with torch.device("meta"):
        large = build_model("resnet18")
    assert num_params(large) - num_params(model) == 3 * 64 * (7 * 7 - 3 * 3)


def test_the_random_state_decides_the_start() -> None:
    torch.manual_seed(3)
    first = build_model("resnet20")
    torch.manual_seed(3)
    second = build_model("resnet20")
    torch.manual_seed(4)
    other = build_model("resnet20")
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_a_users_factory_is_called_with_classes_and_kwargs(factories: str) -> None:
    model = build_model(f"{factories}:tiny", num_classes=5, width=6)
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 5)
    assert model[0].out_channels == 6
    assert model.training
    assert build_model(f"{factories}:Family.Net", 4).out_features == 4


def test_a_spec_builds_the_same_as_its_parts() -> None:
    model = build_spec(ModelSpec("resnet18", num_classes=3, kwargs={"small_stem": True}))
    assert model.fc.out_features == 3
    assert model.conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnt110"}, "unknown model 'resnt110'; did you mean 'resnet110'"),
        ({"name": "vit"}, "unknown model 'vit'; known: convnext_tiny, .*package.module:factory"),
        ({"name": "resnet20", "num_classes": 0}, "num_classes must be at least 1, got 0"),
        (
            {"name": "resnet20", "width": 3, "depth": 4},
            "'resnet20' \\(it takes none\\): 'width' .*; 'depth' is unknown",
        ),
        ({"name": "resnet18", "smal_stem": True}, "'smal_stem' is unknown; did you mean 'small_stem'"),
        ({"name": "resnet18", "small_stem": "yes"}, "'small_stem' must be true or false, got 'yes'"),
        ({"name": "resnet50", "groups": True}, "'groups' must be a whole number, got True"),
        ({"name": "resnet18", "groups": 2}, "cannot be built with kwargs {'groups': 2}: .*groups=1"),
        ({"name": "no_such_package.nets:f"}, "'no_such_package.nets' .* cannot be imported .*PYTHONPATH"),
        ({"name": "my_broken_nets:f"}, "cannot be imported \\(ZeroDivisionError"),
        ({"name": "my_nets:"}, "package.module:factory, got 'my_nets:'"),
        ({"name": "../my_nets:tiny"}, "package.module:factory"),
        ({"name": "my_nets:tinny"}, "has no 'tinny'; did you mean 'tiny'"),
        ({"name": "my_nets:number"}, "must be callable, got int"),
        ({"name": "my_nets:no_module"}, "must return a torch.nn.Module, got str"),
        ({"name": "my_nets:fails"}, "'my_nets:fails' failed: KeyError: 'width'"),
        ({"name": "my_nets:tiny", "widht": 3}, "unexpected keyword argument 'widht'; its signature is .*width=4"),
    ],
)
def test_bad_input_is_named(factories: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(**arguments)  # type: ignore[arg-type]


def test_settings_of_the_spec_are_refused_as_kwargs() -> None:
    with pytest.raises(ModelError, match="num_classes, weights belong beside kwargs"):
        build_spec(ModelSpec("resnet20", kwargs={"weights": "a.pt", "num_classes": 3}))
