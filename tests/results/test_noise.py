"""The baseline's repeats: no candidates for the front, and what they say of the noise."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlsearch.results import candidates, front, read_run, select, summary
from rlsearch.results.console import render_front
from rlsearch.results.noise import baseline_noise
from rlsearch.results.report import report_html

SPACE = {"objectives": {"accuracy": "maximize", "params": "minimize"}}
SENTENCE = (
    "the baseline by seed: 97.00, 95.00, 99.00 %, standard deviation 2.00 points; "
    "smaller differences between single trainings are noise"
)


@pytest.fixture
def repeated(make_record: Any, make_run: Any) -> Path:
    """A baseline with three seeds, one repeat that failed, and one smaller policy."""
    records = [
        make_record(0, accuracy=0.97),
        make_record(1, accuracy=0.95, origin="baseline repeat", seed=1),
        make_record(2, accuracy=0.99, origin="baseline repeat", seed=2),
        make_record(3, state="FAIL", reason="worker lost", origin="baseline repeat", seed=3),
        make_record(4, accuracy=0.9, params=100),
    ]
    folder: Path = make_run(records, SPACE)
    return folder


def test_repeats_are_no_candidates(repeated: Path) -> None:
    run = read_run(repeated)
    assert [record.trial for record in candidates(run)] == [0, 4]
    # Though trial 2 is the most accurate of all.
    assert [record.trial for record in front(run)] == [0, 4]
    assert select(run, "accuracy").trial == 0


def test_the_noise_is_that_of_the_trainings_with_a_result(repeated: Path) -> None:
    found = baseline_noise(read_run(repeated))
    assert found is not None
    assert (found.seeds, found.accuracies) == ((0, 1, 2), (0.97, 0.95, 0.99))
    assert found.sd == pytest.approx(math.sqrt((0.02**2 + 0.02**2) / 2))
    assert found.sentence == SENTENCE


def test_a_baseline_that_misses_a_constraint_tells_it_too(make_record: Any, make_run: Any) -> None:
    missed = {"state": "INFEASIBLE", "reason": "constraint: params"}
    records = [make_record(0, accuracy=0.9, **missed)]
    records += [make_record(1, accuracy=0.8, origin="baseline repeat", seed=1, **missed), make_record(2)]
    found = baseline_noise(read_run(make_run(records, SPACE)))
    assert found is not None
    assert found.seeds == (0, 1)


def test_every_view_tells_it(repeated: Path) -> None:
    run = read_run(repeated)
    console = Console(file=io.StringIO(), width=150)
    render_front(run, console)
    lines = console.file.getvalue().splitlines()
    assert SENTENCE in lines
    told = "front: 2 of the 2 complete trials; the baseline is on it (4 COMPLETE, 1 FAIL; the baseline's repeats aside)"
    assert told in lines
    assert SENTENCE in report_html(run, select(run))
    found = json.loads(json.dumps(summary(run), allow_nan=False))["noise"]
    assert found == {"seeds": [0, 1, 2], "accuracies": [0.97, 0.95, 0.99], "sd": pytest.approx(0.02)}


def test_without_repeats_nothing_is_said(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert baseline_noise(run) is None
    assert summary(run)["noise"] is None
    console = Console(file=io.StringIO(), width=150)
    render_front(run, console)
    assert "baseline by seed" not in console.file.getvalue()
    assert "repeats aside" not in console.file.getvalue()
