"""What a replaced unit keeps for the backward pass: never a made tensor, and never more than a dense unit keeps."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import apply_policy

LEARNING = ["scalar", "angle", "coupled", "channel", "lowrank", "project"]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 6, 3, padding=1), (2, 6, 10)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3, padding=1), (2, 6, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 6, 3, padding=1), (2, 6, 4, 3, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), (2, 8, 7, 5)),
    "linear": (lambda: nn.Linear(24, 24), (5, 24)),
    "linear on tokens": (lambda: nn.Linear(24, 24), (2, 7, 24)),
    "attention": (lambda: Attention(), (2, 7, 24)),
    "attention in a block": (lambda: Block(), (2, 7, 24)),
    "convolutions in a block": (lambda: Residual(), (2, 6, 7, 5)),
}


class Attention(nn.Module):
    """Self-attention on (N, T, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Block(nn.Module):
    """A block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Residual(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + x)


class Watch(TorchDispatchMode):
    """Remembers all storages that come into being, but those of ``known`` tensors, and keeps none of them alive."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    reference = StorageWeakRef(storage)
                    self.seen[reference.cdata] = (reference, storage.nbytes())
        return out

    def alive(self) -> list[int]:
        """The bytes of each storage of more than one number that is still there."""
        gc.collect()
        return sorted(size for reference, size in self.seen.values() if size > 8 and not reference.expired())


def _units(layer: str, block: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor, set[tuple[int, ...]]]:
    """A chain of three units with the middle one replaced, the untouched chain, an input of the unit, and the shapes
    of what is made."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    dense = nn.Sequential(*(make() for _ in range(3)))
    replaced = copy.deepcopy(dense)
    if block in ("lowrank", "project"):
        options["rank"] = 1
    report = apply_policy(replaced, Policy(replacements=(Replacement("1", block, options),)), torch.empty(shape))
    made = {tuple(dense[1].get_parameter(name).shape) for name in report.replaced[0].composed}
    assert {name for name, _ in dense[1].named_parameters() if "norm" not in name and "bn" not in name} == set(
        report.replaced[0].composed
    )
    return replaced, dense, torch.randn(shape, requires_grad=True), made


def _saved(model: nn.Module, x: Tensor) -> tuple[dict[int, int], list[Tensor]]:
    """Bytes by storage of what autograd keeps for the middle unit beside parameters and buffers, and the tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = model[1](x)
    # Single numbers, as the cosine of an angle, may be kept.
    kept = [tensor for tensor in kept if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    out.sum().backward()
    return found, kept


@pytest.mark.parametrize("block", LEARNING)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_unit_keeps_what_a_dense_one_keeps(layer: str, block: str) -> None:
    replaced, dense, x, made = _units(layer, block)
    found, kept = _saved(replaced, x)
    expected, _ = _saved(dense, x)
    assert sorted(found.values()) == sorted(expected.values())
    assert not made & {tuple(tensor.shape) for tensor in kept}
    transposed = {tuple(reversed(shape)) for shape in made if len(shape) == 2}
    assert not transposed & {tuple(tensor.shape) for tensor in kept}


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d", "grouped conv2d", "linear", "linear on tokens"])
@pytest.mark.parametrize("block", LEARNING)
def test_a_bare_layer_keeps_its_input_and_nothing_else(layer: str, block: str) -> None:
    replaced, _, x, _ = _units(layer, block)
    assert set(_saved(replaced, x)[0]) == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d", "grouped conv2d", "linear", "linear on tokens"])
def test_a_constant_layer_keeps_neither_weight_nor_input(layer: str) -> None:
    replaced, _, x, _ = _units(layer, "constant")
    assert _saved(replaced, x)[0] == {}
    assert x.grad is not None


@pytest.mark.parametrize("layer", ["attention", "attention in a block", "convolutions in a block"])
def test_a_constant_unit_keeps_less_than_a_dense_one(layer: str) -> None:
    replaced, dense, x, made = _units(layer, "constant")
    found, kept = _saved(replaced, x)
    expected, _ = _saved(dense, x)
    assert sum(found.values()) < sum(expected.values())
    assert not made & {tuple(tensor.shape) for tensor in kept}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_lazy_pass_keeps_what_a_constant_one_keeps(layer: str) -> None:
    lazy, _, x, _ = _units(layer, "scalar", update_every=2)
    constant, dense, _, _ = _units(layer, "constant")
    assert sorted(_saved(lazy, x)[0].values()) == sorted(_saved(dense, x)[0].values())
    assert sorted(_saved(lazy, x)[0].values()) == sorted(_saved(constant, x)[0].values())


@pytest.mark.parametrize("block", [*LEARNING, "constant"])
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_that_the_forward_pass_made_outlives_it_unseen(layer: str, block: str) -> None:
    """What lives on after the forward pass, whoever holds it, and not only what autograd was handed."""
    replaced, dense, x, _ = _units(layer, block)
    alive = []
    for model in (replaced, dense):
        model[1](x).sum().backward()
        with Watch(x, *model.parameters(), *model.buffers()) as watch:
            out = model[1](x)
        alive.append(watch.alive())
        del out
    # Dense attention copies what it is given.
    assert sum(alive[0]) <= sum(alive[1])
    assert block == "constant" or "attention" in layer or alive[0] == alive[1]


@pytest.mark.parametrize("block", [*LEARNING, "constant"])
@pytest.mark.parametrize("layer", ["conv2d", "linear", "attention in a block", "convolutions in a block"])
def test_nothing_is_left_after_the_backward_pass(layer: str, block: str) -> None:
    replaced, _, x, _ = _units(layer, block)
    for _ in range(2):
        replaced.zero_grad()
        with Watch(x, *replaced.parameters(), *replaced.buffers()) as watch:
            out = replaced[1](x)
            out.sum().backward()
        del out
        gradients = {
            tensor.grad.untyped_storage().data_ptr()
            for tensor in [x, *replaced.parameters()]
            if tensor.grad is not None
        }
        assert len(watch.alive()) <= len(gradients)
        x.grad = None


def test_plain_autograd_would_keep_the_weight() -> None:
    """The measure measures."""
    _, dense, x, _ = _units("linear", "scalar")
    weights = [dense[index].weight for index in (0, 2)]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        nn.functional.linear(x, 0.5 * weights[0] + 0.5 * weights[1])
    assert (24, 24) in kept
