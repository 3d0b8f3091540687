"""What Learn&Drop does to whole trainings on real images: time against accuracy, beside what it has to beat.

    python tests/benchmarks/learn_drop_study.py --data DIR                      every case, small enough for two cores
    python tests/benchmarks/learn_drop_study.py --data DIR --cases resnet20-cifar10 --scale 4    four times the epochs
    python tests/benchmarks/learn_drop_study.py --quick                         digits, one seed: does it run?

Settings, all of a case with the same images and learning rate schedule, stretched to their epochs:

- ``end-to-end``, and the same at half of the epochs, which is the plain way to halve a training's time;
- ``default``: Learn&Drop as `rlsearch.LearnDrop` and ``features=auto`` have it;
- ``default, longer``: the time that it saves goes into more epochs (their number from the times measured before);
- ``backward-only``: the same cuts rule, the dropped prefix run at every step (``features=recompute``);
- ``schedule``: no measurement;
- with ``--curve``, ``threshold`` at several values and ``schedule`` with several warm-ups: time against accuracy.

``--fine-tune`` trains its cases end to end on one half of the classes, and then fine-tunes on the other half.

Accuracy is on test images, after the last epoch; mean and standard deviation over the seeds, and the mean difference to
end-to-end over equal seeds. Time on the CPU is the process's CPU time on one thread, so that other work on the machine
does not count; on a GPU it is wall time, one training after the other. Validation takes a twentieth of the images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from rlsearch import DataSpec, LearnDrop, ModelSpec, Policy, TrainingSpec, TrialSpec
from rlsearch.training.checkpoint import save_weights
from rlsearch.training.data import ImageData, ImageSplit, load_data, load_test
from rlsearch.training.device_data import DeviceData
from rlsearch.training.loop import evaluate, resolve_precision
from rlsearch.training.trial import EVALUATION_BATCH, Trial

END_TO_END, HALF, DEFAULT, LONGER, BACKWARD = (
    "end-to-end",
    "end-to-end, half",
    "default",
    "default, longer",
    "backward-only",
)
# Published: forward operations saved, and the accuracy lost, of Learn&Drop (arXiv 2604.23403).
PUBLISHED = (
    "published: forward FLOPs saved 17.83 % (VGG-11) to 83.74 % (ResNet-152), accuracy lost 0.26 to 2.38 points (VGGs) "
    "and 0.4 to 3.2 points (ResNets), training time more than halved"
)


@dataclass(frozen=True)
class Case:
    """One model on one set.

    Attributes:
        model: what is trained.
        data: folder or name under ``--data``, as `DataSpec` has it.
        images: training images, validation included.
        size: side of the images in pixels.
        epochs: of the end-to-end training.
        lr: the peak learning rate.
    """

    model: str
    data: str
    images: int
    size: int
    epochs: int
    lr: float = 0.1
    kwargs: Mapping[str, Any] = field(default_factory=dict)


_VGG = {"small_head": True}
CASES = {
    "resnet20-cifar10": Case("resnet20", "parquet:cifar10", 2_600, 16, 24),
    "resnet20-fashionmnist": Case("resnet20", "fashionmnist", 2_600, 14, 24),
    "resnet32-cifar10": Case("resnet32", "parquet:cifar10", 2_600, 16, 24),
    "resnet56-fashionmnist": Case("resnet56", "fashionmnist", 1_600, 14, 20),
    "vgg11-cifar10": Case("vgg11_bn", "parquet:cifar10", 1_600, 32, 12, lr=0.05, kwargs=_VGG),
    "vgg11-fashionmnist": Case("vgg11_bn", "fashionmnist", 600, 32, 12, lr=0.05, kwargs=_VGG),
    "resnet20-imagenette": Case("resnet20", "parquet:imagenette", 1_500, 32, 20),
}
SCHEDULE = LearnDrop(score="schedule", warmup=0.05)
CURVE = {
    **{f"threshold {value}": LearnDrop(threshold=value) for value in (0.4, 0.5, 0.8)},
    **{f"schedule from {value}": LearnDrop(score="schedule", warmup=value) for value in (0.3, 0.5)},
}
BATCH = 64
QUICK = Case("resnet20", "digits", 400, 8, 3)


@dataclass(frozen=True)
class Job:
    """One training: setting, seed, and what decides it."""

    setting: str
    seed: int
    case: Case
    epochs: int
    learn_drop: LearnDrop | None
    classes: str = "all"  # or "first" or "second": half of them
    weights: str | None = None  # where to start
    save: str | None = None  # where the weights go


@dataclass(frozen=True)
class Result:
    """What one training gave."""

    setting: str
    seed: int
    epochs: int
    accuracy: float
    seconds: float
    train_flops: float
    forward_flops: float
    dropped_by_epoch: tuple[int, ...]


def settings(case: Case, curve: bool = False) -> dict[str, tuple[int, LearnDrop | None]]:
    """Epochs and policy of each, without the one that depends on measured times."""
    policies = {DEFAULT: LearnDrop(), BACKWARD: LearnDrop(features="recompute"), "schedule": SCHEDULE}
    return {
        END_TO_END: (case.epochs, None),
        HALF: (case.epochs // 2, None),
        **{name: (case.epochs, policy) for name, policy in {**policies, **(CURVE if curve else {})}.items()},
    }


@lru_cache(maxsize=4)
def images(spec: DataSpec, classes: str) -> tuple[ImageData, ImageSplit]:
    """Training images and at most 5,000 test images; of one half of the classes, renumbered, where that is wanted."""
    data, test = load_data(spec), load_test(spec)
    test = ImageSplit(test.images[:5_000], test.labels[:5_000])
    if classes == "all":
        return data, test
    half = data.num_classes // 2
    first = 0 if classes == "first" else half

    def of(split: ImageSplit) -> ImageSplit:
        kept = (split.labels >= first) & (split.labels < first + half)
        return ImageSplit(np.ascontiguousarray(split.images[kept]), split.labels[kept] - first)

    names = data.classes[first : first + half]
    return replace(data, train=of(data.train), validation=of(data.validation), num_classes=half, classes=names), of(
        test
    )


def train(job: Job, root: str | None) -> Result:
    """One training, in a process of its own where several run at once."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    case = job.case
    kind, _, path = case.data.partition(":")
    name = f"{kind}:{Path(root or '') / path}" if path else case.data
    spec = DataSpec(name, None if path else root, limit=case.images, validation_fraction=0.05, image_size=case.size)
    data, test = images(spec, job.classes)
    model = ModelSpec(case.model, data.num_classes, dict(case.kwargs), weights=job.weights)
    training = TrainingSpec(job.epochs, BATCH, lr=case.lr)
    trial = Trial(TrialSpec(model, spec, training, Policy(learn_drop=job.learn_drop), job.seed), data=data)
    dropped = []
    started = time.process_time()
    while not trial.done:
        last = trial.run_epoch()
        dropped.append(last.dropped_units)
    seconds = last.train_seconds if on_gpu else time.process_time() - started
    if job.save:
        save_weights(Path(job.save), trial.model)
    batches = DeviceData(data, trial.device).split_batches(test, EVALUATION_BATCH)
    precision = resolve_precision("auto", trial.device)
    accuracy = evaluate(trial.model, batches, precision=precision, device=trial.device).accuracy
    return Result(
        job.setting, job.seed, job.epochs, accuracy, seconds, last.train_flops, last.forward_flops, tuple(dropped)
    )


