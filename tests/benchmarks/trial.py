"""How fast one trial is: beside the plain loop that one writes first, and until its first step.

    python tests/benchmarks/trial.py --data DIR    CIFAR-10 images; without, random ones of the same form
    python tests/benchmarks/trial.py --quick       few images, small nets: does it run?

Both train the same ResNet-32 (batch 128, 32x32 images) from the same start on the same images, with the same schedule
and optimizer, epoch by epoch in turns: `plain_loop` (torchvision transforms, DataLoader with two workers, float32,
NCHW) and a `Trial` as a search runs it. A round's figure is the ratio of the two epochs' times, evaluation left out;
each seed's first round, in which libraries warm up, counts for neither. Accuracy is on test images, after the last
epoch.

`cost.py` gives how long a policy of ResNet-56 takes to be costed, and on a GPU `memory.py` how far the predicted memory
is from the measured.

Where there is a GPU: the same beside the plain loop on it; what share of the card's peak in bf16 a ResNet-18 with a
small stem reaches (128 and 512 images a step; FLOPs as torch counts them, forward and backward); and the time from the
first step to 94 % on CIFAR-10's test images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost import costing_times
from memory import MODELS, measured_errors
from plain_loop import PlainTraining

from rlsearch import DataSpec, ModelSpec, TrainingSpec, build_model
from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.training.data import ImageData, ImageSplit, load_data, load_test
from rlsearch.training.device_data import DeviceData
from rlsearch.training.loop import evaluate
from rlsearch.training.trial import EVALUATION_BATCH, Trial
from rlsearch.training.trial_spec import TrialSpec

# Dense bf16 peaks in TFLOP/s, as the maker's data sheets give them.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0, "4090": 165.0}
AIRBENCH_SECONDS = 2.59  # published for cifar10-airbench's 94 % on an A100
WARM_STARTS = 7


def images(folder: Path | None, count: int) -> tuple[DataSpec, ImageData, ImageSplit]:
    """``count`` training images, a few to validate, and test images."""
    if folder is not None:
        whole = round(count / 0.9)
        spec = DataSpec(f"parquet:{folder / 'cifar10'}", limit=whole, validation_fraction=0.1, flip=True, crop=4)
        return spec, load_data(spec), load_test(spec)
    source = np.random.default_rng(0)

    def part(count: int) -> ImageSplit:
        return ImageSplit(source.integers(0, 256, (count, 3, 32, 32), np.uint8), source.integers(0, 10, count))

    names = tuple("0123456789")
    data = ImageData(part(count), part(256), 10, names, (0.5,) * 3, (0.25,) * 3, True, 4, "random")
    return DataSpec("parquet:random"), data, part(512)


def accuracy(model: torch.nn.Module, images: DeviceData, test: ImageSplit) -> float:
    """Percent of the test images, in float32."""
    batches = images.split_batches(test, EVALUATION_BATCH)
    return 100 * evaluate(model, batches, precision="fp32", device=images.device).accuracy


def against_plain(
    spec: DataSpec, data: ImageData, test: ImageSplit, name: str, training: TrainingSpec, seeds: int, device: str
) -> dict[str, Any]:
    """Ratios of the epochs' times, and both accuracies of every seed."""
    ratios, found = [], {"plain": [], "ours": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        plain = PlainTraining(build_model(name), data, training, torch.device(device))
        trial = Trial(TrialSpec(ModelSpec(name), spec, training, seed=seed), data=data, device=device)
        spent = 0.0
        for epoch in range(training.epochs):
            theirs = plain.train_epoch()
            total = trial.run_epoch().train_seconds
            if epoch:
                ratios.append(theirs / (total - spent))
            print(f"seed {seed}, epoch {epoch + 1}: plain {theirs:.1f} s, ours {total - spent:.1f} s", flush=True)
            spent = total
        found["plain"].append(accuracy(plain.model, trial.images, test))
        found["ours"].append(accuracy(trial.model, trial.images, test))
    return {"ratios": ratios, **found}


def warm_starts(spec: DataSpec, data: ImageData, device: str) -> list[float]:
    """Seconds from a new policy to its first batch, in a process that has trained others of the same model."""
    taken = []
    images: ImageData | DeviceData = data
    for index in range(WARM_STARTS + 1):
        units = [f"layer{1 + index % 3}.2", f"layer{1 + (index + 1) % 3}.3"]
        replaced = tuple(Replacement(unit, block) for unit, block in zip(units, ("scalar", "skip"), strict=True))
        started = time.perf_counter()
        policy = Policy(replacements=replaced, learn_drop=LearnDrop())
        trial = Trial(TrialSpec(ModelSpec("resnet32"), spec, TrainingSpec(), policy, index), data=images, device=device)
        next(iter(trial._inputs.batches(0)))
        taken.append(time.perf_counter() - started)
        images = trial.images
    return taken[1:]


def peak_share(device: str, batch: int, side: int) -> float | None:
    """Achieved operations a second over the card's peak; None where the peak is unknown."""
    source = np.random.default_rng(0)
    steps = 200 if device == "cuda" else 2
    split = ImageSplit(source.integers(0, 256, (batch * steps, 3, side, side), np.uint8), np.zeros(batch * steps, int))
    part = ImageSplit(split.images[:2], split.labels[:2])
    data = ImageData(split, part, 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, True, 4, "random")
    precision = "bf16" if device == "cuda" else "fp32"
    training = TrainingSpec(epochs=3, batch_size=batch, precision=precision, compile="auto")
    model = ModelSpec("resnet18", kwargs={"small_stem": True})
    trial = Trial(TrialSpec(model, DataSpec("parquet:random"), training), data=data, device=device)
    rows = [trial.run_epoch() for _ in range(3)]
    flops, seconds = (getattr(rows[2], name) - getattr(rows[1], name) for name in ("train_flops", "train_seconds"))
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    print(f"{f'ResNet-18, batch {batch}, TFLOP/s':<44} {flops / seconds / 1e12:.2f}")
    peak = next((1e12 * peak for name, peak in PEAKS.items() if name in card), None)
    return peak and flops / seconds / peak


def seconds_to_94(folder: Path, device: str, epochs: int, limit: int | None) -> tuple[float, float]:
    """Training seconds of a run of fixed length, and the test accuracy it ends with, percent."""
    spec = DataSpec(
        f"parquet:{folder / 'cifar10'}", limit=limit, validation_fraction=0.01, flip="alternating", crop=4, cutout=8
    )
    training = TrainingSpec(
        epochs=epochs, batch_size=512, lr=0.4, weight_decay=5e-4, label_smoothing=0.1, warmup_epochs=3
    )
    model = ModelSpec("resnet18", kwargs={"small_stem": True})
    trial = Trial(TrialSpec(model, spec, training), device=device)
    while not trial.done:
        row = trial.run_epoch()
        print(f"epoch {row.epoch}: {row.train_seconds:.1f} s, validation accuracy {row.accuracy:.4f}", flush=True)
    return row.train_seconds, accuracy(trial.model, trial.images, load_test(spec))


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n = {len(values)})"


