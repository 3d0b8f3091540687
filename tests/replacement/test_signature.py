"""Signatures: equal for what costs the same, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlsearch.model_graph import split
from rlsearch.replacement.signature import graph_signature, module_signature
from rlsearch.training.models import build_model


class Scaled(nn.Module):
    """A linear layer and a setting of any kind."""

    def __init__(self, setting: object = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


def frozen() -> nn.Module:
    module = nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    return module


def hooked() -> nn.Module:
    module = nn.Linear(3, 3)
    module.register_forward_hook(lambda *_: None)
    return module


def repeated() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, layer)


def test_equal_blocks_have_equal_signatures() -> None:
    model = build_model("resnet20")
    signatures = [module_signature(model.get_submodule(f"layer{stage}.{i}")) for stage in (1, 2, 3) for i in (0, 1, 2)]
    assert [signatures.index(signature) for signature in signatures] == [0, 0, 0, 3, 4, 4, 6, 7, 7]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: nn.Conv2d(2, 2, 3), lambda: nn.Conv2d(2, 2, 3, padding=1)),
        (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3, bias=False)),
        (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3, dtype=torch.float64)),
        (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3).eval()),
        (lambda: nn.Linear(3, 3), frozen),
        (lambda: nn.Linear(3, 3), hooked),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tied),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), repeated),
        (lambda: Scaled(1), lambda: Scaled(True)),
        (lambda: Scaled([1, 2]), lambda: Scaled([2, 1])),
        (lambda: Scaled({"a": 1}), lambda: Scaled({"a": 2})),
        (lambda: Scaled(object()), lambda: Scaled(object())),
        (lambda: nn.Dropout(0.0), lambda: nn.Dropout(0.5)),
    ],
)
def test_what_may_cost_something_else_differs(one: Callable[[], nn.Module], other: Callable[[], nn.Module]) -> None:
    assert module_signature(one()) != module_signature(other())


@pytest.mark.parametrize(
    "make",
    [tied, frozen, repeated, lambda: Scaled([1, {"a": (torch.float32, nn.ReLU, len)}]), lambda: nn.Dropout(0.5)],
)
def test_what_is_built_alike_is_alike(make: Callable[[], nn.Module]) -> None:
    assert module_signature(make()) == module_signature(make())


def test_a_rate_between_none_and_all_plays_no_part() -> None:
    assert module_signature(nn.Dropout(0.5)) == module_signature(nn.Dropout(0.1))


def test_segments_are_alike_whatever_the_names_in_them() -> None:
    model = build_model("resnet20")
    segments = split(model, [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1, 2)])
    signatures = [graph_signature(segment.module) for segment in segments]
    assert [signatures.index(signature) for signature in signatures] == [0, 1, 1, 1, 4, 5, 5, 7, 8, 8, 10]
