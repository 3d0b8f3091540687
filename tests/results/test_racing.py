"""What racing did, read from a run's tables alone."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlsearch.errors import RunFolderError
from rlsearch.results import read_run, select, summary
from rlsearch.results.console import render_front
from rlsearch.results.racing import RungFigures, is_poor, racing_figures, rank_correlation, rungs
from rlsearch.results.report import report_html
from rlsearch.results.tables import epochs_path, write_epochs

SPACE: dict[str, Any] = {
    "training": {"epochs": 9},
    "objectives": {"accuracy": "maximize", "params": "minimize"},
    "search": {"trials": 20, "min_epochs": 1, "eta": 3},
}


@pytest.mark.parametrize(
    ("min_epochs", "eta", "epochs", "expected"),
    [
        (1, 3, 9, (1, 3)),
        (1, 3, 10, (1, 3, 9)),
        (3, 3, 30, (3, 9, 27)),
        (2, 2, 2, ()),
        (5, 2, 4, ()),
        (1, 2, 9, (1, 2, 4, 8)),
    ],
)
def test_rungs_lie_before_the_last_epoch(min_epochs: int, eta: int, epochs: int, expected: tuple[int, ...]) -> None:
    assert rungs(min_epochs, eta, epochs) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [30, 20, 10], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 2 / 3),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(6)),
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_the_rank_correlation(first: list[float], second: list[float], expected: float | None) -> None:
    assert rank_correlation(first, second) == (expected if expected is None else pytest.approx(expected))


def test_the_rank_correlation_counts_pairs() -> None:
    source = random.Random(0)
    a, b = ([source.randint(0, 9) for _ in range(60)] for _ in range(2))
    signs = [
        ((x > u) - (x < u), (y > v) - (y < v)) for (x, y), (u, v) in itertools.combinations(zip(a, b, strict=True), 2)
    ]
    agreeing = sum(x * y for x, y in signs)
    apart = sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)
    assert rank_correlation(a, b) == pytest.approx(agreeing / math.sqrt(apart))


@pytest.mark.parametrize(
    ("trials", "correlation", "expected"),
    [(8, 0.49, True), (8, None, True), (8, 0.5, False), (7, 0.0, False), (0, None, False)],
)
def test_when_a_correlation_is_poor(trials: int, correlation: float | None, expected: bool) -> None:
    assert is_poor(trials, correlation) is expected


@pytest.fixture
def raced(make_record: Any, make_run: Any) -> Path:
    """Ten trials in full, the best after epoch 1 the worst in the end, in order after epoch 3; and others."""
    records = [make_record(trial, fidelity=9, accuracy=0.6 + 0.02 * trial) for trial in range(10)]
    records[4] = make_record(4, fidelity=9, accuracy=0.68, state="INFEASIBLE", reason="constraint: params must be …")
    reason = "raced out after epoch 1: its chance to improve the front is 0.4%, below 5%"
    records += [make_record(10 + n, state="PRUNED", reason=reason, fidelity=1, accuracy=0.1) for n in range(3)]
    records += [
        make_record(13, state="PRUNED", reason=reason.replace("1:", "3:"), fidelity=3, accuracy=0.1),
        make_record(14, state="PRUNED", reason="probe: trained 1 of 9 epochs to learn …", fidelity=1, accuracy=0.1),
        make_record(15, state="FAIL", reason="diverged", fidelity=3, accuracy=0.1),
    ]
    folder: Path = make_run(records, SPACE)
    for record in records:
        by_epoch = {1: 1 - record.accuracy, 3: record.accuracy - 0.1, 9: record.accuracy}
        rows = [{"epoch": e, "epochs": 9, "accuracy": by_epoch.get(e, 0.5)} for e in range(1, record.fidelity + 1)]
        write_epochs(epochs_path(folder, record.trial), rows)
    return folder


def test_a_run_tells_what_racing_did(raced: Path) -> None:
    found = racing_figures(read_run(raced))
    assert found == (RungFigures(1, 3, 10, pytest.approx(-1)), RungFigures(3, 1, 10, pytest.approx(1)))
    assert [rung.is_poor for rung in found or ()] == [True, False]


def test_epochs_that_were_not_kept_or_are_no_numbers_are_left_out(raced: Path) -> None:
    epochs_path(raced, 9).unlink()
    rows = [{"epoch": e, "epochs": 9, "accuracy": math.nan if e == 3 else 0.6} for e in range(1, 10)]
    write_epochs(epochs_path(raced, 8), rows)
    assert [rung.trials for rung in racing_figures(read_run(raced)) or ()] == [9, 8]
    path = epochs_path(raced, 7)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match=r"trial-00007\.parquet: is damaged"):
        racing_figures(read_run(raced))


def test_pareto_tells_it_as_text_and_as_json(raced: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    render_front(read_run(raced), console)
    lines = console.file.getvalue().splitlines()
    assert lines[-2:] == [
        "racing after epoch 1: 3 stopped, rank correlation with the end -1.00 over 10 trials (poor: fewer are stopped)",
        "racing after epoch 3: 1 stopped, rank correlation with the end 1.00 over 10 trials",
    ]
    told = json.loads(json.dumps(summary(read_run(raced)), allow_nan=False))["racing"]
    assert told == {
        "rungs": [
            {"epoch": 1, "stopped": 3, "trials": 10, "correlation": pytest.approx(-1)},
            {"epoch": 3, "stopped": 1, "trials": 10, "correlation": pytest.approx(1)},
        ]
    }


def test_the_report_has_a_row_a_rung(raced: Path, run_folder: Path) -> None:
    run = read_run(raced)
    content = report_html(run, select(run))
    assert "<h2>Racing</h2>" in content
    assert content.count("<small>poor</small>") == 1
    without = read_run(run_folder)
    assert "<h2>Racing</h2>" not in report_html(without, select(without))


def test_a_run_without_racing_has_none(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert racing_figures(run) is None
    assert summary(run)["racing"] is None


def test_before_anything_ended_nothing_is_known(make_record: Any, make_run: Any) -> None:
    run = read_run(make_run([make_record(0, fidelity=9)], SPACE))
    for rung in racing_figures(run) or ():
        assert (rung.trials, rung.correlation, rung.is_poor) == (0, None, False)
        assert "not defined over 0 trials" in rung.sentence
