"""The whole search on the clock: rlsearch beside a plain script of Ray Tune and Optuna, to an equally good front.

    python tests/benchmarks/end_to_end.py --data DIR --work WORK     40 trials of ours, 200 of the plain script
    python tests/benchmarks/end_to_end.py ... --reuse-actors         a harder rival: its trials share two processes
    python tests/benchmarks/end_to_end.py --data DIR --quick         does it run? few trials and images

Both search the space of `tables/space.yaml` on the same images from the same weights, two trials at once, one side
after the other, each in a process of its own: `rlsearch search` with its defaults, and `stock_search.py`. Seconds count
from the start of that process. First both train two policies with five seeds each: do they train alike?

The judge is the same for both: the hypervolume of the policies that have been trained by a moment, with accuracies
without noise (`tables/surrogate.py`) and exact costs. Measured accuracies would flatter whoever trains more; what they
say is told beside it. The figure is how long the plain script took to its last front's hypervolume, over how long
rlsearch took. A side that has ended is kept in --work; an interrupted one starts anew, or its clock would mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "tables"))
from reached_when import NAMES, OURS, STOCK, Row, compare_searches, compare_trainings, draw
from record import open_space, pretrain
from replay import Judge, Table
from stock_search import CONCURRENT, repaired, train
from surrogate import Recorded

from rlsearch import TrialSpec, build_model, find_units, run_trial
from rlsearch.results import read_run
from rlsearch.search.space import load_space
from rlsearch.training.data import load_data

HERE = Path(__file__).resolve().parent
TABLES = HERE / "tables"
# Some of each block: what both ways of training must agree on, beside the untouched net.
MIXED = {"layer1.2": "scalar", "layer1.5": "lowrank", "layer2.3": "skip", "layer3.3": "scalar", "layer3.5": "skip"}


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def write_space(options: argparse.Namespace, weights: Path, seed: int) -> Path:
    """The search space of both sides: the recorded one, with images, weights and seed."""
    shards = options.work / "images"
    shards.mkdir(exist_ok=True)
    source = sorted((options.data / "cifar10").glob("train-*"))[4]
    if not (shards / source.name).exists():
        (shards / source.name).symlink_to(source.resolve())
    content = yaml.safe_load((TABLES / "space.yaml").read_text())
    content["model"]["weights"] = str(weights.resolve())
    content["data"]["name"] = f"parquet:{shards.resolve()}"
    content["search"] |= {"seed": seed, "max_concurrent": CONCURRENT}
    if options.quick:
        content["data"]["limit"], content["training"]["epochs"] = 216, 2
    path: Path = options.work / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start_weights(options: argparse.Namespace) -> Path:
    """What all trainings start from; for a quick run the net is not trained before."""
    if options.weights is not None:
        return Path(options.weights)
    if not options.quick:
        weights = options.work / "net.safetensors"
        if not weights.exists():  # an interrupted pretraining leaves links in the way
            shutil.rmtree(options.work / "pretraining", ignore_errors=True)
            say("training the network that all trainings start from")
        return pretrain(options.data, options.work)
    weights = options.work / "untrained.safetensors"
    torch.manual_seed(0)
    save_file(build_model("narrow_resnet:NarrowResNet").state_dict(), weights)
    return weights


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made, and written, where there is none."""
    if not path.exists():
        content = make()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(path)
    return json.loads(path.read_text())


def run_side(command: list[str]) -> float:
    """One search as a process, to its end; when it was started, in seconds since the epoch."""
    paths = [str(HERE.parents[1]), str(TABLES), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
    started = time.time()
    with subprocess.Popen([sys.executable, *command], env=environment, stdout=sys.stderr) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # both searches end by themselves on Ctrl-C
            raise
    if code:
        sys.exit(f"{' '.join(command)}: ended with {code}")
    return started


def search_ours(space: Path, trials: int, folder: Path) -> list[Row]:
    """Our rows, in the order of their ends."""
    shutil.rmtree(folder, ignore_errors=True)
    started = run_side(["-m", "rlsearch", "search", str(space), "--run-dir", str(folder), "--trials", str(trials)])
    rows = []
    for record in read_run(folder).records:
        if record.state == "COMPLETE":
            assert record.ended is not None
            row: Row = {"seconds": record.ended.timestamp() - started, "lr": json.loads(record.training)["lr"]}
            row |= {name: record.metric(name) for name in ("accuracy", "params", "memory", "train_flops")}
            rows.append({**row, "train_seconds": record.train_seconds, "policy": json.loads(record.policy)})
    return sorted(rows, key=lambda row: row["seconds"])


def search_stock(space: Path, options: argparse.Namespace, trials: int, file: Path) -> list[Row]:
    """The plain script's rows, in the order of their ends."""
    file.unlink(missing_ok=True)
    command = [str(HERE / "stock_search.py"), str(space), "--trials", str(trials), "--rows", str(file)]
    command += ["--budget", str(options.budget)] if options.budget else []
    started = run_side(command + (["--reuse-actors"] if options.reuse_actors else []))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{"seconds": row.pop("ended") - started, **row} for row in rows]