def run(jobs: Sequence[Job], root: str | None) -> Iterator[Result]:
    """The results of all jobs, as they end; one training a core, or one after the other on a GPU."""
    if torch.cuda.is_available():
        yield from (train(job, root) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count() or 1, mp_context=context) as pool:
        for done in as_completed([pool.submit(train, job, root) for job in jobs]):
            yield done.result()


def shown(name: str, jobs: Sequence[Job], root: str | None) -> list[Result]:
    """The results, each told as it comes."""
    results = []
    for result in run(jobs, root):
        results.append(result)
        print(
            f"{name} {len(results)}/{len(jobs)}: {result.setting}, seed {result.seed}: {result.accuracy:.4f} in "
            f"{result.seconds:.0f} s, {result.epochs} epochs, units dropped {list(result.dropped_by_epoch)}",
            flush=True,
        )
    return results


def study(name: str, case: Case, seeds: int, root: str | None, curve: bool) -> list[dict[str, Any]]:
    """All settings of a case, as rows."""
    chosen = settings(case, curve)
    jobs = [Job(setting, seed, case, *chosen[setting]) for seed in range(seeds) for setting in chosen]
    results = shown(name, jobs, root)
    ratio = statistics.mean(r.seconds for r in results if r.setting == DEFAULT) / statistics.mean(
        r.seconds for r in results if r.setting == END_TO_END
    )
    epochs = round(case.epochs / min(1.0, ratio))
    longer = [Job(LONGER, seed, case, epochs, chosen[DEFAULT][1]) for seed in range(seeds)]
    return rows_of(name, results + shown(name, longer, root))


