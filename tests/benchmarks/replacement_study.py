"""What replacing does to a whole training on real images, block by block, beside its controls.

    python tests/benchmarks/replacement_study.py --data DIR              CIFAR-10 from DIR/cifar10
    python tests/benchmarks/replacement_study.py --data DIR --epochs 30 --limit 50000      the whole set (a GPU's work)
    python tests/benchmarks/replacement_study.py --quick                 digits, one model, one seed: does it run?

Settings: end-to-end training; the preset ``v1``; every block at the same units; one computing layer in place of each of
these units (``single``); and two controls: the units left out (``skip``), and an architecture built without them
(``removed``), which is the same network from other random numbers, so that what lies between those two is noise.

Accuracy is on the validation split after the last epoch, mean and standard deviation over the seeds; ``- skip`` is the
mean difference to ``skip`` over equal seeds. Step times are measured by themselves before any training, the settings in
turns. On the CPU, trainings run one a core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rlsearch import (
    DataSpec,
    EpochMetrics,
    ModelSpec,
    Policy,
    Replacement,
    TrainingSpec,
    TrialSpec,
    apply_policy,
    build_model,
    estimate_cost,
)
from rlsearch.replacement import BLOCKS
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.models import build_spec
from rlsearch.training.trial import run_trial

# Inner units of every stage. In ResNet-20 the second and third stage's borrow from units of another width, so that one
# of their tensors stays learnable.
UNITS: Mapping[str, tuple[str, ...]] = {
    "resnet20": ("layer1.1", "layer2.1", "layer3.1"),
    "resnet32": ("layer1.1", "layer1.3", "layer2.2", "layer3.2"),
}
Setting = tuple[ModelSpec, Policy]

# Of a few thousand images a tenth would be too few to tell settings apart.
VALIDATION_FRACTION = 0.3


def without(num_classes: int, model: str, units: Sequence[str]) -> nn.Module:
    """An architecture that never had the units, from random numbers of its own."""
    built = build_model(model, num_classes)
    for unit in sorted(units, reverse=True):
        stage, _, index = unit.rpartition(".")
        del built.get_submodule(stage)[int(index)]
    for module in built.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return built


def settings(model: str) -> dict[str, Setting]:
    """By name, end-to-end training first."""
    spec, units = ModelSpec(model), UNITS[model]

    def replaced(block: str, **options: Any) -> Setting:
        known = {key: value for key, value in options.items() if key in BLOCKS[block].options}
        return spec, Policy(replacements=tuple(Replacement(unit, block, known) for unit in units))

    return {
        "end-to-end": (spec, Policy()),
        "v1": (spec, Policy.preset("v1", build_model(model))),
        "removed": (ModelSpec("replacement_study:without", kwargs={"model": model, "units": list(units)}), Policy()),
        **{block: replaced(block, boundary="keep") for block in BLOCKS},
        **{f"{block}, single": replaced(block, operator="single") for block in ("scalar", "lowrank")},
    }


@lru_cache(maxsize=1)
def images(data: DataSpec) -> ImageData:
    return load_data(data)


def train(model: str, name: str, data: DataSpec, training: TrainingSpec, seed: int) -> tuple[str, int, EpochMetrics]:
    """One training, in a process of its own where several run at once."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    spec, policy = settings(model)[name]
    *_, last = run_trial(TrialSpec(spec, data, training, policy, seed), data=images(data))
    return name, seed, last


def trainings(
    model: str, names: Sequence[str], data: DataSpec, training: TrainingSpec, seeds: int
) -> Iterator[tuple[str, int, EpochMetrics]]:
    """All of one model, as they end; all settings of a seed before the next seed."""
    wanted = [(model, name, data, training, seed) for seed in range(seeds) for name in names]
    if torch.cuda.is_available():
        yield from (train(*one) for one in wanted)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count() or 1, mp_context=context) as pool:
        for done in as_completed([pool.submit(train, *one) for one in wanted]):
            yield done.result()


