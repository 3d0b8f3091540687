"""The main job: how long the first search takes, what its machinery costs a trial, and what asking for a cost takes.

    python tests/benchmarks/main_job.py                 about eight minutes on two cores
    python tests/benchmarks/main_job.py --quick         about one minute; its figures say only that it works

`search_seconds` is the whole 40-trial digits search as a process, from its start to its end. The overhead is measured
on trials that train nothing, two at once, on one Ray that runs already: ours through the real searcher, Trainable,
study and tables, with the training alone replaced; stock as its documentation shows it, a function trainable with
`OptunaSearch`, which like any training imports torch. The two take turns. `estimate_cost` is asked for random policies
of ResNet-32, and its parameters are compared with those of the model that is really built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import torch
from optuna.distributions import CategoricalDistribution
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

import rlsearch
from rlsearch.policy import Policy
from rlsearch.replacement import learnable_params
from rlsearch.results import front, read_run
from rlsearch.search.cluster import ray_cluster
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.run import start_search
from rlsearch.search.space import SearchSpace, load_space
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.variations import random_choices
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.trial_spec import TrialSpec

PROJECT = Path(__file__).resolve().parents[2]
SPACE = PROJECT / "search_spaces" / "digits_resnet32.yaml"
CONCURRENT = 2
OBJECTIVES = ("accuracy", "params", "memory", "train_flops")


class IdleTrial:
    """A training that is done after one epoch without work."""

    def __init__(self, spec: TrialSpec) -> None:
        self._result = random.Random(spec.policy.hash).random()
        self.done = False

    def run_epoch(self, after_step: Any) -> EpochMetrics:
        """Numbers that differ from policy to policy."""
        self.done = True
        sizes = dict.fromkeys(("params", "params_total", "learnable_params", "memory", "memory_predicted"), 1000)
        sizes |= {"mean_learnable_params": 1000, "step_memory": 1000, "dropped_units": 0}
        sums = dict.fromkeys(("train_flops", "forward_flops", "train_seconds", "samples_per_second"), self._result)
        losses = {"validation_loss": 1.0, "train_loss": 1.0, "lr": 0.1, "forward_share": 1.0}
        return EpochMetrics(1, 1, self._result, **losses, **sizes, **sums, learning=(), left=(), device="cpu")


class IdleTrainable(TrialTrainable):
    """The real Trainable around trainings without work, and without weights to keep."""

    def make_trial(self, spec: TrialSpec) -> Any:
        """No training."""
        return IdleTrial(spec)

    def save_result(self, folder: Path) -> None:
        """Nothing was trained."""


def idle_function(config: dict[str, Any]) -> None:
    """The stock counterpart; a real training would need torch."""
    import torch  # noqa: F401  # what every training imports

    result = random.Random(str(sorted(config.items()))).random()
    tune.report({"accuracy": result, "params": result, "memory": result, "train_flops": result})


def our_seconds(space: SearchSpace, num_trials: int) -> float:
    """Seconds a trial, from the first proposal to the end of the search; what is checked before it is not counted."""
    searched = replace(space, search=replace(space.search, trials=num_trials, max_concurrent=CONCURRENT))
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        result = start_search(searched, Path(folder) / "run", console=Console(file=nowhere), trainable=IdleTrainable)
        assert result.records[0].started is not None
        seconds = (datetime.now(UTC) - result.records[0].started).total_seconds()
    assert [record.state for record in result.records] == ["COMPLETE"] * num_trials
    return seconds / num_trials


def stock_seconds(distributions: dict[str, Any], num_trials: int) -> float:
    """Seconds a trial of the stock way, with as many parameters."""
    with tempfile.TemporaryDirectory() as folder:
        modes = ["max", "min", "min", "min"]
        tuner = tune.Tuner(
            idle_function,
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(distributions, metric=list(OBJECTIVES), mode=modes),
                num_samples=num_trials,
                max_concurrent_trials=CONCURRENT,
            ),
            run_config=tune.RunConfig(storage_path=folder, name="stock", verbose=0),
        )
        started = time.perf_counter()
        results = tuner.fit()
        seconds = time.perf_counter() - started
    assert len(results) == num_trials
    assert results.num_errors == 0
    return seconds / num_trials


def stock_space(space: SearchSpace) -> dict[str, Any]:
    """Flat distributions, one for every parameter that a policy of ours may have."""
    policies = PolicySpace(space, rlsearch.build_model(space.model.name))
    found: dict[str, Any] = dict(space.searched)
    found["learn_drop"] = CategoricalDistribution([False, True])
    for unit, blocks in policies.blocks.items():
        found[f"replace:{unit}"] = CategoricalDistribution([False, True])
        found[f"block:{unit}"] = CategoricalDistribution(blocks)
    return found


def measure_overhead(quick: bool) -> dict[str, list[float]]:
    """Seconds a trial of both, turn by turn."""
    space = load_space(SPACE)
    distributions = stock_space(space)
    ours, stock = (6, 4) if quick else (40, 12)
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    with ray_cluster():
        for turn in range(1 if quick else 3):
            seconds["ours"].append(our_seconds(space, ours))
            seconds["stock"].append(stock_seconds(distributions, stock))
            last = {name: round(values[-1], 3) for name, values in seconds.items()}
            print(f"overhead, turn {turn}: seconds a trial {last}", flush=True)
    return seconds


def measure_search(quick: bool) -> tuple[float, int, int]:
    """Seconds of the digits search as a process, its trials, and the points on its front."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-c", "from rlsearch.cli import main; main()", "search", str(SPACE)]
        command += ["--run-dir", str(run)]
        if quick:
            command += ["--trials", "4", "--set", "training.epochs=2", "--set", "data.limit=300"]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        found = read_run(run)
        return seconds, len(found.records), len(front(found))


