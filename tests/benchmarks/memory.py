"""Predicted against measured memory of a training step on a CUDA device, over models, policies and precisions.

    python tests/benchmarks/memory.py            every row
    python tests/benchmarks/memory.py --quick    two models

Measured is the peak that the allocator gave out in a step, after three steps of warm-up. The prediction leaves out work
space of the kernels and the temporary tensors of the backward pass; the table shows how much that is.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from rlsearch import Policy, Replacement, TrainingSpec, apply_policy, build_model
from rlsearch.replacement import mixing_parameters
from rlsearch.training.cost import CostModel
from rlsearch.training.loop import autocast, build_optimizer

# Model, its arguments, pixels a side, images a step, and a unit that every block but the last fits into.
MODELS: list[tuple[str, dict[str, Any], int, int, str]] = [
    ("resnet32", {}, 32, 128, "layer1.3"),
    ("resnet110", {}, 32, 128, "layer1.9"),
    ("resnet18", {"small_stem": True}, 32, 128, "layer1.1"),
    ("resnet34", {}, 224, 64, "layer3.3"),
    ("resnet50", {}, 224, 64, "layer3.3"),
]


def measured(model: torch.nn.Module, shape: tuple[int, ...], training: TrainingSpec) -> int:
    """Bytes at the peak of a step."""
    device = torch.device("cuda")
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(training, model, mixing_parameters(model))
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    for step in range(6):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
        with autocast(training.precision, device):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; no images are needed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device")
        return
    rows = []
    for name, kwargs, size, batch, unit in MODELS[: 2 if options.quick else None]:
        for precision in ("fp32", "bf16"):
            training = TrainingSpec(precision=precision)
            costs = CostModel(build_model(name, **kwargs), (3, size, size), batch, "sgd", precision)
            blocks = [block for block in ("skip", "scalar", "channel", "lowrank") if costs.fits(unit, block) is None]
            for block in [None, *blocks]:
                policy = Policy() if block is None else Policy(replacements=(Replacement(unit, block),))
                model = build_model(name, **kwargs)
                apply_policy(model, policy)
                rows.append(
                    (
                        name,
                        precision,
                        block,
                        costs.cost(policy).memory,
                        measured(model, (batch, 3, size, size), training),
                    )
                )
                del model
    for name, precision, block, predicted, found in rows:
        print(
            f"{name:<10} {precision} {block or 'end-to-end':<11} "
            f"predicted/measured {predicted / found:.3f} ({found / 1e6:,.0f} MB)"
        )
    errors = [abs(predicted / found - 1) for *_, predicted, found in rows]
    figures = {"memory_error_median": statistics.median(errors), "memory_error_worst": max(errors)}
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    print(json.dumps({"name": "memory", "figures": figures, "n": len(rows), "machine": machine}))


if __name__ == "__main__":
    main()
