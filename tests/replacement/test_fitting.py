"""Which block fits which unit, and the reasons that a user reads where it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rlsearch.replacement import BLOCKS, Unit, apply_policy, find_units, fits


@pytest.fixture(scope="module")
def units(untouched_resnet32: nn.Module) -> list[Unit]:
    return find_units(untouched_resnet32)


@pytest.mark.parametrize("block", BLOCKS)
def test_exactly_these_units_of_resnet32_fit(untouched_resnet32: nn.Module, units: list[Unit], block: str) -> None:
    fitting = {unit.name for unit in units if fits(untouched_resnet32, units, unit.name, block) is None}
    stages = {f"layer{stage}.{index}": index for stage in (1, 2, 3) for index in range(5)}
    names = {f"{block}{part}" for block in stages for part in ("", ".conv1", ".conv2")}
    if block == "skip":
        narrowing = {"layer2.0", "layer3.0", "layer2.0.conv1", "layer3.0.conv1"}
        assert fitting == names - narrowing
    else:
        ends = {name for name in names if stages[name.removesuffix(".conv1").removesuffix(".conv2")] in (0, 4)}
        # The second block's first convolution has a source of half the channels.
        behind = {"layer2.1", "layer3.1", "layer2.1.conv1", "layer3.1.conv1"} if block != "project" else set()
        assert fitting == names - ends - behind


@pytest.mark.parametrize(
    ("unit", "block", "options", "reason"),
    [
        (
            "layer3.1",
            "scalar",
            {},
            "layer3.1: conv1.weight is (64, 64, 3, 3), its preceding source layer3.0 has (64, 32, 3, 3); "
            "use boundary: keep",
        ),
        ("layer3.1", "scalar", {"boundary": "keep"}, None),
        ("layer1.1", "scalar", {"boundary": "keep"}, None),
        (
            "layer3.0",
            "scalar",
            {},
            "layer3.0: is the first unit of its chain layer3: it has no preceding unit to borrow from",
        ),
        (
            "layer3.4",
            "channel",
            {},
            "layer3.4: is the last unit of its chain layer3: it has no succeeding unit to borrow from",
        ),
        (
            "layer3.0",
            "skip",
            {},
            "layer3.0: its input (32, 16, 16) and its output (64, 8, 8) must have one shape for skip",
        ),
        (
            "layer1.1",
            "lowrank",
            {"rank": 15},
            "layer1.1: conv1.weight: rank 15 learns 2400 numbers in place of its 2304; use a smaller rank; "
            "conv2.weight: rank 15 learns 2400 numbers in place of its 2304; use a smaller rank",
        ),
        ("layer1.1", "lowrank", {"rank": 14}, None),
        ("layr1.1", "scalar", {}, "layr1.1: unknown unit; did you mean 'layer1.1'?"),
        ("layer1.1", "scalr", {}, "layer1.1: unknown block 'scalr'; did you mean 'scalar'?"),
        ("layer1.1", "skip", {"init": "half"}, "layer1.1: unknown option 'init' of block 'skip' (it takes none)"),
    ],
)
def test_reasons(untouched_resnet32, units, unit: str, block: str, options: dict, reason: str | None) -> None:
    assert fits(untouched_resnet32, units, unit, block, options) == reason


def _reason(model: nn.Module, block: str, *shape: int, unit: str = "chain.1", **options: object) -> str | None:
    return fits(model, find_units(model, torch.empty(shape)), unit, block, options)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


@pytest.mark.parametrize("block", [name for name, kind in BLOCKS.items() if kind.needs_sources])
def test_attention_can_be_made(chain_net, block: str) -> None:
    model = chain_net(*(Attention() for _ in range(3)))
    options = {"rank": 1} if block == "lowrank" else {}
    assert (_reason(model, block, 1, 5, 8, **options) is None) == (block != "project")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.memory = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.memory(x)[0]
        return out


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_layer_that_no_block_can_make_is_named(chain_net, kind: type[nn.RNNBase]) -> None:
    model = chain_net(*(Recurrent(kind) for _ in range(3)))
    assert _reason(model, "skip", 1, 5, 8) is None
    reason = _reason(model, "scalar", 1, 5, 8, boundary="keep")
    assert reason is not None
    assert reason.startswith("chain.1: memory is a")
    assert kind.__name__ in reason


class Standardised(nn.Conv2d):
    """Computes with another weight than the one that it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("make", [lambda: Standardised(4, 4, 1), lambda: nn.ConvTranspose2d(4, 4, 1)])
