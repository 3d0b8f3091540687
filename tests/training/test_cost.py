"""Costs are exact: what is summed over segments is what a real step of the real model takes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from random_policies import random_policy
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rlsearch import Policy, Replacement, apply_policy, build_model, estimate_cost
from rlsearch.errors import ConfigError, ModelError, SurgeryError
from rlsearch.replacement import learnable_params
from rlsearch.training.cost import CostModel
from rlsearch.training.kinds import Kinds
from rlsearch.training.loop import TrainingSpec, autocast, build_optimizer

SHAPE = (3, 16, 16)
BATCH = 4


def measured(
    model: nn.Module, optimizer_name: str, shape: tuple[int, ...] = SHAPE, precision: str = "fp32"
) -> tuple[int, int]:
    """Forward FLOPs and step FLOPs of a batch, read off a real step."""
    model.train()
    optimizer = build_optimizer(TrainingSpec(optimizer=optimizer_name), model)
    with FlopCounterMode(display=False) as counter:
        # The hooks spare torch's check that nothing saved was changed in place, as by the ReLUs around a skipped unit.
        with autocast(precision, torch.device("cpu")), saved_tensors_hooks(lambda t: t, lambda t: t):
            logits = model(torch.randn(BATCH, *shape))
        forward = counter.get_total_flops()
        F.cross_entropy(logits.float(), torch.zeros(BATCH, dtype=torch.int64), reduction="sum").backward()
        optimizer.step()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "optimizer", "precision", "size", "kwargs"),
    [
        ("resnet20", "sgd", "fp32", 16, {}),
        ("resnet20", "adamw", "bf16", 16, {}),
        ("resnet18", "adamw", "fp32", 16, {}),
        ("resnet50", "sgd", "fp32", 16, {}),
        ("vgg11", "sgd", "fp32", 32, {"small_head": True}),
        ("vit_tiny", "adamw", "fp32", 16, {"image_size": 16}),
        ("vit_tiny_patch16_224", "sgd", "bf16", 16, {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 5}),
    ],
)
def test_the_sum_over_segments_is_the_whole_step(
    name: str, optimizer: str, precision: str, size: int, kwargs: dict[str, object]
) -> None:
    source = random.Random(1)
    shape = (3, size, size)
    costs = CostModel(build_model(name, **kwargs), shape, BATCH, optimizer, precision)
    assert len(costs.segments) > 3
    for policy in [Policy(), *(random_policy(costs.plan, costs.units, source) for _ in range(3))]:
        model = build_model(name, **kwargs)
        apply_policy(model, policy, units=costs.units)
        cost = costs.cost(policy)
        forward, step = measured(model, optimizer, shape, precision)
        assert cost.params == learnable_params(model)
        assert (cost.forward_flops * BATCH, cost.step_flops * BATCH) == (forward, step), policy.replacements


def test_attention_is_counted() -> None:
    costs = CostModel(build_model("vit_tiny", image_size=16), SHAPE, BATCH)
    tokens, width, mlp = 17, 192, 768
    linear = 12 * tokens * width * (4 * width + 2 * mlp) + 16 * 3 * 4 * 4 * width + 10 * width
    attention = 12 * 2 * tokens * tokens * width
    cost = costs.cost(Policy())
    assert cost.forward_flops == 2 * (linear + attention)
    # The backward pass computes the attention weights again, and needs no gradient of the images.
    assert cost.step_flops == 2 * (3 * linear - 16 * 3 * 4 * 4 * width + 3.5 * attention)


def passes(model: nn.Module, count: int) -> float:
    """The mean FLOPs of the model's first training steps."""
    images, flops = torch.randn(BATCH, *SHAPE), []
    model.train()
    for _ in range(count):
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(images), torch.zeros(BATCH, dtype=torch.int64)).backward()
        flops.append(counter.get_total_flops())
    return sum(flops) / count


