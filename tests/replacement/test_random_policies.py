"""Any policy at all: what is accepted applies, learns, counts and materialises; what is refused changes nothing."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlsearch.errors import SurgeryError
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import (
    BLOCKS,
    SurgeryPlan,
    Unit,
    apply_policy,
    find_units,
    learnable_params,
    materialize,
    plan,
    total_params,
)


class Residual(nn.Module):
    """A basic block; (N, in_channels, H, W) to (N, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias), nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Encoder(nn.Module):
    """A transformer block with scales; (N, T, 12) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, 12))
        self.scale = nn.Parameter(torch.full((12,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.scale * self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Pooled(nn.Module):
    """A stem, stages, and a classifier on the mean over places or tokens."""

    def __init__(self, stem: nn.Module, stages: list[nn.Sequential], width: int, channels_last: bool) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(width, 3)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.head(x.mean(1) if self.channels_last else x.mean((2, 3)))
        return out


@cache
def _model(name: str) -> tuple[nn.Module, Tensor, list[Unit]]:
    """An untouched model, an input for it, and its units."""
    torch.manual_seed(0)
    if name == "convolutions":
        stages = [nn.Sequential(*(Residual(4, 4) for _ in range(4)))]
        stages.append(nn.Sequential(Residual(4, 6, bias=True), *(Residual(6, 6, bias=True) for _ in range(3))))
        model, x = Pooled(nn.Conv2d(3, 4, 3), stages, 6, False), torch.randn(4, 3, 7, 7)
    else:
        stages = [nn.Sequential(*(Encoder(width) for width in (20, 20, 20, 16, 16, 16)))]
        model, x = Pooled(nn.Linear(5, 12), stages, 12, True), torch.randn(4, 6, 5)
    return model, x, find_units(model, x)


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "init": st.sampled_from(["auto", "half", "rms", "previous", "fit"]),
    "operator": st.sampled_from(["same", "single"]),
    "pair": st.sampled_from(["unit", "tensor"]),
    "neighbours": st.sampled_from(["attached", "detached"]),
    "norms": st.sampled_from(["own", "borrowed"]),
    "boundary": st.sampled_from(["strict", "keep", "one_sided", "project"]),
    "sources": st.sampled_from(["adjacent", "nearest"]),
    "rank": st.integers(1, 2),
    "boundary_rank": st.integers(1, 2),
    "update_every": st.integers(1, 3),
}


@st.composite
def _policies(draw: st.DrawFn, name: str) -> Policy:
    """Any units of a model with any block and some of its options; half of them such as are often valid."""
    units = _model(name)[2]
    likely = draw(st.booleans())
    names = [unit.name for unit in units if unit.sources is not None or not likely]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2 if likely else 4, unique=True))
    replacements = []
    for unit in chosen:
        block = draw(st.sampled_from(sorted(BLOCKS)))
        known = sorted(set(BLOCKS[block].options) & set(OPTIONS))
        given = draw(st.lists(st.sampled_from(known), max_size=4, unique=True)) if known else []
        options = {option: draw(OPTIONS[option]) for option in given}
        if likely and known:
            # Most units have a neighbour of another shape or one that is replaced.
            options |= {"boundary": draw(st.sampled_from(["keep", "one_sided"])), "sources": "nearest"}
            options |= {"rank": 1} if "rank" in known else {}
        replacements.append(Replacement(unit, block, options))
    return Policy(replacements=tuple(replacements))


def _storages(model: nn.Module) -> int:
    """Elements of the learnable parameters by unique storage."""
    sizes = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() // parameter.element_size()
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    return sum(sizes.values())


def _check_applied(untouched: nn.Module, policy: Policy, x: Tensor) -> None:
    model = copy.deepcopy(untouched).train()
    rng = torch.get_rng_state()
    report = apply_policy(model, policy, x)
    assert {item.unit for item in report.replaced} == {item.unit for item in policy.replacements}
    assert report.params_before == _storages(untouched)
    assert report.params_after == _storages(model) == learnable_params(model)
    torch.set_rng_state(rng)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = F.cross_entropy(model(x), torch.arange(4) % 3)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients.values() if grad is not None)
    assert {name for name, grad in gradients.items() if grad is None} <= _unreached(model, policy)
    optimizer.step()
    assert model(x).isfinite().all()

    plain = materialize(model)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert total_params(model) == total_params(plain) == _storages(plain)
    unchanged = {"same"} == {item.options.get("operator", "same") for item in policy.replacements}
    if unchanged and "skip" not in {item.block for item in policy.replacements}:
        fresh = copy.deepcopy(untouched)
        fresh.load_state_dict(plain.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(fresh.eval()(x), plain(x))


def _unreached(model: nn.Module, policy: Policy) -> set[str]:
    """Terms that may get no gradient: those of a source that is not used (one_sided)."""
    return {
        name
        for name, _ in model.named_parameters()
        for item in policy.replacements
        if name.startswith(f"{item.unit}.")
        and item.options.get("boundary") == "one_sided"
        and name.endswith((".a", ".b"))
    }


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (name, id(module), type(module), {key: id(t) for key, t in module._parameters.items()}, sorted(vars(module)))
        for name, module in model.named_modules()
    ]


def _planned(model: nn.Module, policy: Policy, units: list[Unit]) -> tuple[SurgeryPlan | None, str]:
    """The plan, or what stands against it."""
    try:
        return plan(model, policy, units), ""
    except SurgeryError as error:
        return None, str(error)


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_any_policy_is_applied_or_refused_whole(name: str) -> None:
    untouched, x, units = _model(name)
    before, values = _state(untouched), copy.deepcopy(untouched.state_dict())
    counts = {"accepted": 0, "refused": 0}
    blocks: set[str] = set()

    @given(policy=_policies(name))
    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    def check(policy: Policy) -> None:
        planned, problem = _planned(untouched, policy, units)
        if planned is None:
            counts["refused"] += 1
            assert any(item.unit in problem for item in policy.replacements)
            model = copy.deepcopy(untouched)
            whole = _state(model)
            with pytest.raises(SurgeryError) as caught:
                apply_policy(model, policy, units=units)
            assert str(caught.value) == problem
            assert _state(model) == whole
        else:
            counts["accepted"] += 1
            blocks.update(item.block for item in policy.replacements)
            assert {step.unit.name for step in planned.replacements} == {item.unit for item in policy.replacements}
            _check_applied(untouched, policy, x)
        assert _state(untouched) == before

    check()
    assert all(torch.equal(tensor, values[key]) for key, tensor in untouched.state_dict().items())
    # Neither side of the rule is tested by chance alone.
    assert min(counts.values()) >= 20, counts
    assert blocks == set(BLOCKS)