def test_layers_that_are_not_known_compute_with_what_is_made(chain_net, policy_of, make) -> None:
    torch.manual_seed(0)
    model = chain_net(make(), make(), make())
    x = torch.randn(2, 4, 3, 3)
    assert _reason(model, "channel", 1, 4, 3, 3) is None
    first, layer, last = copy.deepcopy(model.chain)
    apply_policy(model, policy_of({"chain.1": ("scalar", {"init": "half"})}), x)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(layer, name).copy_((getattr(first, name) + getattr(last, name)) / 2)
        torch.testing.assert_close(model(x), last(layer(first(x))))


def test_a_weight_under_weight_normalisation_is_left_alone(chain_net) -> None:
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = chain_net(*(chain_net(weight_norm(nn.Linear(4, 4))) for _ in range(3)))
    reason = _reason(model, "scalar", 1, 4)
    assert reason is not None
    assert reason.startswith("chain.1: ")


def test_a_bias_that_a_source_lacks(chain_net) -> None:
    model = chain_net(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    expected = "chain.1: bias is (4,), its succeeding source chain.2 has none; use boundary: keep"
    assert _reason(model, "scalar", 1, 4) == expected
    assert _reason(model, "scalar", 1, 4, boundary="keep") is None


def test_keep_does_not_help_where_nothing_fits(chain_net) -> None:
    model = chain_net(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7))
    assert _reason(model, "scalar", 1, 4) == (
        "chain.1: weight is (6, 5), its preceding source chain.0 has (5, 4) and its succeeding source chain.2 has "
        "(7, 6); bias is (6,), its preceding source chain.0 has (5,) and its succeeding source chain.2 has (7,)"
    )
    reason = _reason(model, "scalar", 1, 4, boundary="keep")
    assert reason is not None
    assert reason.startswith("chain.1: ")


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


def test_a_unit_of_norms_has_nothing_to_make(chain_net) -> None:
    reason = _reason(chain_net(Norms(), Norms(), Norms()), "scalar", 1, 4)
    assert reason == "chain.1: it has no parameter that could be made from its sources"


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.linear(x[0]), x[1]


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(Pair(), Pair(), Pair())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.chain((x, x))[0]
        return out


def test_skip_needs_a_single_tensor() -> None:
    reason = "chain.1: its input or its output is not a single tensor, so that skip cannot stand in for it"
    assert _reason(OfPairs(), "skip", 2, 4) == reason
    assert _reason(OfPairs(), "scalar", 2, 4) is None


def test_asking_changes_nothing(untouched_resnet32: nn.Module, units: list[Unit]) -> None:
    model = copy.deepcopy(untouched_resnet32)
    before = [(name, type(module)) for name, module in model.named_modules()]
    for unit in units:
        for block in BLOCKS:
            fits(model, units, unit.name, block)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def test_tied_tensors_are_not_untied() -> None:
    model = nn.Sequential(*(Tied() for _ in range(3)))
    units = find_units(model, torch.empty(2, 4, device="meta"))
    reason = fits(model, units, "1", "scalar")
    assert reason is not None
    assert "first.weight is tied to another tensor" in reason


def test_a_layer_with_its_norm_and_activation_is_a_single_one_already() -> None:
    def element() -> nn.Module:
        return Element(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    model = nn.Sequential(element(), element(), element())
    units = find_units(model, torch.empty(2, 4, 8, 8, device="meta"))
    assert fits(model, units, "1", "scalar") is None
    reason = fits(model, units, "1", "scalar", {"operator": "single"})
    assert reason is not None
    assert "it is a single layer already; use operator: same" in reason


class Element(nn.Sequential):
    """An element of its own class, as torchvision's convolutions with norm and activation."""