def test_units_that_learn_in_some_passes_cost_their_average() -> None:
    policy = Policy(
        replacements=(
            Replacement("layer1.1.conv1", "scalar", {"update_every": 2}),
            Replacement("layer1.1.conv2", "channel", {"update_every": 3}),
            Replacement("layer2.1.conv2", "angle", {"update_every": 3}),
        )
    )
    model = build_model("resnet20")
    report = apply_policy(model, policy)
    cost = CostModel(build_model("resnet20"), SHAPE, BATCH).cost(policy)
    assert cost.step_flops * BATCH == pytest.approx(passes(model, 6), rel=1e-12)
    assert cost.params == report.params_after


def test_the_sources_are_those_that_the_whole_policy_leaves() -> None:
    """Beside layer2.1, layer2.2 borrows from layer2.0, whose first convolution is narrower; alone it would not."""
    project = Replacement("layer2.2", "project", {"sources": "nearest", "rank": 1})
    skip = Replacement("layer2.1", "skip")
    costs = CostModel(build_model("resnet32"), SHAPE, BATCH)
    found = {}
    for name, replacements in {"both": (skip, project), "project": (project,), "skip": (skip,), "none": ()}.items():
        policy = Policy(replacements=replacements)
        model = build_model("resnet32")
        apply_policy(model, policy)
        found[name] = costs.cost(policy)
        flops = found[name].step_flops * BATCH
        assert (found[name].params, flops) == (learnable_params(model), passes(model, 1)), name
    assert [step.sources for step in costs.plan(Policy(replacements=(skip, project)))] == [
        None,
        ("layer2.0", "layer2.3"),
    ]
    assert found["both"].params - found["skip"].params != found["project"].params - found["none"].params


