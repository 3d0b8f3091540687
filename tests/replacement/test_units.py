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
    units = [unit for unit in find_units(untouched_resnet32) if unit.role == "block"]
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


class Block(nn.Module):
    """Parts that run one after the other."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


def test_children_of_elements_are_roles_and_are_not_opened(chain_net: type) -> None:
    elements = [Block(norm=nn.LayerNorm(4), mlp=mlp(), act=nn.GELU(), inner=Block(fc=mlp())) for _ in range(3)]
    units = find_units(chain_net(*elements), torch.empty(2, 4))
    names = ("chain.{}", "chain.{}.mlp", "chain.{}.inner")
    assert [unit.name for unit in units] == [name.format(index) for index in range(3) for name in names]
    assert [unit.role for unit in units] == ["block", "mlp", "inner"] * 3
    assert {unit.chain for unit in units} == {"chain"}
    assert {unit.name: unit.sources for unit in units if unit.sources} == {
        name.format(1): (name.format(0), name.format(2)) for name in names
    }


def test_a_role_is_in_two_elements_at_least_under_one_name_and_class(chain_net: type) -> None:
    elements = [
        Block(fc=nn.Linear(4, 4), gate=nn.Linear(4, 4), odd=mlp(), down=nn.Linear(4, 4)),
        Block(fc=nn.Linear(4, 4), gate=nn.Linear(4, 4), odd=nn.Linear(4, 4)),
        Block(fc=nn.Linear(4, 4), gate=Block(fc=nn.Linear(4, 4))),
        Block(fc=nn.Linear(4, 4), gate=nn.Linear(4, 4)),
    ]
    units = find_units(chain_net(*elements), torch.empty(2, 4))
    assert [unit.name for unit in units if unit.role != "block"] == [
        *("chain.0.fc", "chain.0.gate", "chain.1.fc", "chain.1.gate", "chain.2.fc", "chain.3.fc", "chain.3.gate")
    ]
    sources = {unit.name: unit.sources for unit in units}
    assert sources["chain.1.gate"] == ("chain.0.gate", "chain.3.gate")
    assert sources["chain.2.fc"] == ("chain.1.fc", "chain.3.fc")
    assert sources["chain.3.gate"] is None


def test_two_classes_under_one_name_have_sources_of_their_own(chain_net: type) -> None:
    kinds = (lambda: nn.Linear(4, 4), lambda: Block(fc=nn.Linear(4, 4)))
    units = find_units(chain_net(*(Block(attn=kinds[i % 2](), fc=mlp()) for i in range(6))), torch.empty(2, 4))
    sources = {unit.name: unit.sources for unit in units if unit.role == "attn"}
    inner = {f"chain.{i}.attn": (f"chain.{i - 2}.attn", f"chain.{i + 2}.attn") for i in (2, 3)}
    assert sources == dict.fromkeys(f"chain.{i}.attn" for i in range(6)) | inner


def test_a_single_sequential_child_is_opened_as_far_as_it_goes(chain_net: type) -> None:
    elements = [Block(norm=nn.LayerNorm(4), f=nn.Sequential(nn.LayerNorm(4), mlp())) for _ in range(2)]
    assert _names(chain_net(*elements), 2, 4) == [
        *("chain.0", "chain.0.f.1.0", "chain.0.f.1.2", "chain.1", "chain.1.f.1.0", "chain.1.f.1.2")
    ]


def test_a_single_sequential_child_without_like_parts_is_a_role(chain_net: type) -> None:
    parts = [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(mlp(), nn.LayerNorm(4))]
    assert _names(chain_net(*(Block(f=part) for part in parts)), 2, 4) == [
        "chain.0",
        "chain.0.f",
        "chain.1",
        "chain.1.f",
    ]


def test_a_single_child_that_is_no_sequential_is_not_opened(chain_net: type) -> None:
    elements = [Block(f=Block(a=nn.Linear(4, 4), b=nn.Linear(4, 4))) for _ in range(2)]
    assert _names(chain_net(*elements), 2, 4) == ["chain.0", "chain.0.f", "chain.1", "chain.1.f"]


class Stage(nn.Sequential):
    """A subclass, as RegNet has for its stages."""


def test_a_stage_is_opened_and_a_block_of_single_layers_is_not() -> None:
    stages = [Stage(*(Block(a=nn.Linear(4, 4), b=nn.Linear(4, 4)) for _ in range(2))) for _ in range(2)]
    units = find_units(nn.Sequential(*stages), torch.empty(2, 4))
    assert [unit.name for unit in units if unit.role == "block"] == ["0.0", "0.1", "1.0", "1.1"]
    assert [unit.chain for unit in units if unit.role == "block"] == ["0", "0", "1", "1"]
    blocks = [Stage(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))) for _ in range(2)]
    units = find_units(nn.Sequential(*blocks), torch.empty(2, 4))
    assert [unit.name for unit in units] == ["0", "0.0", "0.1", "1", "1.0", "1.1"]
    assert [unit.role for unit in units] == ["block", "0", "1"] * 2


def test_a_plain_container_that_holds_a_chain_is_opened() -> None:
    stages = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
    assert _names(nn.Sequential(*stages), 2, 4) == ["0.0", "0.2", "1.0", "1.2"]


def test_plain_containers_without_a_chain_are_units() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)))
    units = find_units(model, torch.empty(1, 3, 8, 8))
    assert [unit.name for unit in units] == ["0", "0.0", "1", "1.0", "2", "2.0"]
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
            x = block(x, x * 2)
        return x


def test_units_of_several_inputs_have_no_input_shape() -> None:
    units = find_units(TwoInputs(), torch.empty(2, 4))
    assert [unit.input_shape for unit in units] == [None, None]
    assert [unit.output_shape for unit in units] == [(4,), (4,)]


class Gpt(nn.Module):
    """A language model in small: causal self-attention and MLPs over token ids, blocks run from last to first."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()
            self.norm = nn.LayerNorm(4)
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(x)
            x = x + self.attn(out, out, out, need_weights=False)[0]
            return x + self.mlp(x)

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(100, 4)
        self.blocks = nn.ModuleList(Gpt.Layer() for _ in range(4))
        self.head = nn.Linear(4, 100)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


