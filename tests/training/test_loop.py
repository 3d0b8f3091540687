"""The loop: the schedule, the optimizer's groups, and what a pass returns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlsearch.config import from_mapping
from rlsearch.errors import ConfigError, DivergedError, Problem
from rlsearch.training.loop import (
    Pass,
    PlainStep,
    TrainingSpec,
    build_optimizer,
    evaluate,
    learning_rate,
    resolve_precision,
    slow_precision,
    train_epoch,
)

CPU = torch.device("cpu")


def test_the_schedule_rises_and_falls() -> None:
    rates = [learning_rate(step, 10, 4, 0.8) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.4 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])


@given(st.integers(1, 300), st.integers(0, 400), st.floats(1e-6, 10))
def test_rates_stay_in_range(num_steps: int, warmup: int, peak: float) -> None:
    rates = [learning_rate(step, num_steps, warmup, peak) for step in range(num_steps)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert warmup >= num_steps or max(rates) == pytest.approx(peak)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_weights_decay(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    mixing = nn.Parameter(torch.ones(1, 1))
    model.register_parameter("mixing", mixing)
    model[1].weight.requires_grad_(False)
    groups = build_optimizer(TrainingSpec(optimizer=name, weight_decay=0.3), model, [mixing]).param_groups
    decayed, plain, of_blocks = groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert {id(p) for p in plain["params"]} == {id(p) for p in (model[0].bias, model[1].bias, model[3].bias)}
    assert of_blocks["params"] == [mixing]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 16, 5, generator=generator)
    return [(batch, (batch[:, 0] > 0).long()) for batch in images]


def trained(model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer, rates: list[float]) -> Pass:
    return train_epoch(PlainStep(model, optimizer, device=CPU), batches, optimizer, rates)


def test_training_learns_and_evaluation_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.5))
    optimizer = build_optimizer(TrainingSpec(lr=0.5), model)
    losses = [trained(model, batches(), optimizer, [0.5] * 4).loss for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    model.train()
    result = evaluate(model, batches(), precision="fp32", device=CPU)
    assert model.training
    assert model[1].training
    model.eval()
    correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches())
    assert (result.num_correct, result.num_images) == (correct, 64)
    assert result.accuracy == correct / 64
    assert result.loss == pytest.approx(
        sum(nn.functional.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches()) / 64
    )


def test_the_rates_are_the_optimizers() -> None:
    model = nn.Linear(5, 2)
    optimizer = build_optimizer(TrainingSpec(), model)
    trained(model, batches(2), optimizer, [0.3, 0.1])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_what_weighs_the_sources_has_a_rate_of_its_own() -> None:
    model = nn.Linear(5, 2)
    model.mixing = nn.Parameter(torch.ones(()))
    optimizer = build_optimizer(TrainingSpec(mixing_lr=0.1), model, [model.mixing])
    trained(model, batches(2), optimizer, [0.3, 0.2])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2, 0.02])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = nn.Linear(5, 2)
    optimizer = build_optimizer(TrainingSpec(), model)
    with pytest.raises(DivergedError, match=r"became inf|became nan"):
        trained(model, batches(), optimizer, [1e30] * 4)


def test_precision_on_the_cpu() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    has_bf16 = "avx512_bf16" in flags or "amx_tile" in flags
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")
    assert resolve_precision("bf16", CPU) == "bf16"
    assert slow_precision("fp32", CPU) is slow_precision("auto", CPU) is None
    assert (slow_precision("bf16", CPU) is None) == has_bf16


def test_a_precision_that_the_gpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch says of an older GPU, since any other machine has none of the kind."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(
        ConfigError, match=r"training\.precision: Tesla V100 does not compute in bf16; use auto or fp32"
    ):
        resolve_precision("bf16", device)
    assert resolve_precision("auto", device) == resolve_precision("fp32", device) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_precision("auto", device) == resolve_precision("bf16", device) == "bf16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_precision_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    assert resolve_precision("auto", cuda) == expected
    if expected == "fp32":
        with pytest.raises(ConfigError, match="does not compute in bf16"):
            resolve_precision("bf16", cuda)


def test_ranges_of_the_settings() -> None:
    problems: list[Problem] = []
    content = {"epochs": 0, "batch_size": 0, "lr": 0, "momentum": 1, "weight_decay": -1, "label_smoothing": 1}
    from_mapping(
        TrainingSpec,
        content | {"warmup_epochs": -1, "mixing_lr": 0, "optimizer": "sdg", "precision": "fp8"},
        "training",
        problems,
    )
    assert {problem.key.removeprefix("training.") for problem in problems} == {
        "epochs",
        "batch_size",
        "lr",
        "momentum",
        "weight_decay",
        "label_smoothing",
        "mixing_lr",
        "warmup_epochs",
        "optimizer",
        "precision",
    }
    assert "did you mean 'sgd'?" in str(problems[-2])