def fine_tuning(name: str, case: Case, seeds: int, root: str | None) -> list[dict[str, Any]]:
    """End-to-end on the first half of the classes, then each setting on the second half."""
    with tempfile.TemporaryDirectory() as folder:
        files = {seed: str(Path(folder) / f"{seed}.safetensors") for seed in range(seeds)}
        base = [Job("base", seed, case, case.epochs, None, classes="first", save=file) for seed, file in files.items()]
        shown(f"{name}, first half", base, root)
        gentler = replace(case, lr=case.lr / 4)
        jobs = [
            Job(setting, seed, gentler, *settings(case)[setting], classes="second", weights=file)
            for seed, file in files.items()
            for setting in settings(case)
        ]
        return rows_of(f"{name}, fine-tuning", shown(f"{name}, fine-tuning", jobs, root))


def rows_of(name: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row a setting, end-to-end first."""
    by_setting: dict[str, dict[int, Result]] = {}
    for result in results:
        by_setting.setdefault(result.setting, {})[result.seed] = result
    base = by_setting[END_TO_END]
    return [_row(name, setting, by_setting[setting], base) for setting in sorted(by_setting, key=_order)]


def _order(setting: str) -> tuple[int, str]:
    first = [END_TO_END, HALF, DEFAULT, LONGER, BACKWARD, "schedule"]
    return (first.index(setting) if setting in first else len(first), setting)


def _row(name: str, setting: str, runs: Mapping[int, Result], base: Mapping[int, Result]) -> dict[str, Any]:
    accuracies = [run.accuracy for run in runs.values()]
    gains = [run.accuracy - base[seed].accuracy for seed, run in runs.items()]
    times = [run.seconds / base[seed].seconds for seed, run in runs.items()]
    some = next(iter(runs.values()))
    forward = [run.forward_flops / base[seed].forward_flops for seed, run in runs.items()]
    return {
        "case": name,
        "setting": setting,
        "epochs": some.epochs,
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "gain_mean": statistics.mean(gains),
        "gain_sd": statistics.stdev(gains) if len(gains) > 1 else 0.0,
        "time_ratio": statistics.median(times),
        "time_ratio_min": min(times),
        "time_ratio_max": max(times),
        "forward_flops_saved": 1 - statistics.mean(forward),
        "train_flops_ratio": statistics.mean(run.train_flops / base[seed].train_flops for seed, run in runs.items()),
        "train_seconds": statistics.median(run.seconds for run in runs.values()),
        "dropped_units": statistics.mean(run.dropped_by_epoch[-1] for run in runs.values()),
        "seeds": len(runs),
    }


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of one case."""
    print(f"\n{rows[0]['case']}, {rows[0]['seeds']} seeds")
    print(f"{'setting':<17} {'epochs':>6} {'accuracy, %':>14} {'- end-to-end':>14} {'time':>19} {'forward saved':>14}")
    for row in rows:
        times = f"{row['time_ratio']:.2f}x ({row['time_ratio_min']:.2f}-{row['time_ratio_max']:.2f})"
        print(
            f"{row['setting']:<17} {row['epochs']:>6} {100 * row['accuracy_mean']:>7.2f} ± "
            f"{100 * row['accuracy_sd']:4.2f} {100 * row['gain_mean']:>+7.2f} ± {100 * row['gain_sd']:4.2f} "
            f"{times:>19} {row['forward_flops_saved']:>14.1%}"
        )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was to be reached, and whether it was."""
    found = []
    for row in rows:
        name, loss, times = row["case"], -100 * row["gain_mean"], row["time_ratio"]
        if row["setting"] == LONGER:
            found.append((loss <= 0 and times <= 1.02, f"{name}: equal time: {loss:+.2f} points lost at {times:.2f}x"))
        if row["setting"] != DEFAULT:
            continue
        if "fine-tuning" in name:
            fine, most = loss <= 0.5 and times <= 0.4, "<= 0.5 at <= 0.40x"
        else:
            limit = 2.38 if "vgg" in name else 3.2
            fine, most = loss < limit and times <= 0.5, f"< {limit} at <= 0.50x"
        found.append((fine, f"{name}: default: {loss:+.2f} points lost at {times:.2f}x (wanted {most})"))
    return [f"{'holds' if fine else 'DOES NOT HOLD'}: {text}" for fine, text in found]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy lost against time, a panel a case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = 2 if len(cases) in (2, 4) else min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    kinds = {
        "end-to-end": ("#616e7c", "s"),
        "default": ("#d9480f", "*"),
        "threshold": ("#d9480f", "o"),
        "schedule": ("#1f5fa8", "^"),
        "backward-only": ("#2b8a6e", "D"),
    }
    for panel, case in zip(panels, cases, strict=False):
        for kind, (color, marker) in kinds.items():
            mine = sorted(
                (row for row in rows if row["case"] == case and row["setting"].startswith(kind)),
                key=lambda row: row["time_ratio"],
            )
            panel.errorbar(
                [row["time_ratio"] for row in mine],
                [100 * row["gain_mean"] for row in mine],
                [100 * row["gain_sd"] for row in mine],
                color=color,
                marker=marker,
                markersize=9 if marker == "*" else 5,
                linestyle="-" if kind in ("end-to-end", "threshold", "schedule") else "none",
                linewidth=1,
                capsize=2,
                label=kind,
            )
        panel.set_title(f"{case}, {rows[0]['seeds']} seeds", fontsize=10)
        panel.axhline(0, color="#e4e7eb", zorder=0)
        panel.set_xlabel("time, end-to-end = 1")
        panel.set_ylabel("accuracy − end-to-end, points")
        panel.set_xlim(left=0)
    for panel in panels[len(cases) :]:
        panel.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="the folder of image sets")
    parser.add_argument("--quick", action="store_true", help="digits, one seed")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--curve", nargs="*", default=["resnet20-cifar10"], choices=list(CASES), help="cases with more")
    parser.add_argument("--fine-tune", nargs="*", default=["resnet20-cifar10"], choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the epochs")
    parser.add_argument("--full-size", action="store_true", help="all images, 32 pixels a side: a GPU's work")
    parser.add_argument("--picture", type=Path, help="where the curves go, as PNG")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases}
    fine_tuned = {name: CASES[name] for name in options.fine_tune if name in cases}
    root = None if options.data is None else str(options.data)
    if options.quick:
        cases, fine_tuned, options.seeds = {"resnet20-digits": QUICK}, {"resnet20-digits": QUICK}, 1
    elif root is None:
        print("skipped: give --data DIR or set RLSEARCH_DATA (or use --quick)")
        return

    def scaled(case: Case) -> Case:
        case = replace(case, epochs=round(case.epochs * options.scale))
        return replace(case, images=10**9, size=32) if options.full_size else case

    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        parts = [study(name, scaled(case), options.seeds, root, name in options.curve)]
        if name in fine_tuned:
            parts.append(fine_tuning(name, scaled(case), options.seeds, root))
        for part in parts:
            print_rows(part)
            rows += part
        if options.picture:
            draw(rows, options.picture)
    print(f"\n{PUBLISHED}")
    print("\n".join(verdicts(rows)))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {device}"
    figures = {"default": asdict(LearnDrop()), "rows": rows}
    print(json.dumps({"name": "learn_drop_study", "figures": figures, "n": options.seeds, "machine": machine}))


if __name__ == "__main__":
    main()
