"""What dropping a prefix saves a training step, and what stored features cost: ResNet-32 on 32x32 images.

    python tests/benchmarks/learn_drop.py --data DIR    CIFAR-10 images; without, random ones of the same form
    python tests/benchmarks/learn_drop.py --quick       small batches, few rounds: does it run?

Five settings: every layer learns; the stem and 10 or 13 of the 15 blocks dropped (11 or 14 of 16), their prefix run
without gradient at every step (backward-only) or read from stored features. All train real epochs of a few batches,
augmentation, optimizer and all, and take turns in every round, so that a slow moment of the machine falls on all of
them; a figure is the median of the rounds' ratios. Building the cache is beside one forward pass of the prefix over
prepared images a view; moving it, beside one of the blocks between the two cuts; reading a batch, shifts included,
beside the stored step.

What each score adds to a step of the whole network: its hook's time, and that of its measurement spread over the 390
steps of an epoch of 50,000 images, as a share of a step without it (target: at most 0.01); and, for comparison, steps
with it over steps without, in turns. On CUDA no hook may wait for the device: torch itself raises where one does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsearch import DataSpec, LearnDrop, TrainingSpec, build_model
from rlsearch.learn_drop import Dropper
from rlsearch.policy import SCORES
from rlsearch.training.data import ImageData, ImageSplit, load_data
from rlsearch.training.device_data import DeviceData
from rlsearch.training.feature_inputs import TrainingInputs
from rlsearch.training.loop import PlainStep, build_optimizer, train_epoch

CUTS = (11, 14)
VIEWS = 2
MEASURED = [score for score in SCORES if score != "schedule"]
EPOCH_STEPS = 390
HOOK_CALLS = 20


def images(data: Path | None, count: int) -> ImageData:
    """``count`` training images of 32x32, flipped and cropped by 4 pixels."""
    if data is not None:
        spec = DataSpec(f"parquet:{data / 'cifar10'}", limit=2 * count, validation_fraction=0.5, flip=True, crop=4)
        return load_data(spec)
    source = np.random.default_rng(0)
    part = ImageSplit(source.integers(0, 256, (count, 3, 32, 32), np.uint8), source.integers(0, 10, count))
    return ImageData(part, part, 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, True, 4, "random")


class Setting:
    """One model in training, the first ``cut`` segments dropped."""

    def __init__(self, data: DeviceData, batch: int, cut: int, features: str, score: str = "schedule") -> None:
        torch.manual_seed(0)
        self.data, self.batch = data, batch
        self.model = build_model("resnet32").to(data.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(TrainingSpec(batch_size=batch), self.model)
        # Here the benchmark alone moves the cut.
        settings = LearnDrop(score, features=features, max_fraction=0.0)
        self.dropper = Dropper(self.model, self.optimizer, 9, settings)
        self.inputs = TrainingInputs(data, self.model, self.dropper, batch, 0, "fp32")
        self.epoch = 0
        self.cut_to(cut)

    def cut_to(self, cut: int) -> None:
        if cut:
            self.dropper.load_state_dict(self.dropper.state_dict() | {"cut": cut})
        self.inputs.follow_cut()

    def train(self) -> None:
        self.dropper.train_mode()
        rates = [1e-3] * self.inputs.num_steps
        batches = self.inputs.batches(self.epoch)
        step = PlainStep(self.inputs.forward, self.optimizer, device=self.data.device)
        train_epoch(step, batches, self.optimizer, rates)
        self.epoch += 1

    def read(self) -> None:
        for _ in self.inputs.batches(0):
            pass

    def prefix(self, prepared: Sequence[torch.Tensor], start: int = 0) -> None:
        self.dropper.train_mode()
        for inputs in prepared:
            self.dropper.prefix(inputs, start)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def step_times(data: DeviceData, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of every setting, and of the reading in it, by round."""
    settings = {"full": Setting(data, batch, 0, "recompute")}
    for cut in CUTS:
        settings[f"backward-only {cut}"] = Setting(data, batch, cut, "recompute")
        settings[f"stored {cut}"] = Setting(data, batch, cut, "stored")
        assert settings[f"stored {cut}"].inputs.stored, "the features found no room"
    times: dict[str, list[float]] = {name: [] for name in settings} | {f"read {cut}": [] for cut in CUTS}
    for turn in range(rounds + 1):
        for name, setting in settings.items():
            elapsed = seconds(setting.train, data.device) / setting.inputs.num_steps
            reading = seconds(setting.read, data.device) / setting.inputs.num_steps if "stored" in name else 0.0
            if turn:  # the first one warms up
                times[name].append(elapsed)
                if "stored" in name:
                    times[name.replace("stored", "read")].append(reading)
    return times


