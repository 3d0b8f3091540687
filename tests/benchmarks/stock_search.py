"""What one puts together in an afternoon: a search by Ray Tune and Optuna as they come, around a plain training.

    python tests/benchmarks/stock_search.py SPACE.yaml --trials 200 --rows FILE

`end_to_end.py` starts it beside rlsearch. Of rlsearch it takes what such a script could not do without: the space's
numbers, the same images and split, the model with its starting weights, and the surgery. What is Tune's: a function
trainable, `OptunaSearch` with its own sampler over a flat space, one choice a unit and the learning rate. Choices that
do not go together are repaired to "keep". Where there was a choice, the script takes the quicker one: units are found
once and handed to all trials, no process loads the images, accuracy is taken after the last epoch alone, and costs come
from the first training step: `rlsearch.estimate_cost` would take some seconds in each trial's new process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from rlsearch import Policy, Replacement, Unit, apply_policy, build_model, find_units
from rlsearch.replacement import fits
from rlsearch.search.space import SearchSpace, load_space
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.loop import TrainingSpec, learning_rate

KEEP = "keep"
CONCURRENT = 2
MODES = {"accuracy": "max", "params": "min", "memory": "min", "train_flops": "min"}


class Pictures(TensorDataset):
    """Float images in memory, and the usual augmentation of each."""

    def __init__(self, data: ImageData) -> None:
        super().__init__(*as_tensors(data.train))
        steps: list[Any] = [transforms.RandomCrop(data.input_shape[1], padding=data.crop)] if data.crop else []
        if data.flip:
            steps.append(transforms.RandomHorizontalFlip())
        self._transform = transforms.Compose([*steps, transforms.Normalize(data.mean, data.std)])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return self._transform(image), label


def as_tensors(split: Any) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in [0, 1], and labels (N,)."""
    return torch.from_numpy(split.images.copy()).float() / 255, torch.from_numpy(split.labels.copy())


def matched_units(space: SearchSpace, units: Sequence[Unit]) -> list[Unit]:
    """The units that may be replaced."""
    assert space.replacement is not None
    patterns, roles = space.replacement.units, space.replacement.roles
    return [u for u in units if u.role in roles and any(fnmatchcase(u.name, pattern) for pattern in patterns)]


def repaired(space: SearchSpace, units: Sequence[Unit], choices: Mapping[str, str]) -> Policy:
    """The policy of one choice a unit: from front to back, what does not go with those before it is kept.

    A block that computes borrows from the units before and behind it, which must then be kept.
    """
    assert space.replacement is not None
    matched = matched_units(space, units)
    most = int(space.replacement.max_fraction * len(matched) + 1e-9)
    chosen: dict[str, str] = {}
    lenders: set[str] = set()
    for unit in matched:
        block = choices.get(unit.name, KEEP)
        sources = set() if block == "skip" else set(unit.sources or ())
        if block == KEEP or len(chosen) == most or unit.name in lenders or sources & set(chosen):
            continue
        chosen[unit.name] = block
        lenders |= sources
    return Policy(space.model, tuple(Replacement(unit, block, {}) for unit, block in sorted(chosen.items())))


def train(
    space: SearchSpace, data: ImageData, units: Sequence[Unit], policy: Policy, lr: float, seed: int
) -> dict[str, float]:
    """One training from the space's weights, and its four objectives."""
    torch.manual_seed(seed)
    training = replace(space.training, lr=lr)
    model = build_model(space.model.name, data.num_classes, space.model.weights)
    apply_policy(model, policy, units=units)
    loader = DataLoader(Pictures(data), batch_size=training.batch_size, shuffle=True)
    optimizer = make_optimizer(model, training)
    costs: dict[str, float] = {}
    started, step, steps = time.perf_counter(), 0, len(loader)
    for _ in range(training.epochs):
        model.train()
        for images, labels in loader:
            for group in optimizer.param_groups:
                warmup = round(steps * training.warmup_epochs)
                group["lr"] = learning_rate(step, steps * training.epochs, warmup, training.lr)
            with nullcontext() if costs else counted(costs, len(images)):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - started
    params = sum(parameter.numel() for parameter in model.parameters())
    return {
        "accuracy": accuracy(model, data),
        "params": params,
        # Beside what is saved for the backward pass, the weights among it: gradients and momentum in float32.
        "memory": 8 * params + costs["saved"],
        "train_flops": costs["image_flops"] * len(data.train.labels) * training.epochs,
        "train_seconds": seconds,
    }


