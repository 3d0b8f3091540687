"""What the terminal shows of a run."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.results import front, read_run, select
from rlsearch.results.console import render_front
from rlsearch.results.selection import Selection, policy_of
from rlsearch.results.tables import Run, epochs_path
from rlsearch.results.where import parse_where

TWO = {"accuracy": "maximize", "params": "minimize"}


def shown(run: Run, selected: Selection | None = None, where: str | None = None, width: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    render_front(run, console, selected, () if where is None else parse_where(where))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def rows_of(lines: list[str]) -> list[str]:
    """The first line of each row of the table, its blanks made one."""
    return [" ".join(line.split()) for line in lines if re.match(r"\s*(★ )?\d+\s+\d+\.\d+ %", line)]


@pytest.fixture
def small(make_record: Any) -> Run:
    skip = Policy(replacements=(Replacement("layer1.2", "skip"),))
    scalar = Policy(replacements=(Replacement("layer1.2", "scalar"), Replacement("layer2.[odd]", "scalar")))
    return Run(
        folder=Path("run"),
        objectives=TWO,
        records=(
            make_record(0, accuracy=0.90, params=100),
            make_record(1, skip, origin="skip control", accuracy=0.893, params=90),
            make_record(2, scalar, accuracy=0.892, params=60),
            make_record(3, scalar, accuracy=0.50, params=59),
            make_record(4, scalar, state="FAIL", reason="diverged", accuracy=None),
        ),
    )


def test_the_whole_of_a_small_run(small: Run) -> None:
    lines = shown(small)
    assert rows_of(lines) == [
        "0 90.00 % 100 baseline: end-to-end",
        "1 89.30 % 90 skip layer1.2 (skip control)",
        "★ 2 89.20 % 60 scalar layer1.2,2.[odd]",
        "3 50.00 % 59 scalar layer1.2,2.[odd]",
    ]
    assert "−0.8 points −40.0 %" in [" ".join(line.split()) for line in lines]
    tail = lines[lines.index("front: 4 of the 4 complete trials; the baseline is on it (4 COMPLETE, 1 FAIL)") :]
    assert tail == [
        tail[0],
        "hypervolume: 0.4108",
        "★ trial 2 is the knee: of the 4 trials on the front the nearest to the ideal point (distance 0.03, with every "
        "objective scaled to [0, 1])",
        "  against the end-to-end baseline: parameters −40.0 %, memory ±0.0 %, compute ±0.0 %, accuracy −0.8 points",
        "  skip control (trial 1): the pick does not beat it: the control is better in accuracy",
    ]


def test_the_baseline_comes_first_wherever_it_stands(small: Run) -> None:
    worse = replace(small, records=(replace(small.records[0], accuracy=0.1), *small.records[1:]))
    lines = shown(worse)
    assert [row.removeprefix("★ ").split()[0] for row in rows_of(lines)] == ["0", "1", "2", "3"]
    assert any("the baseline is not on it" in line for line in lines)


def test_where_and_the_given_pick_are_shown(small: Run) -> None:
    lines = shown(small, select(small, "params", parse_where("params<0.95x")), "params<0.95x")
    assert any(
        line.startswith("front: 3 of the 3 complete trials with params<0.95x; the baseline is not") for line in lines
    )
    assert "★ trial 3 is the best params on the front" in lines


def test_a_run_without_a_baseline(small: Run) -> None:
    lines = shown(replace(small, records=small.records[1:]))
    assert "front: 3 of the 3 complete trials (3 COMPLETE, 1 FAIL)" in lines
    assert "hypervolume: not defined without a baseline" in lines
    assert "  against the end-to-end baseline: there is no baseline to compare it with" in lines


def test_a_realistic_run_fits_eighty_columns(run_folder: Path) -> None:
    run = read_run(run_folder)
    lines = shown(run, width=80)
    assert max(map(len, lines)) <= 80
    others = [record.trial for record in front(run) if record.trial != 0]
    assert [int(row.removeprefix("★ ").split()[0]) for row in rows_of(lines)] == [0, *others]


def test_what_learn_drop_did_has_a_table_of_its_own(run_folder: Path, small: Run) -> None:
    run = read_run(run_folder)
    lines = shown(run, width=100)
    assert max(map(len, lines)) <= 100
    start = next(index for index, line in enumerate(lines) if line.startswith("Learn&Drop"))
    told = [" ".join(line.split()) for line in lines[start + 4 :]]
    told = told[: told.index("")]
    expected = []
    for record in front(run):
        if policy_of(record).learn_drop is not None:
            share, mean = f"{100 * record.forward_share:.1f} %", f"{record.mean_learnable_params:,.0f}"
            memory = f"{record.memory / 2**20:.1f} → {record.step_memory / 2**20:.1f} MiB"
            left = f"{record.dropped_units + 1} of 17, after epochs 1 to 2"
            expected.append(f"{record.trial} {left} {share} {mean} {memory}")
    assert told == expected
    assert len(expected) > 1
    assert not any("Learn&Drop" in line for line in shown(small))


def test_a_trial_without_its_epochs_still_tells_its_figures(make_record: Any, make_run: Any) -> None:
    policy = Policy(learn_drop=LearnDrop())
    saved = {"forward_share": 0.5, "mean_learnable_params": 70.0, "step_memory": 2**20, "dropped_units": 3}
    folder = make_run([make_record(0), make_record(1, policy, params=80, **saved)])
    epochs_path(folder, 1).unlink()
    assert "★ 1 3 units 50.0 % 70 1.0 MiB" in [" ".join(line.split()) for line in shown(read_run(folder))]
