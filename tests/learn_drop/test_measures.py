"""What is recorded between two measurements gives the scores, whatever optimizer and schedule take the steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.learn_drop.measures import GradChange, Measure, ParamChange, ParamChangePerRate, measure_for
from rlsearch.replacement import composed_parameters

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
WIDTH = 3


def layers(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))


def measure(score: str, net: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Measure:
    found = measure_for(score, list(net), optimizer, composed_parameters)
    assert found is not None
    return found


def give_gradients(net: nn.Module, seed: int) -> list[Tensor]:
    """Sets the gradient of every parameter that takes one; returns them."""
    torch.manual_seed(seed)
    gradients = []
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    return gradients


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[Tensor]:
    """A step for every seed; the gradients' sum of every parameter."""
    totals = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for seed in seeds:
        for total, gradient in zip(totals, give_gradients(net, seed), strict=True):
            total += gradient
        optimizer.step()
    return totals


def norms(sums: Sequence[Tensor]) -> list[float]:
    """Of every linear layer: of its weight and bias together."""
    return [math.hypot(float(w.norm()), float(b.norm())) for w, b in zip(sums[::2], sums[1::2], strict=True)]


def changes(now: Sequence[float], before: Sequence[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(now, before, strict=True)]


def test_every_score_has_its_measure_and_a_schedule_none() -> None:
    net = layers()
    kinds = {"param_change": ParamChange, "param_change_per_lr": ParamChangePerRate, "grad_change": GradChange}
    for score, kind in kinds.items():
        assert type(measure(score, net, SGD(net.parameters()))) is kind
    optimizer = SGD(net.parameters())
    assert measure_for("schedule", list(net), optimizer, composed_parameters) is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_param_change_is_of_an_interval() -> None:
    net = layers()
    found = measure("param_change", net, SGD(net.parameters()))
    for factor in (1.5, 0.75):
        with torch.no_grad():
            for parameter in net[1].parameters():
                parameter.mul_(factor)
        assert found.scores(0) == pytest.approx([0, abs(factor - 1), 0], rel=1e-5)
    assert found.scores(1) == [0, 0]
    found.forget(2)
    assert found.scores(2) == [0]


def change(net: nn.Sequential, optimizer: torch.optim.Optimizer, rates: Sequence[float], share: float = 0.1) -> None:
    """Steps that change every parameter by its group's rate times a share of itself."""
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
            for parameter in group["params"]:
                parameter.grad = -share * parameter.detach()
        optimizer.step()


@pytest.mark.parametrize("tensor", [False, True])
def test_a_schedule_does_not_change_param_change_per_lr(tensor: bool) -> None:
    net = layers()
    groups = [{"params": [p for p in net.parameters() if p.ndim == n], "scale": scale} for n, scale in ((2, 1), (1, 3))]
    optimizer = SGD(groups, lr=torch.tensor(1.0) if tensor else 1.0)
    found = measure("param_change_per_lr", net, optimizer)
    seen = []
    for rate in (0.02, 0.01, 0.002, 0.0001):
        wanted = torch.tensor(rate) if tensor else rate
        change(net, optimizer, [wanted] * 2, share=1.0)
        seen.append(found.scores(0))
    plain = measure("param_change", net, optimizer)
    change(net, optimizer, [0.0001] * 2, share=1.0)
    assert plain.scores(0)[0] < 0.01 * seen[0][0]
    for scores in seen:
        assert scores == pytest.approx(seen[0], rel=0.05)  # growth on growth, and float32


def test_half_the_rate_of_some_steps_counts_by_its_mean() -> None:
    net = layers(1)
    optimizer = SGD([{"params": list(net.parameters()), "scale": 1.0}], lr=1.0)
    found = measure("param_change_per_lr", net, optimizer)
    change(net, optimizer, [0.01] * 4, share=0.1)
    (full,) = found.scores(0)
    assert full == pytest.approx(0.004, rel=0.01)
    change(net, optimizer, [0.01, 0.01, 0.005, 0.005, 0.0, 0.0], share=0.1)
    # Six steps at 0.005 in the mean: they moved it by 0.003, at the full rate it would have been 0.006.
    assert found.scores(0) == pytest.approx([0.006], rel=0.01)


def test_a_rate_that_rises_is_the_measure_from_then_on() -> None:
    net = layers(1)
    optimizer = SGD([{"params": list(net.parameters()), "scale": 1.0}], lr=1.0)
    found = measure("param_change_per_lr", net, optimizer)
    seen = []
    for rate in (0.001, 0.01, 0.001):
        change(net, optimizer, [rate], share=1.0)
        seen += found.scores(0)
    assert seen == pytest.approx([0.001, 0.01, 0.01], rel=0.01)


def test_without_a_rate_or_a_step_nothing_is_told() -> None:
    net = layers(2)
    optimizer = SGD([{"params": list(net.parameters()), "scale": 1.0}], lr=1.0)
    found = measure("param_change_per_lr", net, optimizer)
    assert found.scores(0) == [None, None]
    change(net, optimizer, [0.0, 0.0])
    assert found.scores(0) == [None, None]
    change(net, optimizer, [0.1])
    assert None not in found.scores(0)
    change(net, optimizer, [0.0])
    assert found.scores(1) == [None]


def test_a_layer_has_the_rate_of_its_own_groups() -> None:
    net = layers(3)
    groups = [{"params": list(net[index].parameters()), "scale": scale} for index, scale in ((0, 1.0), (1, 1.0))]
    optimizer = SGD(groups, lr=1.0)
    found = measure("param_change_per_lr", net, optimizer)
    change(net, optimizer, [0.01], share=0.1)
    first = found.scores(0)
    # The first layer waits, the second goes on at half the rate; the third was never in training.
    optimizer.param_groups[0]["scale"], optimizer.param_groups[1]["scale"] = 0.0, 0.5
    change(net, optimizer, [0.01], share=0.1)
    second = found.scores(0)
    assert second[0] is None
    assert second[1] == pytest.approx(first[1], rel=0.01)
    assert (first[2], second[2]) == (0, 0)
    # A group that is added later, and one that has lost its parameters.
    optimizer.add_param_group({"params": list(net[2].parameters()), "scale": 1.0})
    optimizer.param_groups[0]["params"] = []
    found.forget(1)
    assert found.scores(1) == [None, None]
    change(net, optimizer, [0.01], share=0.1)
    assert found.scores(1) == pytest.approx([first[1], first[1]], rel=0.01)


@pytest.mark.parametrize(
    "build",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, fused=True, weight_decay=0.1),
        lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    ],
)
def test_grad_change_is_of_the_gradients_sum(build: Callable[[Any], torch.optim.Optimizer]) -> None:
    net = layers()
    optimizer = build(net.parameters())
    found = measure("grad_change", net, optimizer)
    first = norms(steps(net, optimizer, range(5)))
    assert found.scores(0) == [None] * 3
    second = norms(steps(net, optimizer, range(10, 13)))
    assert found.scores(0) == pytest.approx(changes(second, first), rel=1e-4)
    third = norms(steps(net, optimizer, range(20, 23)))
    found.forget(1)
    assert found.scores(1) == pytest.approx(changes(third, second)[1:], rel=1e-4)
    assert set(found._sums) == set()