def train_both(path: Path, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Accuracies of two policies by both ways of training, seed by seed; their costs must be the same."""
    space = load_space(path)
    data, model = load_data(space.data), build_model(space.model.name)
    units = find_units(model, torch.empty(1, *data.input_shape, device="meta"))
    found: dict[str, dict[str, list[float]]] = {}
    for name, choices in {"baseline": {}, "five units replaced": MIXED}.items():
        policy = repaired(space, units, choices)
        assert len(policy.replacements) == len(choices)
        found[name] = {OURS: [], STOCK: []}
        for seed in range(seeds):
            *_, ours = run_trial(
                TrialSpec(space.model, space.data, space.training, policy, seed), data=data, device="cpu"
            )
            stock = train(space, data, units, policy, space.training.lr, seed)
            assert (stock["params"], stock["train_flops"]) == (ours.params, ours.train_flops), "costs differ"
            assert 0.9 < stock["memory"] / ours.memory_predicted < 1.1, "memory differs"
            found[name][OURS].append(ours.accuracy)
            found[name][STOCK].append(stock["accuracy"])
        say(f"trained alike? {name}: {found[name]}")
    return found


def run_pair(options: argparse.Namespace, weights: Path, seed: int) -> dict[str, list[Row]]:
    """Both searches with one seed, those that have ended from --work."""
    ours, stock = (6, 6) if options.quick else (options.trials, options.stock_trials)
    space = write_space(options, weights, seed)
    ending = f"{'-quick' if options.quick else ''}-seed{seed}"
    budget = f"-{options.budget:g}s" if options.budget else ""
    name = f"stock-{stock}{budget}{'-reused' if options.reuse_actors else ''}{ending}"
    found = {}
    say(f"{NAMES[OURS]}, seed {seed}")
    found[OURS] = kept(
        options.work / f"ours-{ours}{ending}.json", lambda: search_ours(space, ours, options.work / f"run{ending}")
    )
    say(f"{NAMES[STOCK]}, seed {seed}")
    found[STOCK] = kept(
        options.work / f"{name}.json", lambda: search_stock(space, options, stock, options.work / f"{name}.jsonl")
    )
    return found


def measure(options: argparse.Namespace) -> None:
    """All of it, with a work folder that is there."""
    torch.set_num_threads(1)
    weights = start_weights(options)
    checked = 2 if options.quick else 5
    path = options.work / f"trainings{'-quick' if options.quick else ''}.json"
    trained = kept(path, lambda: train_both(write_space(options, weights, 0), checked))
    searched = [run_pair(options, weights, seed) for seed in range(options.seeds)]
    space, policies, costs = open_space()
    judge = Judge(Table(space, policies, costs, Recorded(policies)))
    accuracies = compare_trainings(trained)
    pairs = [compare_searches(sides, judge, space.training) for sides in searched]
    if options.picture is not None:
        draw(pairs, options.picture)
    ratios = [pair["judged"]["ratio"] for pair in pairs]
    # A search that never came there counts as the worst; of an even number, the lower middle one.
    middle = sorted(ratios, key=lambda ratio: -1.0 if ratio is None else ratio)[(len(pairs) - 1) // 2]
    for pair in pairs:
        del pair["curves"]
    figures = {"wall_clock_ratio_to_equal_hypervolume": middle, "ratios": ratios, "accuracies": accuracies}
    figures |= {"reuse_actors": options.reuse_actors, "searches": pairs}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps({"name": "end_to_end", "figures": figures, "n": len(pairs), "machine": machine}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="holds cifar10/")
    parser.add_argument("--work", type=Path, help="where an interrupted measurement goes on")
    parser.add_argument("--weights", type=Path, help="of the network (net.safetensors of record.py): not trained again")
    parser.add_argument("--trials", type=int, default=40, help="of ours")
    parser.add_argument("--stock-trials", type=int, default=200)
    parser.add_argument("--budget", type=float, help="seconds after which the plain script ends")
    parser.add_argument("--reuse-actors", action="store_true", help="a plain script that keeps its processes")
    parser.add_argument("--seeds", type=int, default=1, help="pairs of searches")
    parser.add_argument("--picture", type=Path, help="end_to_end.png")
    parser.add_argument("--quick", action="store_true", help="few trials, few images, two epochs")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: give --data DIR or set RLSEARCH_DATA")
        return
    options.data = Path(options.data)
    with tempfile.TemporaryDirectory() as scratch:
        options.work = options.work or Path(scratch)
        options.work.mkdir(parents=True, exist_ok=True)
        measure(options)


if __name__ == "__main__":
    main()
