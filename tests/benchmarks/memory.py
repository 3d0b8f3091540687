"""Predicted against measured memory of a training step, over models, policies and precisions.

    python tests/benchmarks/memory.py            on a CUDA device: what its allocator gave out
    python tests/benchmarks/memory.py --quick    on the CPU, at small sizes: the storages of a whole real step

On CUDA the measured peak is that of the fourth to the sixth step. What the libraries take for themselves is not
predicted, so that the prediction is the same on every machine; the second error counts torch's cuBLAS work spaces too,
as packing does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlsearch import Policy, Replacement, TrainingSpec, apply_policy, build_model
from rlsearch.replacement import Unit, mixing_parameters
from rlsearch.training.cost import CostModel
from rlsearch.training.loop import PlainStep, build_optimizer, train_epoch
from rlsearch.training.memory_fit import library_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from whole_step import whole_step

# Model, its arguments, pixels a side, images a step, and a unit that every block fits into.
Models: TypeAlias = Sequence[tuple[str, dict[str, Any], int, int, str]]
MODELS: Models = [
    ("resnet32", {}, 32, 128, "layer1.3"),
    ("resnet110", {}, 32, 128, "layer1.9"),
    ("resnet18", {"small_stem": True}, 32, 128, "layer1.1"),
    ("resnet50", {}, 224, 64, "layer3.3"),
    ("vit_b_16", {}, 224, 32, "encoder.layers.encoder_layer_5"),
]
SMALL: Models = [
    ("resnet32", {}, 16, 4, "layer1.3"),
    ("vgg11_bn", {"small_head": True}, 32, 4, "features.22"),
    ("resnet18", {"small_stem": True}, 16, 4, "layer1.1"),
    ("vit_tiny", {"image_size": 16}, 16, 4, "encoder.layers.encoder_layer_5"),
    ("convnext_tiny", {}, 32, 2, "features.5.4"),
]
BLOCKS = (None, "skip", "scalar", "channel", "lowrank", "project")
PRECISIONS = ("fp32", "bf16")
_WARMUP_STEPS, _STEPS = 3, 6


def policy_of(unit: str, block: str | None) -> Policy:
    return Policy() if block is None else Policy(replacements=(Replacement(unit, block),))


def allocated(
    name: str, kwargs: dict[str, Any], policy: Policy, shape: tuple[int, ...], training: TrainingSpec, units: Any
) -> int:
    """Bytes at the peak of a step, as the CUDA allocator counts them."""
    device = torch.device("cuda")
    model = build_model(name, **kwargs)
    apply_policy(model, policy, units=units)
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(training, model, mixing_parameters(model))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(_STEPS):
            if step == _WARMUP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
            yield images, torch.zeros(shape[0], dtype=torch.int64, device=device)

    rates = [1e-3] * _STEPS
    step = PlainStep(model, optimizer, precision=training.precision, device=device)
    train_epoch(step, batches(), optimizer, rates)
    return torch.cuda.max_memory_allocated()


def peak(
    name: str,
    kwargs: dict[str, Any],
    policy: Policy,
    shape: tuple[int, ...],
    training: TrainingSpec,
    units: tuple[Unit, ...],
    *,
    on_cuda: bool,
) -> int:
    """Bytes at the peak of a real step."""
    if on_cuda:
        return allocated(name, kwargs, policy, shape, training, units)
    return whole_step(lambda: build_model(name, **kwargs), policy, shape, training, units)[0]


def measured_errors(models: Models, *, on_cuda: bool) -> dict[str, list[float]]:
    """Relative errors of every prediction, signs left out."""
    libraries = library_bytes(torch.device("cuda" if on_cuda else "cpu"))
    print("measured: " + ("torch's CUDA allocator" if on_cuda else "the storages of a real step on the CPU, no CUDA"))
    errors: dict[str, list[float]] = {}
    for name, kwargs, size, batch, unit in models:
        for precision in PRECISIONS:
            costs = CostModel(build_model(name, **kwargs), (3, size, size), batch, "sgd", precision)
            for block in BLOCKS:
                if block is not None and (reason := costs.fits(unit, block)) is not None:
                    print(f"{name:<14} {precision} {block:<11} left out: {reason}")
                    continue
                policy = policy_of(unit, block)
                training = TrainingSpec(precision=precision)
                shape = (batch, 3, size, size)
                found = peak(name, kwargs, policy, shape, training, costs.units, on_cuda=on_cuda)
                predicted = costs.cost(policy).memory
                error, with_libraries = predicted / found - 1, (predicted + libraries) / found - 1
                for key in ("memory_error", f"memory_error_{precision}"):
                    errors.setdefault(key, []).append(abs(error))
                errors.setdefault("memory_error_with_libraries", []).append(abs(with_libraries))
                print(
                    f"{name:<14} {precision} {block or 'end-to-end':<11} {found / 1e6:>9,.1f} MB, predicted "
                    f"{100 * error:+.2f} %, with libraries {100 * with_libraries:+.2f} %",
                    flush=True,
                )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; no images are needed")
    options = parser.parse_args()
    on_cuda = not options.quick
    if on_cuda and not torch.cuda.is_available():
        print("skipped: there is no CUDA device; --quick measures the storages of a step on the CPU instead")
        return
    errors = measured_errors(MODELS if on_cuda else SMALL, on_cuda=on_cuda)
    figures = {f"{key}_median": statistics.median(values) for key, values in errors.items()}
    figures |= {f"{key}_worst": max(values) for key, values in errors.items()}
    for key, value in figures.items():
        print(f"{key:<36} {100 * value:.3f} %")
    where = torch.cuda.get_device_name() if on_cuda else f"{os.cpu_count()} cores, storages on the CPU"
    machine = f"{platform.machine()}, torch {torch.__version__}, {where}"
    print(json.dumps({"name": "memory", "figures": figures, "n": len(errors["memory_error"]), "machine": machine}))


if __name__ == "__main__":
    main()
