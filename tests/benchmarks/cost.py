"""How long costing a policy takes: random policies over all blocks and options, each asked about once.

    python tests/benchmarks/cost.py            ResNet-56, 1,000 policies
    python tests/benchmarks/cost.py --quick    ResNet-56, 60 policies

The first call for a model looks at all of it, and is timed apart. After that a policy costs what of it has not been
seen before: early ones more than late ones, which the table shows. Times are of this process alone on its processor, so
that a busy machine plays no part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from rlsearch import Policy, build_model, estimate_cost
from rlsearch.replacement import find_units, plan

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_policies import random_policy

MODEL, SHAPE, BATCH = "resnet56", (3, 32, 32), 128


def costing_times(count: int) -> tuple[list[Policy], float, list[float], list[float]]:
    """The policies, and milliseconds: of the first call for the model, of each policy, and of each once more."""
    with torch.device("meta"):
        model = build_model(MODEL)
    units = find_units(model, torch.empty(2, *SHAPE, device="meta"))
    source = random.Random(0)
    policies = [random_policy(partial(plan, model, units=units), units, source, resting=True) for _ in range(count)]

    def timed(policy: Policy) -> float:
        started = time.process_time()
        estimate_cost(model, policy, SHAPE, BATCH)
        return 1e3 * (time.process_time() - started)

    first = timed(Policy())
    return policies, first, [timed(policy) for policy in policies], [timed(policy) for policy in policies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 policies")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; no images are needed")
    options = parser.parse_args()
    count = 60 if options.quick else 1000
    policies, first, times, again = costing_times(count)
    print(f"{MODEL}, {count} policies of {statistics.median(len(p.replacements) for p in policies):g} replacements")
    print(f"{'first call':<24} {first:>10.0f} ms")
    parts = [
        ("policies " + f"{start + 1} to {min(end, count)}", times[start:end])
        for start, end in ((0, 20), (20, 60), (60, 200), (200, 500), (500, 1000))
        if start < count
    ]
    for label, part in [*parts, ("all", times), ("seen before", again)]:
        print(f"{label:<24} {statistics.median(part):>10.1f} ms median {max(part):>10.1f} ms worst")
    figures = {
        "first_call_ms": first,
        "estimate_cost_ms": statistics.median(times),
        "estimate_cost_worst_ms": max(times),
        "estimate_cost_mean_ms": statistics.mean(times),
        "above_50_ms_share": sum(value > 50 for value in times) / count,
        "estimate_cost_again_ms": statistics.median(again),
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps({"name": "cost", "figures": figures, "n": count, "machine": machine}))


if __name__ == "__main__":
    main()
