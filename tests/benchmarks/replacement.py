"""What a replaced block costs a training step, and what it keeps for the backward pass, beside the dense one.

    python tests/benchmarks/replacement.py           some minutes on two CPU cores; uses a GPU where there is one
    python tests/benchmarks/replacement.py --quick   small shapes, few rounds: does it run?

The step is forward and backward of one block in the middle of a chain of three, gradients of its input, of what it
learns and of its sources' parameters included. Three kinds of block, since it matters what stands beside the
convolution: ``conv`` (a 3x3 convolution alone), ``conv-norm`` (with the batch norm behind it) and ``residual`` (the
BasicBlock of a CIFAR ResNet: two convolutions, norms, activations and the residual path). Forms take turns in every
round, so that a slow moment of the machine falls on all of them; a figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rlsearch import Policy, Replacement, apply_policy, build_model, estimate_cost, find_units
from rlsearch.training.cifar_resnet import BasicBlock

LAZY_PERIOD = 16
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "scalar": ("scalar", {}),
    "angle": ("angle", {}),
    "coupled": ("coupled", {}),
    "channel": ("channel", {}),
    "lowrank": ("lowrank", {}),
    "project": ("project", {}),
    "constant": ("constant", {}),
    f"lazy (m={LAZY_PERIOD})": ("scalar", {"update_every": LAZY_PERIOD}),
    "skip": ("skip", {}),
}


def conv(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False))


def conv_norm(channels: int) -> nn.Module:
    return nn.Sequential(*conv(channels), nn.BatchNorm2d(channels))


def residual(channels: int) -> nn.Module:
    return BasicBlock(channels, channels)


BLOCKS: Mapping[str, Callable[[int], nn.Module]] = {"conv": conv, "conv-norm": conv_norm, "residual": residual}


class Chain(nn.Module):
    """Three blocks; the middle one is measured."""

    def __init__(self, make: Callable[[int], nn.Module], channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def middle(make: Callable[[int], nn.Module], channels: int, form: tuple[str, dict[str, Any]] | None) -> nn.Module:
    """A chain whose middle block is replaced; dense without a form."""
    chain = Chain(make, channels)
    if form is not None:
        example = torch.empty(2, channels, 8, 8, device="meta")
        apply_policy(chain, Policy(replacements=(Replacement("blocks.1", *form),)), example)
    return chain


def step(chain: nn.Module, x: Tensor, grad: Tensor) -> None:
    chain.blocks[1](x).backward(grad)
    x.grad = None
    for parameter in chain.parameters():
        parameter.grad = None


def saved_bytes(chain: nn.Module, x: Tensor) -> int:
    """What the block keeps for backward: unique storages that are not parameters."""
    known = {tensor.untyped_storage()._cdata for tensor in [*chain.parameters(), *chain.buffers()]}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    held = x.view_as(x)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = chain.blocks[1](held)
    # The output is the next block's input, and counted there.
    saved.pop(output.untyped_storage()._cdata, None)
    return sum(saved.values())


def seconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times


def compare(name: str, channels: int, size: int, batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a form: the ratio of its step to the dense one over the rounds, and of what it keeps."""
    torch.manual_seed(0)
    chains = {form: middle(BLOCKS[name], channels, how) for form, how in {"dense": None, **FORMS}.items()}
    for chain in chains.values():
        chain.to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.randn_like(x)
    times: dict[str, list[float]] = {form: [] for form in chains}
    kept = {form: saved_bytes(chain, x) for form, chain in chains.items()}
    # A lazy block keeps its input in the passes that learn; this is what it keeps in the others.
    kept[f"lazy (m={LAZY_PERIOD})"] = saved_bytes(chains[f"lazy (m={LAZY_PERIOD})"], x)
    for chain in chains.values():
        seconds(lambda chain=chain: step(chain, x, grad), 2, device)
    for _ in range(rounds):
        for form, chain in chains.items():
            # A lazy block's passes are timed over one whole period.
            times[form].append(seconds(lambda chain=chain: step(chain, x, grad), LAZY_PERIOD, device))
    rows = []
    for form in FORMS:
        ratios = [mine / dense for mine, dense in zip(times[form], times["dense"], strict=True)]
        low, median, high = min(ratios), statistics.median(ratios), max(ratios)
        rows.append(
            {
                "block": name,
                "channels": channels,
                "form": form,
                "step_ratio": median,
                "step_ratio_least": low,
                "step_ratio_greatest": high,
                "saved_ratio": kept[form] / kept["dense"],
            }
        )
    return rows


def model_figures(rounds: int) -> dict[str, float]:
    """Seconds to find the units of a ResNet-152 and to replace every second inner one; a policy's cost after the
    first."""
    surgery = []
    costs = []
    for _ in range(rounds):
        model = build_model("resnet152", 1000)
        started = time.perf_counter()
        units = find_units(model)
        chosen = [unit.name for unit in units if unit.role == "block" and unit.sources][1::2]
        policy = Policy(replacements=tuple(Replacement(unit, "scalar", {"boundary": "keep"}) for unit in chosen))
        apply_policy(model, policy, units=units)
        surgery.append(time.perf_counter() - started)
    model = build_model("resnet152", 1000)
    estimate_cost(model, Policy(), (3, 224, 224), 32)
    for unit in chosen:
        one = Policy(replacements=(Replacement(unit, "scalar", {"boundary": "keep"}),))
        started = time.perf_counter()
        estimate_cost(model, one, (3, 224, 224), 32)
        costs.append(time.perf_counter() - started)
    return {
        "find_and_apply_resnet152_seconds": statistics.median(surgery),
        "estimate_cost_resnet152_ms": 1000 * statistics.median(costs),
        "estimate_cost_resnet152_worst_ms": 1000 * max(costs),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'block':<10} {'channels':>8} {'form':<12} {'step / dense':>12} {'least to greatest':>19} "
        f"{'saved / dense':>13}"
    )
    for row in rows:
        spread = f"{row['step_ratio_least']:.3f} to {row['step_ratio_greatest']:.3f}"
        print(
            f"{row['block']:<10} {row['channels']:>8} {row['form']:<12} {row['step_ratio']:>12.3f} {spread:>19} "
            f"{row['saved_ratio']:>13.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.batch = 2, 4
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in BLOCKS:
        # The shapes of a CIFAR ResNet's wider stages, and of an ImageNet one's first.
        for channels, size in ((64, 16), (128, 16)):
            rows += compare(name, channels, size, options.batch, options.rounds, device)
    print_rows(rows)
    models = model_figures(2 if options.quick else 5)
    print(", ".join(f"{name} {value:.2f}" for name, value in models.items()))

    def worst(form: str, what: str, block: str = "conv-norm") -> float:
        return max(row[what] for row in rows if row["form"] == form and row["block"] == block)

    composed = ("scalar", "angle", "coupled", "channel", "lowrank", "project")
    figures = {
        "composed_step_ratio": max(worst(form, "step_ratio") for form in composed),
        "constant_step_ratio": worst("constant", "step_ratio"),
        "lazy_step_ratio": worst(f"lazy (m={LAZY_PERIOD})", "step_ratio"),
        "skip_step_ratio": worst("skip", "step_ratio"),
        "scalar_saved_ratio": worst("scalar", "saved_ratio"),
        "constant_saved_ratio": worst("constant", "saved_ratio"),
        **models,
        "rows": rows,
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {where}"
    print(json.dumps({"name": "replacement", "figures": figures, "n": options.rounds, "machine": machine}))


if __name__ == "__main__":
    main()
