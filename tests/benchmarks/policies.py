"""What policies do to a whole training: accuracy over seeds, parameters, memory, time and compute.

    python tests/benchmarks/policies.py --data DIR            CIFAR-10 from DIR/cifar10, ResNet-32
    python tests/benchmarks/policies.py --quick               the digits that come with scikit-learn, in a minute or two

Settings take turns inside every seed, so that a slow minute of the machine falls on all of them. Times are of training
alone, one trial at a time on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlsearch import DataSpec, EpochMetrics, LearnDrop, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec
from rlsearch.training.data import load_data
from rlsearch.training.trial import run_trial

UNITS = ("layer1.1", "layer1.3", "layer2.2", "layer3.2")


def replaced(block: str) -> Policy:
    """Four units of ResNet-32, a fifth of its parameters, by one kind of block."""
    return Policy(replacements=tuple(Replacement(unit, block) for unit in UNITS))


def dropped(features: str) -> Policy:
    """Settled layers leave in the second half of the training, seven tenths of them at most."""
    return Policy(learn_drop=LearnDrop(threshold=0.75, patience=1, warmup=0.5, max_fraction=0.7, features=features))


SETTINGS: Mapping[str, Policy] = {
    "end-to-end": Policy(),
    **{block: replaced(block) for block in ("skip", "scalar", "channel", "lowrank")},
    **{f"drop, {features}": dropped(features) for features in ("recompute", "stored")},
}


def row(name: str, runs: list[EpochMetrics]) -> dict[str, Any]:
    """One setting over its seeds."""
    accuracies = [run.accuracy for run in runs]
    return {
        "setting": name,
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "params": runs[0].params,
        "memory": runs[0].memory,
        "memory_predicted": runs[0].memory_predicted,
        "train_seconds": statistics.median(run.train_seconds for run in runs),
        "train_flops": statistics.median(run.train_flops for run in runs),
        "dropped_units": statistics.median(run.dropped_units for run in runs),
        "seeds": len(runs),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """For people: everything beside the baseline."""
    base = rows[0]
    print(
        f"{'setting':<16} {'accuracy, %':>14} {'params':>8} {'memory':>8} {'(predicted)':>12} {'time':>7} {'FLOPs':>7}"
    )
    for item in rows:
        relative = {key: item[key] / base[key] for key in ("params", "memory", "train_seconds", "train_flops")}
        print(
            f"{item['setting']:<16} {100 * item['accuracy_mean']:>7.2f} ± {100 * item['accuracy_sd']:.2f} "
            f"{relative['params']:>7.3f}x {relative['memory']:>7.3f}x "
            f"{item['memory_predicted'] / item['memory']:>11.3f}x "
            f"{relative['train_seconds']:>6.2f}x {relative['train_flops']:>6.2f}x"
        )
    print("params, memory, time, FLOPs: of end-to-end training; (predicted): predicted memory over measured memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="the folder of image sets")
    parser.add_argument("--quick", action="store_true", help="digits, few epochs, one seed")
    parser.add_argument("--limit", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    if options.quick:
        spec, options.epochs, options.seeds, options.batch_size = DataSpec("digits"), 9, 1, 64
    elif options.data is None:
        print("skipped: give --data DIR or set RLSEARCH_DATA (or use --quick)")
        return
    else:
        spec = DataSpec(f"parquet:{Path(options.data) / 'cifar10'}", limit=options.limit)
    data = load_data(spec)
    model = ModelSpec("resnet32")
    training = TrainingSpec(options.epochs, options.batch_size, lr=options.lr, precision=options.precision)
    runs: dict[str, list[EpochMetrics]] = {name: [] for name in SETTINGS}
    # The first training on a device pays for what later ones find ready.
    list(run_trial(TrialSpec(model, spec, TrainingSpec(epochs=1), Policy()), data=data))
    for seed in range(options.seeds):
        for name, policy in SETTINGS.items():
            *_, last = run_trial(TrialSpec(model, spec, training, policy, seed), data=data)
            runs[name].append(last)
            print(f"seed {seed}, {name}: {last.accuracy:.4f} in {last.train_seconds:.1f} s", flush=True)
    rows = [row(name, results) for name, results in runs.items()]
    print_table(rows)
    device = runs["end-to-end"][0].device
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {device}"
    print(json.dumps({"name": "policies", "figures": rows, "n": options.seeds, "machine": machine}))


if __name__ == "__main__":
    main()
