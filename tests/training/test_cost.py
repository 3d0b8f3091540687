"""Costs are exact: what is summed over segments is what a real step of the real model takes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rlsearch import Policy, Replacement, apply_policy, build_model, estimate_cost, find_units
from rlsearch.errors import ConfigError, SurgeryError
from rlsearch.replacement import BLOCKS, fits, learnable_params
from rlsearch.training.cost import CostModel
from rlsearch.training.loop import TrainingSpec, build_optimizer

SHAPE = (3, 16, 16)
BATCH = 4


def random_policy(model: nn.Module, source: random.Random) -> Policy:
    """Replacements that keep clear of each other: no unit borrows from a replaced one."""
    units = find_units(model)
    chosen: dict[str, str] = {}
    locked: set[str] = set()
    for unit in source.sample(units, len(units)):
        block = source.choice(sorted(BLOCKS))
        sources = set(unit.sources or ()) if BLOCKS[block].needs_sources else set()
        if (
            unit.name in locked
            or sources & chosen.keys()
            or fits(model, units, unit.name, block)
            or source.random() < 0.3
        ):
            continue
        chosen[unit.name] = block
        locked |= sources
    return Policy(replacements=tuple(Replacement(unit, block) for unit, block in sorted(chosen.items())))


def measured(model: nn.Module, optimizer_name: str) -> tuple[int, int, int]:
    """Forward FLOPs and step FLOPs of a batch, and the bytes of a training step, all read off a real step."""
    model.train()
    images = torch.randn(BATCH, *SHAPE)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)
        forward = counter.get_total_flops()
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64), reduction="sum")
        loss.backward()
    optimizer = build_optimizer(TrainingSpec(optimizer=optimizer_name), model)
    optimizer.step()
    held = [*model.parameters(), *model.buffers()]
    held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # The step count that AdamW keeps for every tensor is not of the tensor's size, and is left out.
    held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    everything = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [images, *saved.values(), *held]
    }
    return forward, counter.get_total_flops(), sum(everything.values())


@pytest.mark.parametrize(("name", "optimizer"), [("resnet20", "sgd"), ("resnet18", "adamw"), ("resnet50", "sgd")])
def test_the_sum_over_segments_is_the_whole_step(name: str, optimizer: str) -> None:
    source = random.Random(1)
    costs = CostModel(build_model(name), SHAPE, BATCH, optimizer)
    for policy in [Policy(), *(random_policy(build_model(name), source) for _ in range(3))]:
        model = build_model(name)
        apply_policy(model, policy)
        cost = costs.cost(policy)
        forward, step, memory = measured(model, optimizer)
        assert cost.params == learnable_params(model)
        assert (cost.forward_flops * BATCH, cost.step_flops * BATCH) == (forward, step)
        # Tensors of a few elements (means of one value, scalars of the loss) may be kept by one path alone.
        assert cost.memory == pytest.approx(memory, rel=1e-3)


def test_memory_of_the_untouched_model_is_exact() -> None:
    costs = CostModel(build_model("resnet20"), SHAPE, BATCH)
    assert costs.cost(Policy()).memory == pytest.approx(measured(build_model("resnet20"), "sgd")[2], abs=64)


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


def test_precision_changes_what_is_saved() -> None:
    full = CostModel(build_model("resnet20"), SHAPE, 64).cost(Policy())
    half = CostModel(build_model("resnet20"), SHAPE, 64, precision="bf16").cost(Policy())
    assert half.step_flops == full.step_flops
    # Activations halve, and a copy of the weights in bf16 is kept; parameters, gradients, optimizer state stay.
    fixed = 3 * 4 * 272_474
    assert half.memory - fixed == pytest.approx((full.memory - fixed) / 2 + 2 * 272_474, rel=0.03)


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