def build_times(data: DeviceData, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to build the cache at the first cut and to move it to the second, and of the same forward passes."""
    indices = torch.arange(data.num_train, device=data.device)
    prepared = [data.view(part) for part in indices.split(batch)] * VIEWS
    times: dict[str, list[float]] = {"build": [], "build passes": [], "move": [], "move passes": []}
    for turn in range(rounds + 1):
        setting = Setting(data, batch, 0, "stored")
        measured = {"build": seconds(lambda s=setting: s.cut_to(CUTS[0]), data.device)}
        measured["build passes"] = seconds(lambda s=setting: s.prefix(prepared), data.device)
        features = [setting.dropper.prefix(inputs) for inputs in prepared]
        measured["move"] = seconds(lambda s=setting: s.cut_to(CUTS[1]), data.device)
        measured["move passes"] = seconds(lambda s=setting, f=features: s.prefix(f, CUTS[0]), data.device)
        if turn:
            for name, value in measured.items():
                times[name].append(value)
    return times


def hook_seconds(setting: Setting) -> float:
    """Seconds of what a score's hook does at one step, on the gradients that are there."""
    optimizer = setting.optimizer
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]

    def call() -> None:
        for _ in range(HOOK_CALLS):
            for hook in hooks:
                hook(optimizer, (optimizer,), {})

    call()
    if setting.data.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return seconds(call, setting.data.device) / HOOK_CALLS


def score_times(data: DeviceData, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step with and without each score, of its hook, and of its measurement, by round."""
    settings = {score: Setting(data, batch, 0, "recompute", score) for score in ("schedule", *MEASURED)}
    times: dict[str, list[float]] = {
        f"{kind} {score}": [] for kind in ("step", "hook", "measure") for score in settings
    }
    for turn in range(rounds + 1):
        for score, setting in settings.items():
            measured = {"step": seconds(setting.train, data.device) / setting.inputs.num_steps}
            measured["hook"] = hook_seconds(setting)
            measured["measure"] = seconds(setting.dropper.end_epoch, data.device)
            if turn:
                for what, value in measured.items():
                    times[f"{what} {score}"].append(value)
    return times


def score_ratios(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """What every score adds, as a share of a step without; and whole steps beside each other. By round."""
    plain = times["step schedule"]
    found = {}
    for score in MEASURED:
        pairs = zip(times[f"hook {score}"], times[f"measure {score}"], strict=True)
        found[f"cost_of_{score}"] = ratio([hook + measure / EPOCH_STEPS for hook, measure in pairs], plain)
        found[f"step_ratio_{score}"] = ratio(times[f"step {score}"], plain)
    return found


@torch.no_grad()
def logit_difference(data: DeviceData, batch: int) -> float:
    """The greatest difference of logits from stored features and from images, at both cuts, the cache moved between."""
    setting = Setting(data, batch, 0, "stored")
    greatest = 0.0
    for cut in CUTS:
        setting.cut_to(cut)
        setting.model.eval()
        cache = setting.inputs.cache
        assert cache is not None
        for view in range(VIEWS):
            for indices in torch.arange(data.num_train, device=data.device).split(batch):
                stored = setting.dropper.suffix(cache.batch(indices, torch.full_like(indices, view)))
                images_of_view = data.view(indices, flipped=view == 1)
                greatest = max(greatest, float((stored - setting.model(images_of_view)).abs().max()))
    return greatest


def ratio(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def ratios_of(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Every figure that is a ratio, by round."""
    worst_build = [
        max(pair)
        for pair in zip(
            ratio(times["build"], times["build passes"]), ratio(times["move"], times["move passes"]), strict=True
        )
    ]
    reads = [ratio(times[f"read {cut}"], times[f"stored {cut}"]) for cut in CUTS]
    worst_read = [max(pair) for pair in zip(*reads, strict=True)]
    return {
        "step_speedup_11_of_16": ratio(times["full"], times["stored 11"]),
        "step_speedup_14_of_16": ratio(times["full"], times["stored 14"]),
        "step_speedup_over_backward_only": ratio(times["backward-only 11"], times["stored 11"]),
        "cache_build_ratio": worst_build,
        "cache_read_ratio": worst_read,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="the folder of image sets")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="batches an epoch")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.batch, options.steps = 2, 8, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = DeviceData(images(None if options.quick else options.data, options.batch * options.steps), device)
    times = step_times(data, options.batch, options.rounds) | build_times(data, options.batch, options.rounds)
    of_scores = score_times(data, options.batch, options.rounds)
    ratios = ratios_of(times) | score_ratios(of_scores)
    times |= of_scores
    print(f"{'':<32} {'median':>10} {'least to greatest':>24}")
    for name, values in times.items():
        spread = f"{1e3 * min(values):.2f} to {1e3 * max(values):.2f}"
        print(f"{name + ', ms':<32} {1e3 * statistics.median(values):>10.2f} {spread:>24}")
    for name, values in ratios.items():
        print(f"{name:<32} {statistics.median(values):>10.4f} {f'{min(values):.4f} to {max(values):.4f}':>24}")
    figures: dict[str, Any] = {name: statistics.median(values) for name, values in ratios.items()}
    figures["max_logit_difference"] = logit_difference(data, options.batch)
    print(f"{'max_logit_difference':<32} {figures['max_logit_difference']:>10.2e}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {where}"
    print(json.dumps({"name": "learn_drop", "figures": figures, "n": options.rounds, "machine": machine}))


if __name__ == "__main__":
    main()