def test_the_gradients_are_those_before_the_step() -> None:
    """Nesterov momentum may write to them."""
    net = layers(1)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    found = measure("grad_change", net, optimizer)
    assert isinstance(found, GradChange)
    totals = steps(net, optimizer, range(3))
    for parameter, total in zip(net.parameters(), totals, strict=True):
        assert torch.allclose(found._sums[parameter], total)


def test_tied_parameters_count_once_a_step() -> None:
    net = layers()
    net[1].weight = net[0].weight
    optimizer = SGD(net.parameters(), lr=0.1)
    found = measure("grad_change", net, optimizer)
    assert isinstance(found, GradChange)
    give_gradients(net, 0)
    optimizer.step()
    assert net[0].weight.grad is not None
    assert torch.equal(found._sums[net[0].weight], net[0].weight.grad)
    # The first of the two leaves: the weight goes on with the second.
    found.forget(1)
    assert net[0].weight in found._sums
    assert net[0].bias not in found._sums


def test_a_layer_without_gradients_has_settled_and_a_thawed_one_starts_anew() -> None:
    net = layers()
    net[0].requires_grad_(False)
    optimizer = SGD(net.parameters(), lr=0.1)
    found = measure("grad_change", net, optimizer)
    steps(net, optimizer, range(2))
    assert found.scores(0)[0] is None
    steps(net, optimizer, range(2))
    assert found.scores(0)[0] == 0
    net[0].requires_grad_(True)
    first = norms(steps(net, optimizer, range(2)))
    assert found.scores(0)[0] is None
    second = norms(steps(net, optimizer, range(2, 4)))
    assert found.scores(0) == pytest.approx(changes(second, first), rel=1e-4)