def make_optimizer(model: nn.Module, training: TrainingSpec) -> torch.optim.Optimizer:
    """Weight decay on weights alone."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": weights, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=True)


@contextmanager
def counted(costs: dict[str, float], num_images: int) -> Iterator[None]:
    """Counts a step's operations an image, and the bytes that are saved for its backward pass."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    costs.update(image_flops=counter.get_total_flops() / num_images, saved=sum(saved.values()))


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """The share of validation images that are classified right."""
    images, labels = as_tensors(data.validation)
    model.eval()
    images = transforms.Normalize(data.mean, data.std)(images)
    return (model(images).argmax(1) == labels).float().mean().item()


def trainable(config: dict[str, Any], space: SearchSpace, data: ImageData, units: Sequence[Unit]) -> None:
    """What Tune runs in a process of its own."""
    choices = dict(config)
    lr = choices.pop("lr")
    policy = repaired(space, units, choices)
    found = train(space, data, units, policy, lr, space.search.seed)
    tune.report({**found, "lr": lr, "policy": json.dumps(policy.to_dict())})


class Rows(tune.Callback):
    """Writes every result with the moment at which the driver had it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        row = {name: result[name] for name in (*MODES, "train_seconds", "lr")}
        row |= {"ended": time.time(), "policy": json.loads(result["policy"])}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", type=Path, help="a search space as rlsearch takes it")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--budget", type=float, help="seconds after which Tune ends the search")
    parser.add_argument("--reuse-actors", action="store_true", help="trials share processes")
    parser.add_argument("--rows", type=Path, required=True, help="one JSON line a trial")
    options = parser.parse_args()
    space = load_space(options.space)
    assert space.replacement is not None
    data = load_data(space.data)
    model = build_model(space.model.name, data.num_classes)
    units = find_units(model, torch.empty(1, *data.input_shape, device="meta"))
    blocks = {
        unit.name: [block for block in space.replacement.blocks if fits(model, units, unit.name, block, {}) is None]
        for unit in matched_units(space, units)
    }
    choices = {name: tune.choice([KEEP, *fitting]) for name, fitting in blocks.items() if fitting}
    rate = space.searched["training.lr"]
    baseline = {**dict.fromkeys(choices, KEEP), "lr": space.training.lr}
    with tempfile.TemporaryDirectory(prefix="stock-") as folder:
        ray.init(address="local", num_cpus=CONCURRENT, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        tuner = tune.Tuner(
            tune.with_parameters(trainable, space=space, data=data, units=units),
            param_space={**choices, "lr": tune.loguniform(rate.low, rate.high)},
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(
                    metric=list(MODES),
                    mode=list(MODES.values()),
                    points_to_evaluate=[baseline],
                    seed=space.search.seed,
                ),
                num_samples=options.trials,
                max_concurrent_trials=CONCURRENT,
                time_budget_s=options.budget,
                reuse_actors=options.reuse_actors,
            ),
            run_config=tune.RunConfig(
                storage_path=str(Path(folder) / "results"), name="stock", verbose=0, callbacks=[Rows(options.rows)]
            ),
        )
        results = tuner.fit()
        ray.shutdown()
    ended = sum("accuracy" in (result.metrics or {}) for result in results)
    if results.num_errors or (options.budget is None and ended < options.trials):
        raise SystemExit(
            f"only {ended} of {options.trials} trials ended, {results.num_errors} failed: {results.errors[:1]}"
        )


if __name__ == "__main__":
    main()
