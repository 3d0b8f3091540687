"""Benchmarks run small, on the CPU; those parts of one trial's too that need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.memory import SMALL, measured_errors

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_the_benchmark_of_a_trial_runs_small() -> None:
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "trial.py"), "--quick"], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    figures = result["figures"]
    assert result["name"] == "trial"
    assert figures["cpu_epoch_speedup"] > 0
    assert 0 < figures["warm_start_seconds"] <= figures["warm_start_seconds_max"]
    assert 0 < figures["estimate_cost_ms"] <= figures["estimate_cost_ms_max"]
    assert len(figures["cpu_accuracy_ours"]) == len(figures["gpu_accuracy_ours"]) == 1
    if figures.get("gpu_parts_ran_on") == "cpu":  # what needs a GPU is no figure of a CPU
        assert figures["gpu_epoch_speedup"] is figures["resnet18_peak_share"] is figures["memory_error_median"] is None


def test_predicted_memory_is_that_of_whole_steps() -> None:
    errors = measured_errors(SMALL[:1], on_cuda=False)["memory_error"]
    assert len(errors) >= 10
    assert max(errors) < 0.005


def test_the_benchmark_of_searches_runs_small() -> None:
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "search.py"), "--quick", "--simulated"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    reached = result["figures"]["trainings"]
    assert result["name"] == "search"
    assert len(reached) == 9
    assert all(len(counts) == 5 for counts in reached.values())
    assert all(1 <= count <= 12 for counts in reached.values() for count in counts if count is not None)
    assert any(counts[-1] is not None for counts in reached.values())  # somebody found the best that was found


@pytest.mark.cluster
def test_the_benchmark_of_durability_runs_small() -> None:
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "durability.py"), "--quick"], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    figures = result["figures"]
    assert result["name"] == "durability"
    assert figures["overhead_ratio"] == pytest.approx(figures["seconds_with"] / figures["seconds_without"] - 1)
    # Two trials at once, the first two not counted.
    assert figures["seconds_without"] > 0.9 * (figures["trials"] / 2 - 1) * figures["trial_seconds"]