def step_times(model: str, size: tuple[int, int, int], batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of one training step of every setting, in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(batch, *size, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    nets = {}
    for name, (spec, policy) in settings(model).items():
        net = build_spec(spec)
        apply_policy(net, policy)
        nets[name] = net.to(device, memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(rounds + 1):
        for name, net in nets.items():
            started = time.perf_counter()
            F.cross_entropy(net(x), labels).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - started)
            net.zero_grad(set_to_none=True)
    return times


def rows_of(
    model: str, runs: Mapping[str, Mapping[int, EpochMetrics]], times: Mapping[str, Sequence[float]], batch: int
) -> list[dict[str, Any]]:
    """One row a setting."""
    shape = (3, 32, 32)
    rows = []
    for name, by_seed in runs.items():
        accuracies = [run.accuracy for run in by_seed.values()]
        gains = [run.accuracy - runs["skip"][seed].accuracy for seed, run in by_seed.items()]
        spec, policy = settings(model)[name]
        first = next(iter(by_seed.values()))
        ratios = [mine / dense for mine, dense in zip(times[name], times["end-to-end"], strict=True)]
        rows.append(
            {
                "model": model,
                "setting": name,
                "accuracy_mean": statistics.mean(accuracies),
                "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                "over_skip_mean": statistics.mean(gains),
                "over_skip_sd": statistics.stdev(gains) if len(gains) > 1 else 0.0,
                "params": first.params,
                "memory": estimate_cost(build_spec(spec), policy, shape, batch).memory,
                "step_ratio": statistics.median(ratios),
                "train_flops": first.train_flops,
                "train_seconds": statistics.median(run.train_seconds for run in by_seed.values()),
                "seeds": len(accuracies),
            }
        )
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    base = rows[0]
    print(
        f"\n{base['model']}, {base['seeds']} seeds\n{'setting':<18} {'accuracy, %':>14} {'- skip':>14} {'params':>9} "
        f"{'':>7} {'memory':>7} {'step':>6} {'FLOPs':>6}"
    )
    for row in rows:
        relative = {key: row[key] / base[key] for key in ("params", "memory", "train_flops")}
        print(
            f"{row['setting']:<18} {100 * row['accuracy_mean']:>7.2f} ± {100 * row['accuracy_sd']:4.2f} "
            f"{100 * row['over_skip_mean']:>+7.2f} ± {100 * row['over_skip_sd']:4.2f} {row['params']:>9,} "
            f"{relative['params']:>6.3f}x {relative['memory']:>6.3f}x {row['step_ratio']:>5.2f}x "
            f"{relative['train_flops']:>5.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="the folder of image sets")
    parser.add_argument("--quick", action="store_true", help="digits, ResNet-20, one seed")
    parser.add_argument("--models", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--limit", type=int, default=6_500, help="training images, three tenths of which validate")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16", help="fp32 or bf16")
    parser.add_argument("--rounds", type=int, default=7, help="steps timed")
    options = parser.parse_args()
    if options.quick:
        data, options.models, options.epochs, options.seeds, options.rounds = DataSpec("digits"), ["resnet20"], 2, 1, 2
    elif options.data is None:
        print("skipped: give --data DIR or set RLSEARCH_DATA (or use --quick)")
        return
    else:
        name = f"parquet:{Path(options.data) / 'cifar10'}"
        data = DataSpec(name, limit=options.limit, validation_fraction=VALIDATION_FRACTION)
    training = TrainingSpec(options.epochs, options.batch_size, lr=options.lr, precision=options.precision)
    rows: list[dict[str, Any]] = []
    for model in options.models:
        times = step_times(model, (3, 32, 32), options.batch_size, options.rounds)
        names = list(settings(model))
        runs: dict[str, dict[int, EpochMetrics]] = {name: {} for name in names}
        for name, seed, last in trainings(model, names, data, training, options.seeds):
            runs[name][seed] = last
            done = sum(map(len, runs.values()))
            print(f"{done}/{len(names) * options.seeds} {model}, seed {seed}, {name}: {last.accuracy:.4f}", flush=True)
        of_model = rows_of(model, runs, times, options.batch_size)
        print_rows(of_model)
        rows += of_model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {device}"
    print(json.dumps({"name": "replacement_study", "figures": rows, "n": options.seeds, "machine": machine}))


if __name__ == "__main__":
    main()
