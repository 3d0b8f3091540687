"""How many trainings a search needs: the search's own sampler beside Optuna's, on a landscape that costs no training.

    python tests/benchmarks/search.py [--seeds 20]     searches of 200 trials, by the classes of a real run
    python tests/benchmarks/search.py --simulated      on accuracies that nobody trained for
    python tests/benchmarks/search.py --quick          searches of 16 trials

The model is the narrow ResNet-50 of `tables/`, with its real costs. Accuracies are those of `tables/surrogate.py`,
learned from recorded trainings; or simulated: effects of units that mostly add up, stronger early in a stage, pairs
that do not, a best learning rate, learning curves that cross, and noise of a point. Hypervolumes are of accuracies
without noise. All searches see the same landscape; seeds differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import TPESampler

sys.path.insert(0, str(Path(__file__).parent / "tables"))
from record import open_space
from replay import Judge, Landscape, Replayed, Table, first_reaching, replay
from surrogate import Recorded

from rlsearch import Policy, TrainingSpec
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.encoding import Encoding
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.sampler import SAMPLER, PolicySampler, Proposal
from rlsearch.search.sampler_settings import parse_sampler

NOISE = 0.01
SHARES = (0.80, 0.90, 0.95, 0.99)


class Simulated:
    """Accuracies that no training gave; see the module's docstring."""

    def __init__(self, policies: PolicySpace) -> None:
        rng = np.random.default_rng(0)
        self._encoding = Encoding(policies)
        units = len(policies.matched)
        place = np.array([int(name.rpartition(".")[2]) for name in policies.matched])
        kind = np.array([0.0, 1.0, 0.5, 0.6, 1.0])[: self._encoding.num_kinds]
        early = 0.4 + 1.2 * np.exp(-place / 3)
        self._harm = (
            rng.gamma(1.0, 0.012, (units, 1)) * kind * early[:, None] * rng.uniform(0.6, 1.4, (units, len(kind)))
        )
        self._pairs = rng.exponential(0.012, units)

    def accuracy(self, policy: Policy, training: TrainingSpec) -> float:
        kinds = self._encoding.units(policy)
        harm = self._harm[np.arange(len(kinds)), kinds].sum()
        replaced = np.flatnonzero(kinds)
        harm += sum(self._pairs[b] for a, b in pairwise(replaced) if b - a <= 2)
        return float(max(0.1, 0.6 - harm - 0.02 * math.log10(training.lr / 0.02) ** 2))

    def curve(self, policy: Policy, training: TrainingSpec, seed: int) -> Sequence[float]:
        text = f"{policy.hash}/{training.lr}/{seed}".encode()
        rng = np.random.default_rng(int(hashlib.sha256(text).hexdigest()[:8], 16))
        end, slow = self.accuracy(policy, training) + rng.normal(0, NOISE), rng.normal(0, 0.02)
        left = 1 - np.arange(1, training.epochs + 1) / training.epochs
        blur = rng.normal(0, 0.004, training.epochs) * (left > 0)
        return np.clip(end - 0.25 * left**1.5 + slow * left + blur, 0.1, 1).tolist()


class StockTpe:
    """Optuna's TPE as it comes, asked for valid policies; what was trained before is asked for again."""

    def __init__(self, policies: PolicySpace, constraints: HardConstraints, costs: ExactCosts) -> None:
        self._policies = policies
        self._own = optuna.create_study(
            directions=[*policies.space.objectives.values()], sampler=TPESampler(seed=policies.space.search.seed)
        )
        self._asked: list[optuna.Trial] = []

    def propose(self, study: optuna.Study) -> Proposal:
        trials = study.get_trials(deepcopy=False)
        for asked, trial in zip(self._asked, trials[1:], strict=False):
            if trial.state.is_finished() and not self._own.trials[asked.number].state.is_finished():
                self._own.tell(asked, trial.values)
        if not trials:
            policy = Policy(self._policies.space.model)
            return Proposal(policy, self._policies.space.training, "baseline")
        while True:
            asked = self._own.ask()
            decided = self._policies.decide(asked._suggest)
            if decided.params not in [trial.params for trial in trials]:
                self._asked.append(asked)
                return Proposal(decided.policy, decided.training, SAMPLER, decided.params, decided.distributions)
            self._own.tell(asked, state=optuna.trial.TrialState.FAIL)