def measure_costs(num_policies: int) -> tuple[list[float], float, int]:
    """Milliseconds of each `estimate_cost` after the first, of the first, and how many parameter counts were exact."""
    space = load_space(SPACE)
    model = rlsearch.build_model(space.model.name)
    policies = PolicySpace(space, model)
    rng = random.Random(0)
    sampled = [policies.decide(random_choices(policies, rng)).policy for _ in range(num_policies)]

    def timed(policy: Policy) -> tuple[float, int]:
        started = time.perf_counter()
        cost = rlsearch.estimate_cost(model, policy, (3, 32, 32), space.training.batch_size)
        return 1000 * (time.perf_counter() - started), cost.params

    first, _ = timed(Policy())
    milliseconds, exact = [], 0
    for policy in sampled:
        taken, params = timed(policy)
        milliseconds.append(taken)
        built = rlsearch.build_model(space.model.name)
        rlsearch.apply_policy(built, policy)
        exact += params == learnable_params(built)
    return milliseconds, first, exact


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, n = {len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few trials, one turn")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; the digits need no folder")
    options = parser.parse_args()
    # Ray's workers cannot import a script that was run by its path: its Trainable travels as code.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    milliseconds, first, exact = measure_costs(20 if options.quick else 200)
    overhead = measure_overhead(options.quick)
    ratios = [stock / ours for stock, ours in zip(overhead["stock"], overhead["ours"], strict=True)]
    search_seconds, trials, points = measure_search(options.quick)

    print(f"{'the digits search, s':<44} {search_seconds:.1f} ({trials} trials, {points} on the front)")
    print(f"{'overhead of our machinery, s a trial':<44} {spread(overhead['ours'])}")
    print(f"{'overhead of the stock way, s a trial':<44} {spread(overhead['stock'])}")
    print(f"{'stock over ours':<44} {spread(ratios)}")
    print(f"{'estimate_cost, ms a policy':<44} {spread(milliseconds)}; the first {first:.0f}")
    print(f"{'parameter counts that were exact':<44} {exact} of {len(milliseconds)}")
    figures = {
        "search_seconds": search_seconds,
        "search_trials": trials,
        "front_points": points,
        "overhead_seconds_per_trial": statistics.median(overhead["ours"]),
        "overhead_seconds_per_trial_stock": statistics.median(overhead["stock"]),
        "overhead_ratio_stock_over_ours": statistics.median(ratios),
        "overhead_ratio_range": [min(ratios), max(ratios)],
        "estimate_cost_ms": statistics.median(milliseconds),
        "estimate_cost_ms_max": max(milliseconds),
        "estimate_cost_exact": exact,
        "estimate_cost_policies": len(milliseconds),
    }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {gpu}"
    print(json.dumps({"name": "main_job", "figures": figures, "n": len(ratios), "machine": machine}))


if __name__ == "__main__":
    main()
