"""How long `rlsearch pareto` takes on a run of 10,000 trials, with and without starting a process.

    python tests/benchmarks/pareto.py [--trials 10000] [--repeats 7]

The trials are made up as those of the tests are; their table is a real one. What a process takes to start (Python, the
packages) is measured by `rlsearch --version` in turns with the command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from made_up_run import SPACE, made_up_records

from rlsearch import results
from rlsearch.results.tables import write_trials


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def command(*arguments: str) -> float:
    """Seconds of a process of its own."""
    line = [sys.executable, "-c", "import sys; from rlsearch.cli import main; sys.exit(main())", *arguments]
    return seconds_of(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="200 trials, twice")
    parser.add_argument("--data", help="taken for the sake of uniform arguments; no images are needed")
    options = parser.parse_args()
    trials, repeats = (200, 2) if options.quick else (options.trials, options.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False), encoding="utf-8")
        write_trials(folder / "trials.parquet", made_up_records(trials))

        def inside() -> None:
            run = results.read_run(folder)
            results.front(run), results.select(run), results.normalised_hypervolume(run)

        seconds: dict[str, list[float]] = {"command": [], "start": [], "inside": []}
        for _ in range(repeats):
            seconds["command"].append(command("pareto", str(folder)))
            seconds["start"].append(command("--version"))
            seconds["inside"].append(seconds_of(inside))
        members = len(results.front(results.read_run(folder)))
    told = {"command": "rlsearch pareto", "start": "rlsearch --version", "inside": "table, front, pick, hypervolume"}
    print(f"{trials} trials, {members} of them on the front; {repeats} times:")
    figures = {}
    for key, values in seconds.items():
        median, low, high = statistics.median(values), min(values), max(values)
        figures[key] = [round(value, 3) for value in (median, low, high)]
        print(f"{told[key]:<34}{median:.2f} s ({low:.2f} to {high:.2f})")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"name": "pareto", "figures": figures, "n": repeats, "machine": machine}))


if __name__ == "__main__":
    main()
