"""The main job on real images, by the commands a user types: search, front, export, with CIFAR-10 and ResNet-20.

    python tests/benchmarks/real_run.py --data DIR            10,000 images of DIR/cifar10, 8 trials of 3 epochs
    python tests/benchmarks/real_run.py --quick --data DIR    1,000 images, 4 trials of 1 epoch

It ends with an error if there is no front, or if the export does not measure as its trial did.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SPACE = Path(__file__).parents[2] / "search_spaces" / "cifar10_resnet20.yaml"


def rlsearch(*arguments: object) -> str:
    """Runs one command of the command line; its progress is shown, its standard output returned."""
    done = subprocess.run([sys.executable, "-m", "rlsearch", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLSEARCH_DATA"), help="the folder of image sets")
    parser.add_argument("--quick", action="store_true", help="few images, few trials")
    parser.add_argument("--keep", type=Path, help="a new folder for the run, which is else thrown away")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: give --data DIR or set RLSEARCH_DATA")
        return
    limit, trials, epochs = (1_000, 4, 1) if options.quick else (10_000, 8, 3)
    with tempfile.TemporaryDirectory() as scratch:
        run = options.keep or Path(scratch) / "run"
        settings = [f"data.name=parquet:{Path(options.data) / 'cifar10'}", f"data.limit={limit}"]
        settings += [f"training.epochs={epochs}"]
        given = [part for setting in settings for part in ("--set", setting)]
        started = time.perf_counter()
        front = json.loads(rlsearch("search", SPACE, "--run-dir", run, "--trials", trials, *given, "--json"))
        seconds = time.perf_counter() - started
        export: dict[str, Any] = json.loads(rlsearch("export", run, "--out", Path(scratch) / "exported", "--json"))
    assert front["front"], "there is no front"
    assert export["validation_accuracy"] == export["recorded_accuracy"], "the export does not measure as its trial did"
    figures = {
        "search_seconds": seconds,
        "trials": front["counts"],
        "front": len(front["front"]),
        "baseline_accuracy": front["baseline"]["values"]["accuracy"],
        "knee_accuracy": export["recorded_accuracy"],
        "knee_accuracy_rebuilt": export["validation_accuracy"],
        "knee_test_accuracy": export["test_accuracy"],
        "hypervolume": front["hypervolume"],
    }
    for name, value in figures.items():
        print(f"{name:<24} {value}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {device}"
    print(json.dumps({"name": "real_run", "figures": figures, "n": 1, "machine": machine}))


if __name__ == "__main__":
    main()
