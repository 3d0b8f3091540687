"""Two processes with half of a batch each learn what one process learns from the whole batch."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import apply_policy

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("constant", {}),
    "constant, attached": ("constant", {"neighbours": "attached"}),
    "scalar": ("scalar", {}),
    "scalar, detached": ("scalar", {"neighbours": "detached"}),
    "angle": ("angle", {}),
    "coupled": ("coupled", {}),
    "channel": ("channel", {}),
    "lowrank": ("lowrank", {"rank": 1}),
    "project": ("project", {"rank": 1}),
    "lazy": ("scalar", {"update_every": 2}),
}
STEPS = 3


class Unit(nn.Module):
    """A convolution and a linear around a residual path, without batch norm: (N, 4, 5, 12) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(torch.tanh(self.conv(x)))
        return out


def _model(case: str) -> nn.Module:
    """The replaced model, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(Unit() for _ in range(3))), nn.Flatten())
    model = model.append(nn.Linear(240, 2)).double()
    block, options = CASES[case]
    apply_policy(model, Policy(replacements=(Replacement("1.1", block, options),)), _batch()[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("1.1."):
                parameter.normal_(std=0.5)
    return model


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3, 5, 12, dtype=torch.float64, generator=generator)
    return x, torch.randn(8, 2, dtype=torch.float64, generator=generator)


def _train(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor | None]]:
    """The gradients of each step, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        named = [(name.removeprefix("module."), parameter.grad) for name, parameter in model.named_parameters()]
        steps.append({name: None if grad is None else grad.clone() for name, grad in named})
        optimizer.step()
    return steps


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # No name has to be resolved for the loopback interface.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        x, y = (tensor[4 * rank : 4 * rank + 4] for tensor in _batch())
        found: dict[str, Any] = {}
        for case in CASES:
            model = _model(case)
            lazy = "update_every" in CASES[case][1]
            wrapped = DistributedDataParallel(model, find_unused_parameters=lazy)
            found[case] = (_train(wrapped, x, y), model.state_dict())
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, by case."""
    folder: Path = tmp_path_factory.mktemp("processes")
    with warnings.catch_warnings():
        mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_as_one(case: str, results: list[dict[str, Any]]) -> None:
    model = _model(case)
    expected = _train(model, *_batch())
    for found, state in (result[case] for result in results):
        for step, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert list(one) == list(other)
            for name in one:
                learns = other[name] is not None and bool(other[name].any())
                assert learns == (one[name] is not None and bool(one[name].any())), (step, name)
                if learns:
                    torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-10)
        assert list(state) == list(model.state_dict())
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_every_learned_term_learns(case: str) -> None:
    """The comparison above is of something."""
    first, second, *_ = _train(_model(case), *_batch())
    terms = [name for name in first if name.startswith("1.1.")]
    assert bool(terms) == (CASES[case][0] != "constant")
    assert all(first[name] is not None and first[name].any() for name in terms)
    if "update_every" in CASES[case][1]:
        assert not any(second[name] is not None and second[name].any() for name in terms)
