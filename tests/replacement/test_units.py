"""Units are found in the order in which the model runs them, with their sources and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.replacement import Unit, find_units
from rlsearch.replacement.units import count_elements


def _names(model: nn.Module, *shape: int) -> list[str]:
    return [unit.name for unit in find_units(model, torch.empty(shape, device="meta"))]


def test_resnet32_has_three_chains_of_five_blocks(untouched_resnet32: nn.Module) -> None:
    units = find_units(untouched_resnet32)
    assert [unit.name for unit in units] == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(5)]
    assert units[3] == Unit(
        name="layer1.3",
        chain="layer1",
        role="block",
        sources=("layer1.2", "layer1.4"),
        num_params=2 * 16 * 16 * 9 + 4 * 16,
        input_shape=(16, 32, 32),
        output_shape=(16, 32, 32),
    )
    assert units[5].input_shape == (16, 32, 32)
    assert units[5].output_shape == (32, 16, 16)
    assert [unit.name for unit in units if unit.sources is None] == [
        f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 4)
    ]


def test_finding_units_neither_runs_nor_changes_the_model(resnet32: nn.Module) -> None:
    before = {key: tensor.clone() for key, tensor in resnet32.state_dict().items()}
    generator = torch.get_rng_state()
    find_units(resnet32)
    assert resnet32.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[key]) for key, tensor in resnet32.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet32.modules())


def test_a_model_without_memory_has_units_too(untouched_resnet32: nn.Module) -> None:
    with torch.device("meta"):
        meta = type(untouched_resnet32)(depth=32)
    assert find_units(meta, torch.empty(2, 3, 32, 32, device="meta")) == find_units(untouched_resnet32)


def test_one_example_is_enough_for_batch_norm(chain_net: type) -> None:
    """In training mode, batch norm refuses a single value a channel."""
    model = chain_net(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    assert _names(model, 1, 4) == ["chain.0", "chain.2"]


class Backwards(nn.Module):
    """Registers its blocks in one order and runs them in the other; one is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index in (3, 1, 0):
            x = self.blocks[index](x)
        return x


def test_order_and_sources_are_those_of_the_forward_pass() -> None:
    units = find_units(Backwards(), torch.empty(2, 4))
    assert [unit.name for unit in units] == ["blocks.3", "blocks.1", "blocks.0"]
    assert units[1].sources == ("blocks.3", "blocks.0")


def test_norms_and_layers_without_parameters_may_stand_between_units(chain_net: type) -> None:
    model = chain_net(
        *[nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()],
        *[nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 4 * 4, 4), nn.Linear(4, 4)],
    )
    units = find_units(model, torch.empty(2, 3, 18, 18))
    assert [unit.name for unit in units] == ["chain.0", "chain.4", "chain.6", "chain.10", "chain.11"]
    assert units[1].sources == ("chain.0", "chain.6")
    assert [unit.chain for unit in units] == ["chain[0..6]"] * 3 + ["chain[10..11]"] * 2


def test_nothing_inside_a_unit_is_a_unit(chain_net: type) -> None:
    mlps = [nn.Sequential(nn.LayerNorm(4), chain_net(nn.Linear(4, 4), nn.Linear(4, 4))) for _ in range(2)]
    assert _names(chain_net(*(chain_net(*mlps) for _ in range(3))), 2, 4) == ["chain.0", "chain.1", "chain.2"]


def test_a_plain_container_that_holds_a_chain_is_opened() -> None:
    stages = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
    assert _names(nn.Sequential(*stages), 2, 4) == ["0.0", "0.2", "1.0", "1.2"]


def test_plain_containers_without_a_chain_are_units() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)))
    units = find_units(model, torch.empty(1, 3, 8, 8))
    assert [unit.name for unit in units] == ["0", "1", "2"]
    assert {unit.chain for unit in units} == {"model"}


def test_a_block_that_runs_twice_is_one_unit() -> None:
    shared = nn.Linear(4, 4)
    assert _names(nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared), 2, 4) == ["0", "1", "2"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Bilinear(4, 4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x)
        return x


def test_units_of_several_inputs_have_no_input_shape() -> None:
    units = find_units(TwoInputs(), torch.empty(2, 4))
    assert [unit.input_shape for unit in units] == [None, None]
    assert [unit.output_shape for unit in units] == [(4,), (4,)]


def test_a_model_without_a_chain_is_refused(chain_net: type) -> None:
    with pytest.raises(ModelError, match=r"ChainNet has no unit to replace: none of its nn\.Sequential"):
        find_units(chain_net(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten()), torch.empty(1, 3, 8, 8))


def test_an_input_that_the_model_cannot_take_is_refused(untouched_resnet32: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"CifarResNet cannot be run on an input of shape \(1, 7, 32, 32\)"):
        find_units(untouched_resnet32, torch.empty(1, 7, 32, 32, device="meta"))


def test_elements_are_counted_once_a_storage() -> None:
    whole = torch.zeros(12)
    assert count_elements([whole[:4], whole[4:], torch.zeros(3)]) == 15
    assert count_elements([whole, whole.view(3, 4), whole]) == 12
    tied = nn.Linear(4, 4, bias=False)
    assert count_elements([tied.weight, nn.Parameter(tied.weight.detach())]) == 16