def test_a_language_model_has_roles_in_the_order_in_which_they_run() -> None:
    units = find_units(Gpt(), torch.zeros(2, 6, dtype=torch.long))
    assert [unit.name for unit in units] == [
        f"blocks.{index}{role}" for index in (3, 2, 1, 0) for role in ("", ".attn", ".mlp")
    ]
    assert {unit.name: unit.sources for unit in units if unit.sources} == {
        f"blocks.{index}{role}": (f"blocks.{index + 1}{role}", f"blocks.{index - 1}{role}")
        for index in (2, 1)
        for role in ("", ".attn", ".mlp")
    }
    assert {unit.input_shape for unit in units} == {unit.output_shape for unit in units} == {(6, 4)}


def test_a_language_model_says_that_it_wants_token_ids() -> None:
    wanted = r"an nn\.Embedding of 100 ids: pass token ids, as example_input=torch\.zeros\(1, 16, dtype=torch\.long\)"
    with pytest.raises(ModelError, match=f"no convolution to guess an input from; .*{wanted}"):
        find_units(Gpt())
    with pytest.raises(ModelError, match=rf"Gpt cannot be run on an input of shape \(1, 6\): .*{wanted}"):
        find_units(Gpt(), torch.zeros(1, 6))


class Parts(nn.Module):
    """Calls its attention and its parts in the ways that user code does."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x, x, need_weights=self.weights)[0]
        return self.layers[0](x, x.flip(0), x)[0]


@pytest.mark.parametrize(("weights", "shape"), [(False, (6, 4)), (True, None)])
def test_attention_weights_are_a_second_output(weights: bool, shape: tuple[int, ...] | None) -> None:
    units = find_units(Parts(weights), torch.empty(2, 6, 4))
    assert [(unit.name, unit.input_shape, unit.output_shape) for unit in units] == [
        ("layers.0", (6, 4), shape),
        ("layers.1", (6, 4), shape),
    ]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=torch.zeros(6, 6))
        return x


def test_a_tensor_among_the_keywords_is_an_input() -> None:
    units = find_units(Masked(), torch.empty(2, 6, 4))
    assert [(unit.role, unit.input_shape) for unit in units] == [
        *(("block", None), ("self_attn", None), ("linear1", (6, 4)), ("linear2", (6, 8))),
    ] * 2


def test_a_model_without_a_chain_is_refused(chain_net: type) -> None:
    model = chain_net(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(ModelError, match=r"ChainNet has no unit to replace: none of its nn\.Sequential") as caught:
        find_units(model, torch.empty(1, 3, 8, 8))
    assert "  - chain (Sequential): Conv2d, ReLU, BatchNorm2d, Flatten\n" in str(caught.value)


def test_layers_that_stand_beside_each_other_are_named() -> None:
    with pytest.raises(ModelError, match=r"the model itself \(Block\): 2 Linear, but this is no nn\.Sequential"):
        find_units(Block(a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.empty(2, 4))


def test_an_input_that_the_model_cannot_take_is_refused(untouched_resnet32: nn.Module) -> None:
    message = (
        r"CifarResNet cannot be run on an input of shape \(1, 7, 32, 32\): .*pass example_input=torch.zeros\(1, 3, h"
    )
    with pytest.raises(ModelError, match=message):
        find_units(untouched_resnet32, torch.empty(1, 7, 32, 32, device="meta"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7)),
            r"no convolution .* example_input=torch.zeros\(1, \.\.\., 7\)",
        ),
        (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)), "no convolution .*pass example_input= "),
        (nn.Sequential(nn.Conv2d(5, 1, 1), nn.Flatten(), nn.Linear(7, 7)), r"accepts no guessed .*zeros\(1, 5, height"),
    ],
)
def test_an_input_that_cannot_be_guessed_is_asked_for(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_units(model)


def test_elements_are_counted_once_a_storage() -> None:
    whole = torch.zeros(12)
    assert count_elements([whole[:4], whole[4:], torch.zeros(3)]) == 15
    assert count_elements([whole, whole.view(3, 4), whole]) == 12
    tied = nn.Linear(4, 4, bias=False)
    assert count_elements([tied.weight, nn.Parameter(tied.weight.detach())]) == 16
