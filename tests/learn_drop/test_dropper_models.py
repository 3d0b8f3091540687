"""Real models drop layer by layer, and what cannot be dropped from is refused in words that say why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlsearch
from rlsearch import Dropper, LearnDrop, Policy, Replacement
from rlsearch.errors import ConfigError, ModelError
from rlsearch.policy import SCORES

EVENLY = LearnDrop(score="schedule", warmup=0.0, max_fraction=1.0)


class UNet(nn.Module):
    """Four units; what goes into the second is added to what comes out of the third."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        skip = self.units[0](images)
        features = self.units[2](self.units[1](skip).relu()) + skip
        return self.head(self.units[3](features).mean((2, 3)))


class AcrossAll(nn.Module):
    """The images are needed again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.units(images) + images


class Dense(nn.Module):
    """Every unit adds to one sum, which is scaled beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        total = images.mul(2)
        for unit in self.units:
            total = total + unit(images)
        return total


class Around(nn.Module):
    """Its forward calls no unit itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.relu(images)


@pytest.mark.parametrize(
    ("name", "options", "size", "num_layers"),
    [
        ("resnet20", {}, 32, 10),
        ("vgg11", {"small_head": True}, 32, 8),
        ("vit_tiny", {}, 32, 13),
        ("convnext_tiny", {}, 32, 19),
        ("resnet18", {}, 32, 9),
        ("swin_t", {}, 32, 13),
        ("densenet121", {}, 32, 5),
        ("deit_tiny_patch16_224", {"img_size": 32}, 32, 13),  # timm's
    ],
)
def test_every_model_drops_layer_by_layer(name: str, options: dict[str, Any], size: int, num_layers: int) -> None:
    torch.manual_seed(0)
    model = rlsearch.build_model(name, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    # None of a DenseNet's own layers has a like neighbour; its blocks can be cut apart all the same.
    units = [f"features.denseblock{index}" for index in (1, 2, 3, 4)] if name == "densenet121" else None
    example = torch.zeros(1, 3, size, size)
    dropper = Dropper(model, optimizer, 100, EVENLY, units=units, example_input=example)
    assert len(dropper.layers) == num_layers + 1
    images = torch.randn(2, 3, size, size)
    cuts = []
    for _ in range(100):
        if dropper.end_epoch():
            cuts.append(dropper.cut)
            model.eval()
            with torch.no_grad():
                assert torch.equal(dropper.suffix(dropper.prefix(images)), model(images)), dropper.layers[dropper.cut]
    assert cuts == list(range(1, num_layers + 1))
    dropper.train_mode()
    dropper(images).square().sum().backward()
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held
    assert held == {parameter for parameter in model.parameters() if parameter.grad is not None}


def test_the_cut_stays_where_one_tensor_is_alive() -> None:
    torch.manual_seed(0)
    model = UNet()
    dropper = Dropper(model, torch.optim.SGD(model.parameters()), 10, EVENLY)
    assert dropper.layers == ("units.0", "units.3", "head")
    images = torch.randn(2, 3, 4, 4)
    expected = model(images)
    seen = set()
    for _ in range(10):
        dropper.end_epoch()
        seen.add((dropper.cut, dropper.dropped_units))
        assert torch.equal(dropper(images), expected)
    # At the ends of the two units under the skip connection two tensors are alive: they leave with the next.
    assert seen == {(1, 1), (2, 4)}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (AcrossAll(), "behind units.0 the value of the input images is still needed, by add(units.2, images)"),
        (Dense(), "behind units.0 the value of the input images is still needed, by units.2"),
        (Around(), "its own forward calls none of its units, so that it cannot be cut at their ends"),
    ],
)
def test_a_model_of_which_nothing_can_be_cut_off_is_refused(model: nn.Module, reason: str) -> None:
    units = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with pytest.raises(ModelError) as caught:
        Dropper(model, torch.optim.SGD(model.parameters()), 10, units=units)
    assert str(caught.value).startswith(f"learn_drop: nothing of {type(model).__name__} can leave: {reason}")


def test_a_model_of_one_segment_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="nothing of Sequential can leave: 0 ends it, and nothing behind it would go"):
        Dropper(net, torch.optim.SGD(net.parameters()), 10, units=["0"])


def test_a_model_without_units_says_how_to_name_them() -> None:
    net = rlsearch.build_model("densenet121")
    with pytest.raises(ModelError, match=r"DenseNet has no unit(?s:.)*name them in forward order: units=\[...\]"):
        Dropper(net, torch.optim.SGD(net.parameters()), 10)
    with pytest.raises(ModelError, match=r"no module 'features\.denseblok1'; did you mean 'features\.denseb"):
        Dropper(net, torch.optim.SGD(net.parameters()), 10, units=["features.denseblok1"])


def test_replaced_units_need_the_report_of_all_of_them() -> None:
    model = rlsearch.build_model("resnet20")
    report = rlsearch.apply_policy(model, Policy(replacements=(Replacement("layer1.1", "scalar"),)))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ModelError, match="CifarResNet has replaced units; pass report="):
        Dropper(model, optimizer, 10)
    with pytest.raises(ModelError, match=r"units: layer1\.0, layer1\.1 of the report are not among them"):
        Dropper(model, optimizer, 10, report=report, units=["layer1.2", "layer2.0"])
    assert Dropper(model, optimizer, 10, report=report).layers[2] == "layer1.1"


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))


@pytest.mark.parametrize("score", SCORES)
def test_an_optimizer_of_one_flat_list_is_refused(net: nn.Sequential, score: str) -> None:
    with pytest.raises(ModelError, match="LBFGS keeps all parameters in one flat list, so that no layer can leave it"):
        Dropper(net, torch.optim.LBFGS(net.parameters()), 10, LearnDrop(score), units=["0", "1", "2"])


def test_an_optimizer_of_another_model_is_refused(net: nn.Sequential) -> None:
    other = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="SGD holds none of the parameters of Sequential; make the optimizer of this"):
        Dropper(net, torch.optim.SGD(other.parameters()), 10, units=["0", "1", "2"])
    # One that trains the last layer alone is no mistake: the others have settled.
    dropper = Dropper(net, torch.optim.SGD(net[2].parameters()), 10, LearnDrop(warmup=0.0), units=["0", "1", "2"])
    assert [dropper.end_epoch() for _ in range(2)] == [False, True]


def test_what_is_no_optimizer_is_refused(net: nn.Sequential) -> None:
    with pytest.raises(ModelError, match="function has no param_groups and state to take dropped layers out of"):
        Dropper(net, torch.optim.SGD(net.parameters()).step.__func__, 10)  # type: ignore[arg-type,attr-defined]


@pytest.mark.parametrize("epochs", [0, -1, 2.5, math.nan, math.inf, True, "10", None])
def test_epochs_must_be_a_whole_number(net: nn.Sequential, epochs: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Dropper(net, torch.optim.SGD(net.parameters()), epochs, LearnDrop(patience=0))
    assert [problem.key for problem in caught.value.problems] == ["learn_drop.patience", "epochs"]