@pytest.mark.parametrize(("name", "kwargs"), [("resnet32", {}), ("vit_tiny", {"image_size": 16})])
def test_what_is_shared_is_what_would_be_measured(
    name: str, kwargs: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = CostModel(build_model(name, **kwargs), SHAPE, BATCH)
    monkeypatch.setattr(Kinds, "of_segment", lambda self, module, setting: object())
    monkeypatch.setattr(
        Kinds, "of_step", lambda self, step: (step.unit.name, step.block, str(step.options), step.sources)
    )
    monkeypatch.setattr(Kinds, "of_measurement", Kinds.of_step)
    unshared = CostModel(build_model(name, **kwargs), SHAPE, BATCH)
    monkeypatch.undo()
    source = random.Random(5)
    for policy in [Policy(), *(random_policy(shared.plan, shared.units, source) for _ in range(4))]:
        assert shared.cost(policy) == unshared.cost(policy), policy.replacements
    assert len(shared._measured._costs) < 0.8 * len(unshared._measured._costs)


def test_blocks_that_weigh_two_weights_are_measured_once() -> None:
    costs = CostModel(build_model("resnet32"), SHAPE, BATCH)
    costs.cost(Policy())
    measured_before = len(costs._measured._costs)
    found = {
        block: costs.cost(Policy(replacements=(Replacement(unit, block),)))
        for unit, block in [
            ("layer1.1", "scalar"),
            ("layer1.2", "angle"),
            ("layer1.3", "coupled"),
            ("layer1.1", "channel"),
        ]
    }
    # The block, and its preceding source, whose gradient is begun behind it.
    assert len(costs._measured._costs) == measured_before + 2
    assert [cost.params - found["angle"].params for cost in found.values()] == [1, 0, 0, 63]


def test_the_model_looked_at_is_put_together_again() -> None:
    costs = CostModel(build_model("resnet20"), SHAPE, BATCH)
    modules = [costs._measured.model, *(segment.module for segment in costs.segments)]

    def state() -> list[tuple[str, int]]:
        return [(name, id(part)) for module in modules for name, part in module.named_modules(remove_duplicate=False)]

    before, baseline = state(), costs.cost(Policy())
    costs.cost(random_policy(costs.plan, costs.units, random.Random(3)))
    costs.cost(Policy(replacements=(Replacement("layer1.1", "skip"), Replacement("layer2.1.conv2", "scalar"))))
    assert state() == before
    assert costs.cost(Policy()) == baseline
    assert all(parameter.grad is None for parameter in costs._measured.model.parameters())


class Tied(nn.Module):
    """Four convolutions; the weight of the second is the last one's too."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(4)))
        self.units[3].weight = self.units[1].weight

    def forward(self, images: Tensor) -> Tensor:
        return self.units(images).mean((2, 3))


@pytest.mark.parametrize("unit", ["units.1", "units.2"])
def test_tied_weights_count_while_one_unit_holds_them(unit: str) -> None:
    policy = Policy(replacements=(Replacement(unit, "scalar"),))
    model = Tied()
    report = apply_policy(model, policy)
    cost = CostModel(Tied(), SHAPE, BATCH).cost(policy)
    assert cost.params == report.params_after == learnable_params(model)
    assert cost.params == {"units.1": 3 * 81 + 2, "units.2": 2 * 81 + 2}[unit]


def test_dropped_segments_cost_nothing() -> None:
    costs = CostModel(build_model("resnet20"), SHAPE, BATCH)
    policy = Policy(replacements=(Replacement("layer1.1", "skip"),))
    forward, step = costs.image_flops(policy, 0)
    cuts = [costs.image_flops(policy, cut) for cut in range(len(costs.segments))]
    assert cuts[0] == (forward, step)
    for cut, (active_forward, active_step) in enumerate(cuts):
        assert active_forward + costs.forward_flops(policy, 0, cut) == pytest.approx(forward)
        assert active_step <= step
    # The skipped unit is the third segment: dropping it takes nothing away.
    assert cuts[3][0] == cuts[2][0]
    # The head alone: a linear layer's forward pass and the gradient of its weight, not of its input.
    assert cuts[-1] == (2 * 64 * 10, 2 * 2 * 64 * 10)


def test_a_model_that_cannot_be_traced_is_costed_whole() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model("resnet20")

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images) if images.numel() else images

    costs = CostModel(Untraceable(), SHAPE, BATCH)
    assert len(costs.segments) == 1
    plain = CostModel(build_model("resnet20"), SHAPE, BATCH)
    skipped = costs.cost(Policy(replacements=(Replacement("net.layer1.1", "skip"),)))
    assert skipped == plain.cost(Policy(replacements=(Replacement("layer1.1", "skip"),)))


def test_the_model_is_left_alone_and_may_be_on_meta() -> None:
    with torch.device("meta"):
        model = build_model("resnet32")
    policy = Policy(replacements=(Replacement("layer1.3", "scalar"), Replacement("layer2.2", "scalar")))
    cost = estimate_cost(model, policy, (3, 32, 32), 128)
    # METHODS, section 3: every fourth block of ResNet-32 that fits its sources.
    assert (cost.params, cost.params_total) == (443_870, 466_906)
    assert learnable_params(model) == 466_906
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_changed_model_is_looked_at_again() -> None:
    model = build_model("resnet20")
    before = estimate_cost(model, Policy(), SHAPE, BATCH)
    apply_policy(model, Policy(replacements=(Replacement("layer1.1", "skip"),)))
    assert estimate_cost(model, Policy(), SHAPE, BATCH).params == before.params - 4672


def test_a_model_without_logits_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    with pytest.raises(ModelError, match=r"must give logits \(images, classes\), it gives \(4, 3, 16, 16\)"):
        CostModel(model, SHAPE, BATCH)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [(((3, 0, 16), 4), "input_shape"), (((3, 16, 16), 0), "batch_size"), (((3, 16, 16), 4, "sdg"), "optimizer")],
)
def test_wrong_arguments_are_named(arguments: tuple[object, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        estimate_cost(build_model("resnet20"), Policy(), *arguments)  # type: ignore[arg-type]


def test_a_policy_that_does_not_fit_is_refused() -> None:
    costs = CostModel(build_model("resnet20"), SHAPE, BATCH)
    policy = Policy(replacements=(Replacement("layer1.1", "scalar"), Replacement("layer1.2", "skip")))
    with pytest.raises(SurgeryError, match=r"layer1\.2"):
        costs.cost(policy)
