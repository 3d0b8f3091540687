"""The predicted memory is the peak of the real step: every storage counted from when it comes to when it goes."""

from __future__ import annotations

import random

import pytest
import torch
from random_policies import random_policy
from torch import Tensor, nn
from whole_step import whole_step

from rlsearch import Policy, Replacement, TrainingSpec, apply_policy, build_model
from rlsearch.training.cost import CostModel
from rlsearch.training.sizes import Sizes
from rlsearch.training.storages import Storages, peak_bytes

BATCH = 4


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "optimizer", "precision", "blocks"),
    [
        ("resnet20", 16, {}, "sgd", "fp32", 0),
        ("resnet32", 16, {}, "adamw", "fp32", 0),
        ("vgg11_bn", 32, {"small_head": True}, "sgd", "fp32", 0),
        ("resnet20", 16, {}, "adamw", "bf16", 1),
        ("vit_tiny", 16, {"image_size": 16}, "adamw", "fp32", 0),
    ],
)
def test_the_peak_is_that_of_the_real_step(
    name: str, size: int, kwargs: dict[str, object], optimizer: str, precision: str, blocks: int
) -> None:
    """To the byte; with bf16 to one of the allocator's smallest blocks."""
    source, shape = random.Random(1), (3, size, size)
    costs = CostModel(build_model(name, **kwargs), shape, BATCH, optimizer, precision)
    training = TrainingSpec(optimizer=optimizer, precision=precision)
    for policy in (Policy(), random_policy(costs.plan, costs.units, source)):
        peak, _ = whole_step(lambda: build_model(name, **kwargs), policy, (BATCH, *shape), training, costs.units)
        assert peak <= costs.cost(policy).memory <= peak + 512 * blocks, policy.replacements


@pytest.mark.parametrize(
    ("name", "optimizer", "precision", "kwargs", "blocks"),
    [("resnet20", "sgd", "bf16", {}, 1), ("vit_tiny", "adamw", "fp32", {"image_size": 16}, 0)],
)
def test_so_it_is_at_every_cut(
    name: str, optimizer: str, precision: str, kwargs: dict[str, object], blocks: int
) -> None:
    source, shape = random.Random(2), (3, 16, 16)
    costs = CostModel(build_model(name, **kwargs), shape, BATCH, optimizer, precision)
    training = TrainingSpec(optimizer=optimizer, precision=precision)
    last = len(costs.segments) - 1
    for policy, cuts in ((Policy(), (1, last)), (random_policy(costs.plan, costs.units, source), (2, last // 2))):
        for cut in cuts:
            for stored in (False, True):
                peak, learning = whole_step(
                    lambda: build_model(name, **kwargs),
                    policy,
                    (BATCH, *shape),
                    training,
                    costs.units,
                    cut=cut,
                    stored=stored,
                )
                predicted = costs.memory_at(policy, cut, learning, stored=stored)
                assert peak <= predicted <= peak + 512 * blocks, (cut, stored)
        sizes = Sizes.of(_replaced(build_model(name, **kwargs), policy, costs))
        assert costs.memory_at(policy, 0, sizes) == costs.cost(policy).memory


def _replaced(model: nn.Module, policy: Policy, costs: CostModel) -> nn.Module:
    apply_policy(model, policy, units=costs.units)
    return model


def test_a_unit_that_is_left_out_behind_the_cut_passes_no_gradient_on() -> None:
    policy, shape = Policy(replacements=(Replacement("layer1.1", "skip"),)), (3, 16, 16)
    costs = CostModel(build_model("resnet20"), shape, BATCH)
    assert costs.segments[2].name == "layer1.1"
    assert costs.image_flops(policy, 2) == costs.image_flops(policy, 3)
    peak, learning = whole_step(
        lambda: build_model("resnet20"), policy, (BATCH, *shape), TrainingSpec(), costs.units, cut=2, stored=True
    )
    assert costs.memory_at(policy, 2, learning, stored=True) == peak


def test_sources_that_learn_through_other_units_have_their_gradients_early() -> None:
    """So many borrowed parameters, and so few images, that the backward pass holds the most."""
    shape = (3, 8, 8)
    names = [f"layer3.{index}" for index in (2, 3)]
    options = {"sources": "nearest", "neighbours": "attached"}
    policy = Policy(replacements=tuple(Replacement(name, "scalar", options) for name in names))
    costs = CostModel(build_model("resnet32"), shape, 2)
    peak, _ = whole_step(lambda: build_model("resnet32"), policy, (2, *shape), TrainingSpec(), costs.units)
    assert costs.cost(policy).memory == peak


class Entangled(nn.Module):
    """Three like units that no cut can part, and whose places decide what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))

    def forward(self, images: Tensor) -> Tensor:
        first = self.units[0](images).sigmoid()
        second = self.units[1](first)
        return (self.units[2](second) * second + images).mean((2, 3))


def test_where_in_its_segment_a_unit_is_counts() -> None:
    costs = CostModel(Entangled(), (3, 16, 16), BATCH)
    assert [segment.units for segment in costs.segments if segment.units] == [("units.0", "units.1", "units.2")]
    found = []
    for unit in ("units.0", "units.1"):
        policy = Policy(replacements=(Replacement(unit, "skip"),))
        found.append(costs.cost(policy).memory)
        assert found[-1] == whole_step(Entangled, policy, (BATCH, 3, 16, 16), TrainingSpec(), costs.units)[0]
    assert found[0] != found[1]


def test_storages_come_and_go() -> None:
    with Storages() as log:
        first = torch.zeros(100)  # a block of 512 bytes
        second = first + 1
        second.view(10, 10).add_(1)  # of the same storage
        del first
        third = torch.zeros(129)  # two blocks
        del second, third
    assert [num_bytes for _, num_bytes in log.events] == [512, 512, -512, 1024, -512, -1024]
    assert peak_bytes(log.events) == 1536
    assert peak_bytes(log.events[2:], start=1024) == 1536