def test_a_closure_makes_the_gradients_inside_the_step() -> None:
    net = layers()
    for as_keyword in (False, True):
        optimizer = SGD(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps the optimizer's step
        found = measure("grad_change", net, optimizer)
        assert isinstance(found, GradChange)
        totals = [torch.zeros_like(parameter) for parameter in net.parameters()]
        for seed in range(3):

            def closure(seed: int = seed, totals: list[Tensor] = totals) -> float:
                for total, gradient in zip(totals, give_gradients(net, seed), strict=True):
                    total += gradient
                return float(seed)

            loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            assert loss == seed
            scheduler.step()
        for parameter, total in zip(net.parameters(), totals, strict=True):
            assert torch.allclose(found._sums[parameter], total)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_changes_nothing(fused: bool, unscale: bool) -> None:
    net = layers(2)
    optimizer = SGD(net.parameters(), lr=0.1, fused=fused)
    found = measure("grad_change", net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    totals = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for seed in range(4):
        inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net(inputs).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in net.parameters()]  # type: ignore[union-attr]
        if seed != 2:  # this one overflows, and is left out
            totals = [total + gradient for total, gradient in zip(totals, gradients, strict=True)]
        optimizer.zero_grad()
        loss = net(inputs).square().sum()
        scaler.scale(loss * math.inf if seed == 2 else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert isinstance(found, GradChange)
    for parameter, total in zip(net.parameters(), totals, strict=True):
        assert torch.allclose(found._sums[parameter], total, rtol=1e-4, atol=1e-6)


def test_small_gradients_of_half_precision_add_up() -> None:
    net = layers(1).to(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.0)
    found = measure("grad_change", net, optimizer)
    assert isinstance(found, GradChange)
    for _ in range(1000):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert found._sums[net[0].weight].unique().tolist() == [1000.0]


@pytest.mark.parametrize("score", ["param_change_per_lr", "grad_change"])
def test_a_loaded_optimizer_goes_on_being_watched(score: str) -> None:
    net = layers()
    optimizer = AdamW(net.parameters(), lr=0.01)
    found = measure(score, net, optimizer)
    steps(net, optimizer, range(2))
    found.scores(0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(net, optimizer, range(2))
    assert all(value is not None for value in found.scores(0))


@pytest.mark.parametrize("score", ["param_change_per_lr", "grad_change"])
def test_a_compiled_step_goes_on_being_watched(score: str) -> None:
    net = layers()
    optimizer = SGD(net.parameters(), lr=0.1)
    found = measure(score, net, optimizer)
    twin = copy.deepcopy(net)
    other = SGD(twin.parameters(), lr=0.1)
    plain = measure(score, twin, other)
    compiled = torch.compile(optimizer.step, backend="eager")
    for seed in range(4):
        give_gradients(net, seed)
        compiled()
        give_gradients(twin, seed)
        other.step()
        if seed % 2:
            assert found.scores(0) == plain.scores(0)
    torch.compiler.reset()


class Wrapper:
    """An optimizer around another that passes no hooks on."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self) -> None:
        self.inner.step()


class Inheriting(torch.optim.Optimizer):
    """One that inherits the methods for hooks, and never sets up what they need."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.param_groups, self.state = inner.param_groups, inner.state


@pytest.mark.parametrize("wrapper", [Wrapper, Inheriting])
@pytest.mark.parametrize("score", ["param_change_per_lr", "grad_change"])
def test_an_optimizer_without_step_hooks_is_refused(wrapper: Any, score: str) -> None:
    net = layers()
    inner = SGD(net.parameters())
    with pytest.raises(ModelError, match=f"{score} has to see every step, and {wrapper.__name__} takes no step hooks"):
        measure(score, net, wrapper(inner))
    assert measure("param_change", net, wrapper(inner)).scores(0) == [0, 0, 0]


def test_an_optimizer_without_a_rate_is_refused() -> None:
    net = layers()
    optimizer = SGD(net.parameters())
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ModelError, match="the parameter groups of SGD hold no 'lr'; use param_change"):
        measure("param_change_per_lr", net, optimizer)
