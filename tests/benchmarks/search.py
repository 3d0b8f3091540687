"""How many trainings a search needs: rlsearch's search and its rivals in the same replay, which costs no training.

    python tests/benchmarks/search.py [--seeds 20]     searches of 200 trials, by the classes of a real run
    python tests/benchmarks/search.py --simulated      on accuracies that nobody trained for
    python tests/benchmarks/search.py --quick          searches of 12 trials

The model is the narrow ResNet-50 of `tables/`, with its real costs. Accuracies are those of `tables/surrogate.py`,
learned from recorded trainings; or those of `tables/simulated.py`. Hypervolumes are of accuracies without noise. All
searches see the same landscape; seeds differ. With --work, an interrupted measurement goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "tables"))
from record import open_space
from replay import Judge, Table, first_reaching, replay
from rivals import FRONT, RACING, RIVALS, TPE
from simulated import Simulated
from surrogate import Recorded

from rlsearch import Policy
from rlsearch.search.costs import HardConstraints
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.sampler_settings import parse_sampler
from rlsearch.training.stream_reader import end_with_parent

SHARES = (0.80, 0.90, 0.95, 0.99)
# What the best known hypervolume is taken from, beside all that was found.
LONGEST = "front, 300 trials"
# What a loss in accuracy must exceed to be told from the noise of one training on the recorded table.
NOISE = 0.01


@dataclass(frozen=True)
class Found:
    """One search.

    Attributes:
        trace: the hypervolume after each training.
        work: operations up to there, in trainings of the baseline.
        front: how many points its true front has.
        lost: how many of those racing stopped.
        lost_clearly: how many of them by more than the noise.
        seconds: of all its proposals.
    """

    trace: list[float]
    work: list[float]
    front: int
    lost: int
    lost_clearly: int
    seconds: float


_TABLE: list[Table] = []


def _start(parent: int, simulated: bool) -> None:
    """Once in each process: the landscape takes a quarter of a minute to fit."""
    end_with_parent(parent)
    _TABLE.append(open_table(simulated))


def open_table(simulated: bool) -> Table:
    torch.set_num_threads(1)
    space, policies, costs = open_space()
    return Table(space, policies, costs, Simulated(policies) if simulated else Recorded(policies))


def run(name: str, seed: int, most: int) -> Found:
    """One search of a rival, and how good it was."""
    rival, trials = (RIVALS[FRONT], 300) if name == LONGEST else (RIVALS[name], RIVALS[name].trials)
    started = time.process_time()
    found = rival.search(_TABLE[0], min(most, trials), seed)
    seconds = time.process_time() - started
    judge = Judge(_TABLE[0])
    on_front, lost = judge.lost(found)
    work = (np.cumsum(found.work) / found.work[0]).tolist()
    return Found(judge.trace(found), work, on_front, lost, judge.lost(found, NOISE)[1], seconds)


def run_all(options: argparse.Namespace) -> dict[str, list[Found]]:
    """Every rival with every seed, two at a time; finished ones are kept in --work."""
    seeds, most = (1, 12) if options.quick else (options.seeds, 300)
    jobs = [(name, seed) for seed in range(seeds) for name, rival in RIVALS.items() if seed < rival.most_seeds]
    jobs += [] if options.quick else [(LONGEST, 1000), (LONGEST, 1001)]
    kept = None if options.work is None else options.work / f"searches-{_landscape(options)}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    done = {(row["name"], row["seed"]): Found(**row["found"]) for row in rows}
    context = multiprocessing.get_context("spawn")
    arguments = (os.getpid(), options.simulated)
    with ProcessPoolExecutor(options.processes, context, _start, arguments) as pool:
        futures = {pool.submit(run, *job, most): job for job in jobs if job not in done}
        for count, future in enumerate(as_completed(futures), 1):
            name, seed = futures[future]
            done[name, seed] = found = future.result()
            if kept:
                with kept.open("a") as file:
                    file.write(json.dumps({"name": name, "seed": seed, "found": vars(found)}) + "\n")
            took = f"{found.seconds:.0f} s, hypervolume {found.trace[-1]:.4f}"
            print(f"{count} of {len(futures)}: {name}, seed {seed}: {took}", file=sys.stderr, flush=True)
    grouped: dict[str, list[Found]] = {}
    for name, seed in jobs:
        grouped.setdefault(name, []).append(done[name, seed])
    return grouped


def _landscape(options: argparse.Namespace) -> str:
    return "simulated" if options.simulated else "recorded"


def described(values: Sequence[float]) -> str:
    """Quartiles."""
    low, middle, high = (np.percentile(values, q, method="nearest") for q in (25, 50, 75))
    return " ".join("   -" if math.isinf(value) else f"{value:4.0f}" for value in (low, middle, high))


def compare(found: dict[str, list[Found]], levels: dict[str, float], which: Callable[[Found, float], float]) -> Any:
    """Prints by search what it took to each level; returns the medians."""
    print(f"{'':<30}" + "".join(f"{head:>17}" for head in levels))
    figures: dict[str, Any] = {}
    for name in RIVALS:
        reached = [[which(item, level) for item in found[name]] for level in levels.values()]
        seeds = len(found[name])
        length = len(found[name][0].trace)
        print(f"{name:<30}" + "".join(f"{described(values):>17}" for values in reached) + f"   {length} x {seeds}")
        medians = [float(np.percentile(values, 50, method="nearest")) for values in reached]
        figures[name] = [None if math.isinf(value) else round(value, 1) for value in medians]
    return figures


def trainings(item: Found, level: float) -> float:
    return first_reaching(item.trace, level)


def compute(item: Found, level: float) -> float:
    reached = first_reaching(item.trace, level)
    return math.inf if math.isinf(reached) else item.work[int(reached) - 1]


def suggest_seconds(table: Table, count: int) -> float:
    """How long the next proposal takes after so many trials."""
    done = replay(table, trials=count, seed=0, sampler=parse_sampler("random", []))
    constraints = HardConstraints((), table.costs, Policy(table.space.model), table.space.training)
    sampler = PolicySampler(table.policies, constraints, table.costs)
    sampler.propose(done.study)
    times = []
    for _ in range(5):
        started = time.process_time()
        sampler.propose(done.study)
        times.append(time.process_time() - started)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--simulated", action="store_true", help="simulated accuracies in place of recorded ones")
    parser.add_argument("--quick", action="store_true", help="12 trials, 1 seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where an interrupted measurement goes on")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; no images are needed")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent / "tables"), os.environ.get("PYTHONPATH", "")]
    )
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    found = run_all(options)
    best = max(item.trace[-1] for items in found.values() for item in items)
    level = float(np.median([item.trace[-1] for item in found[TPE]]))
    levels = {f"TPE's last ({level / best:.0%})": level, **{f"{share:.0%} of best": share * best for share in SHARES}}
    kind = _landscape(options)
    print(f"{kind} accuracies: after how many trainings a hypervolume was reached (quartiles; trials x seeds)")
    figures = compare(found, levels, trainings)
    print("the same in compute: trainings of the baseline")
    spent = compare(found, levels, compute)
    racing = found[RACING]
    lost, clearly = (sum(getattr(item, name) for item in racing) for name in ("lost", "lost_clearly"))
    on_front = sum(item.front for item in racing)
    print(f"racing stopped {lost} of {on_front} points of the true fronts, {clearly} of them by more than the noise")
    times = {count: 1e3 * suggest_seconds(open_table(options.simulated), count) for count in _counts(options)}
    print("a proposal after", ", ".join(f"{count} trials: {ms:.0f} ms" for count, ms in times.items()))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    rows = {"landscape": kind, "levels": list(levels), "trainings": figures, "compute": spent, "suggest_ms": times}
    rows |= {"front": on_front, "raced_out": lost, "raced_out_clearly": clearly}
    print(json.dumps({"name": "search", "figures": rows, "n": len(found[FRONT]), "machine": machine}))


def _counts(options: argparse.Namespace) -> tuple[int, ...]:
    return (12,) if options.quick else (300, 1000)


if __name__ == "__main__":
    main()