def ours(name: str, **settings: Any) -> Callable[[Table, int, int], Replayed]:
    def run(table: Table, trials: int, seed: int) -> Replayed:
        return replay(table, trials=trials, seed=seed, sampler=parse_sampler(name, []), **settings)

    return run


def stock(table: Table, trials: int, seed: int) -> Replayed:
    return replay(table, trials=trials, seed=seed, make=StockTpe)


RIVALS: dict[str, Callable[[Table, int, int], Replayed]] = {
    "front": ours("front"),
    "front, sensitivities and racing": ours("front", min_epochs=1, eta=2, sensitivities=True),
    "front, racing": ours("front", min_epochs=1, eta=2),
    "TPE as it comes": stock,
    "TPE, multivariate": ours("tpe"),
    "NSGA-II": ours("nsga2"),
    "random": ours("random"),
}


def described(values: Sequence[float]) -> str:
    low, middle, high = (np.percentile(values, q, method="nearest") for q in (25, 50, 75))
    return "  ".join("   -" if math.isinf(value) else f"{value:4.0f}" for value in (low, middle, high))


def suggest_seconds(table: Table, count: int) -> float:
    """How long the next proposal takes after so many trials."""
    run = replay(table, trials=count, seed=0, sampler=parse_sampler("random", []))
    space = table.space
    constraints = HardConstraints((), table.costs, Policy(space.model), space.training)
    sampler = PolicySampler(table.policies, constraints, table.costs)
    sampler.propose(run.study)
    times = []
    for _ in range(5):
        started = time.process_time()
        sampler.propose(run.study)
        times.append(time.process_time() - started)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--simulated", action="store_true", help="simulated accuracies in place of recorded ones")
    parser.add_argument("--quick", action="store_true", help="16 trials, 1 seed")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; no images are needed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trials, seeds = (16, 1) if options.quick else (200, options.seeds)
    space, policies, costs = open_space()
    landscape: Landscape = Simulated(policies) if options.simulated else Recorded(policies)
    table = Table(space, policies, costs, landscape)
    judge = Judge(table)
    traces: dict[str, list[list[float]]] = {name: [] for name in RIVALS}
    work: dict[str, list[list[float]]] = {name: [] for name in RIVALS}
    for seed in range(seeds):
        for name, search in RIVALS.items():
            run = search(table, trials, seed)
            traces[name].append(judge.trace(run))
            work[name].append((np.cumsum(run.work) / run.work[0]).tolist())
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    best = max(trace[-1] for found in traces.values() for trace in found)
    level = float(np.median([trace[-1] for trace in traces["TPE as it comes"]]))
    kind = "simulated" if options.simulated else "recorded"
    print(f"{kind} accuracies, {trials} trials, {seeds} seeds: after how many trainings a hypervolume was reached")
    print("(a quarter of the seeds, half of them, three quarters)")
    heads = [f"TPE's last ({level / best:.0%})", *(f"{share:.0%} of the best" for share in SHARES)]
    print(f"{'':<33}" + "".join(f"{head:>20}" for head in heads))
    figures: dict[str, Any] = {}
    for name, found in traces.items():
        reached = [[first_reaching(trace, goal) for trace in found] for goal in (level, *(s * best for s in SHARES))]
        print(f"{name:<33}" + "".join(f"{described(values):>20}" for values in reached))
        medians = [float(np.percentile(values, 50, method="nearest")) for values in reached]
        figures[name] = [None if math.isinf(value) else value for value in medians]
    spent = {name: [_spent(t, w, level) for t, w in zip(traces[name], work[name], strict=True)] for name in RIVALS}
    print("compute to TPE's last hypervolume, in trainings of the baseline (median):")
    for name, values in spent.items():
        print(f"{name:<33}{described(values):>20}")
    times = {count: 1e3 * suggest_seconds(table, count) for count in ((16,) if options.quick else (300, 1000))}
    print("a proposal after", ", ".join(f"{count} trials: {ms:.0f} ms" for count, ms in times.items()))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    rows = {"landscape": kind, "trainings_to_tpe200_and_shares": figures, "shares": SHARES, "suggest_ms": times}
    print(json.dumps({"name": "search", "figures": rows, "n": seeds, "machine": machine}))


def _spent(trace: Sequence[float], work: Sequence[float], level: float) -> float:
    reached = first_reaching(trace, level)
    return math.inf if math.isinf(reached) else work[int(reached) - 1]


if __name__ == "__main__":
    main()