def mean_sd(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, small nets; also the GPU's parts, on the CPU")
    parser.add_argument("--data", type=Path, help="the folder with cifar10/; without it, random images")
    parser.add_argument("--images", type=int, default=5120, help="training images on the CPU (5120)")
    parser.add_argument("--epochs", type=int, default=6, help="of each training (6)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (3)")
    options = parser.parse_args()
    quick = options.quick
    net, count = ("resnet20", 64) if quick else ("resnet32", options.images)
    epochs, seeds = (2, 1) if quick else (options.epochs, options.seeds)

    spec, data, test = images(options.data, count)
    training = TrainingSpec(epochs=epochs, batch_size=128, lr=0.1)
    on_cpu = against_plain(spec, data, test, net, training, seeds, "cpu")
    warm = warm_starts(spec, data, "cpu")
    figures: dict[str, Any] = {
        "cpu_epoch_speedup": statistics.median(on_cpu["ratios"]),
        "cpu_epoch_speedup_range": [min(on_cpu["ratios"]), max(on_cpu["ratios"])],
        "cpu_accuracy_plain": on_cpu["plain"],
        "cpu_accuracy_ours": on_cpu["ours"],
        "warm_start_seconds": statistics.median(warm),
        "warm_start_seconds_max": max(warm),
        "gpu_epoch_speedup": None,
    }
    print(f"{'CPU epoch, plain over ours':<44} {spread(on_cpu['ratios'])}")
    print(f"{'test accuracy, plain':<44} {mean_sd(on_cpu['plain'])}")
    print(f"{'test accuracy, ours':<44} {mean_sd(on_cpu['ours'])}")
    print(f"{'from a policy to its first step, s':<44} {spread(warm, 3)}")
    _, _, milliseconds, _ = costing_times(5 if quick else 1000)
    figures |= {"estimate_cost_ms": statistics.median(milliseconds), "estimate_cost_ms_max": max(milliseconds)}
    figures["memory_error_median"] = None
    print(f"{'costing a policy, ms':<44} {spread(milliseconds, 1)}")
    if torch.cuda.is_available() or quick:
        figures |= gpu_figures(options.data, quick)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(
        json.dumps(
            {
                "name": "trial",
                "figures": figures,
                "n": len(on_cpu["ratios"]),
                "machine": f"{cpu}, torch {torch.__version__}, {gpu}",
            }
        )
    )


def gpu_figures(folder: Path | None, quick: bool) -> dict[str, Any]:
    """What needs a GPU; ``quick`` runs it small, on whatever there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec, data, test = images(folder, 64 if quick else 45_000)
    net = "resnet20" if quick else "resnet32"
    training = TrainingSpec(epochs=2 if quick else 6, batch_size=128, lr=0.1)
    beside = against_plain(spec, data, test, net, training, 1 if quick else 3, device)
    shares = {batch: peak_share(device, batch, 8 if quick else 32) for batch in ((4,) if quick else (128, 512, 1024))}
    print(f"{device + ' epoch, plain over ours':<44} {spread(beside['ratios'])}")
    print(f"{'test accuracy, plain and ours':<44} {mean_sd(beside['plain'])}, {mean_sd(beside['ours'])}")
    for batch, share in shares.items():
        print(f"{f'ResNet-18, batch {batch}, of the peak':<44} {share}")
    figures: dict[str, Any] = {
        "gpu_epoch_speedup": statistics.median(beside["ratios"]),
        "gpu_accuracy_plain": beside["plain"],
        "gpu_accuracy_ours": beside["ours"],
        "resnet18_peak_share": max(filter(None, shares.values()), default=None),
    }
    if folder is not None:
        seconds, reached = seconds_to_94(folder, device, 1 if quick else 18, 256 if quick else None)
        print(f"{'18 epochs of ResNet-18: seconds, accuracy':<44} {seconds:.1f}, {reached:.2f} %")
        print(f"{'published for airbench on an A100, 94 %':<44} {AIRBENCH_SECONDS}")
        figures |= {"seconds_to_94": seconds, "accuracy_reached": reached}
    if device == "cuda":
        errors = measured_errors(MODELS, on_cuda=True)["memory_error"]
        figures |= {"memory_error_median": statistics.median(errors), "memory_error_worst": max(errors)}
    else:
        figures["gpu_parts_ran_on"] = "cpu"
        figures["gpu_epoch_speedup"] = None  # there is no GPU
    return figures


if __name__ == "__main__":
    main()
