"""Compiled blocks and CUDA graphs: they give what plain steps give, or are not used."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from rlsearch.policy import LearnDrop, ModelSpec, Policy, Replacement
from rlsearch.training.data import DataSpec, ImageData, load_data
from rlsearch.training.faster_step import FasterStep
from rlsearch.training.loop import PlainStep, TrainingSpec, build_optimizer
from rlsearch.training.same_step import agree, outcome, unchanged
from rlsearch.training.trial import Trial
from rlsearch.training.trial_spec import TrialSpec

CPU = torch.device("cpu")
DATA = DataSpec("digits", limit=100)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DATA)


@pytest.fixture(autouse=True)
def tiny_nets(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.syspath_prepend(request.path.parent)
    yield
    torch._dynamo.reset()


def trained(digits: ImageData, policy: Policy, device: str = "cpu", **settings: Any) -> tuple[Trial, list[float]]:
    spec = TrainingSpec(**{"epochs": 3, "batch_size": 32, "lr": 0.05} | settings)
    trial = Trial(TrialSpec(ModelSpec("tiny_net:make"), DATA, spec, policy), data=digits, device=device)
    losses = []
    while not trial.done:
        losses.append(trial.run_epoch().train_loss)
    return trial, losses


POLICY = Policy(
    replacements=(Replacement("units.1", "scalar"),),
    learn_drop=LearnDrop("schedule", warmup=0.4, max_fraction=0.5, features="stored"),
)


def test_compiled_blocks_train_as_plain_ones(digits: ImageData) -> None:
    plain, expected = trained(digits, POLICY, compile="never")
    counters.clear()
    ours, losses = trained(digits, POLICY, compile="always")
    assert (plain._step.way, ours._step.way) == ("plain", "compiled")
    assert ours._dropper is not None
    assert ours._dropper.cut > 0
    assert losses == pytest.approx(expected, rel=1e-3)
    programs = counters["stats"]["unique_graphs"]
    # The replaced unit and its three like neighbours, before and after the cut; neither other batch sizes nor
    # evaluation are compiled.
    assert 0 < programs <= 4
    again, same = trained(digits, POLICY, compile="always")
    assert again._step.way == "compiled"
    assert same == losses
    assert counters["stats"]["unique_graphs"] == programs  # the next trial in this process finds them all


def test_auto_is_plain_on_a_cpu(digits: ImageData) -> None:
    trial, losses = trained(digits, Policy())
    assert trial._step.way == "plain"
    assert losses == trained(digits, Policy(), compile="never")[1]


def test_a_unit_that_counts_its_passes_stays_plain(digits: ImageData) -> None:
    lazy = Policy(replacements=(Replacement("units.1", "scalar", {"update_every": 4}),))
    assert trained(digits, lazy, compile="always")[0]._step.way == "plain"


class Deceitful(nn.Module):
    """Gives something else where it is compiled, or cannot be compiled at all."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.fails = fails

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            inputs = inputs @ inputs if self.fails else 1.1 * inputs + 0.3 * inputs**2
        result: Tensor = self.norm(inputs)
        return result


@pytest.mark.parametrize(("fails", "says"), [(True, "cannot be used"), (False, "loss or gradients differ")])
def test_what_gives_another_result_is_not_used(fails: bool, says: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Deceitful(fails), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    step = made_step(model)
    inputs, labels = torch.randn(16, 4), torch.randint(3, (16,))
    with caplog.at_level(logging.WARNING):
        loss = step(inputs, labels)
    assert says in caplog.text
    assert step.way == "plain"
    plain = PlainStep(twin, build_optimizer(TrainingSpec(), twin), device=CPU)
    assert torch.equal(loss, plain(inputs, labels))
    assert all(torch.equal(ours.grad, p.grad) for ours, p in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(*buffers) for buffers in zip(model.buffers(), twin.buffers(), strict=True))


def made_step(model: nn.Module) -> FasterStep:
    optimizer = build_optimizer(TrainingSpec(), model)
    step = FasterStep(PlainStep(model, optimizer, device=CPU), model, ["0"], "always")
    assert step.begin("all", 1000)
    assert not step.begin("all", 900)
    return step


def test_trying_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with unchanged(model, CPU):
        model(torch.randn(8, 4))
        assert not torch.equal(before["0.running_mean"], model[0].running_mean)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@given(st.floats(1e-5, 1e5), st.sampled_from(["fp32", "bf16"]), st.floats(-0.3, 0.3))
def test_agreement_is_relative(scale: float, precision: str, apart: float) -> None:
    gradients = [scale * torch.randn(3, 4), scale * torch.randn(5)]
    first = torch.tensor(scale), gradients
    moved = [g + apart * g for g in gradients]
    tolerance = {"fp32": 1e-3, "bf16": 5e-2}[precision]
    if abs(abs(apart) - tolerance) > 0.1 * tolerance:
        assert agree(first, (torch.tensor(scale), moved), precision) == (abs(apart) < tolerance)
        other_loss = torch.tensor(scale * (1 + apart))
        assert agree(first, (other_loss, gradients), precision) == (abs(apart) < tolerance)
    assert not agree(first, (torch.tensor(scale), gradients[:1]), precision)
    assert not agree(first, (torch.tensor(float("nan")), gradients), precision)


def test_an_outcome_is_a_copy() -> None:
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(TrainingSpec(), model)
    plain = PlainStep(model, optimizer, device=CPU)
    inputs, labels = torch.randn(16, 4), torch.randint(3, (16,))
    first = outcome(plain, optimizer, inputs, labels)
    outcome(plain, optimizer, 2 * inputs, labels)
    assert agree(first, outcome(plain, optimizer, inputs, labels), "fp32")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_trains_as_plain_steps(digits: ImageData, precision: str) -> None:
    settings = {"epochs": 60, "batch_size": 32, "precision": precision}
    plain, expected = trained(digits, POLICY, "cuda", compile="never", **settings)
    ours, losses = trained(digits, POLICY, "cuda", compile="auto", **settings)
    assert "graph" in ours._step.way
    assert losses == pytest.approx(expected, rel=1e-2 if precision == "fp32" else 0.2)
    assert ours._peak.num_bytes == pytest.approx(plain._peak.num_bytes, rel=0.01)


@needs_cuda
def test_no_plain_step_waits_for_the_device(digits: ImageData) -> None:
    trial = Trial(
        TrialSpec(ModelSpec("tiny_net:make"), DATA, replace(TrainingSpec(batch_size=32), compile="never")),
        data=digits,
        device="cuda",
    )
    trial.run_epoch()
    inputs = list(trial._inputs.batches(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            inputs[0][0].sum().item()  # what waits is seen
        losses = []
        for images, labels in inputs:
            losses.append(trial._step(images, labels))
            trial._optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 4
    assert torch.stack(losses).isfinite().all()
