"""An export that is killed (SIGKILL) at any moment: OUT is the whole export or not there, never a part."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
from child import forked, killed_at
from tiny_run import tiny_run

from rlsearch.export import export_trial, load_exported
from rlsearch.policy import Policy
from rlsearch.results import Run, read_run

MODEL = "tiny_net:make"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Run:
    monkeypatch.syspath_prepend(request.path.parent / "training")
    return read_run(tiny_run(tmp_path / "run", (Policy(),), model=MODEL, measured=True))


def assert_whole_or_absent(out: Path, expected: dict[str, bytes]) -> bool:
    """Whether it is there; then it is whole."""
    if not out.exists():
        return False
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    load_exported(out, MODEL)
    return True


def test_a_killed_export_is_whole_or_not_there(run: Run, tmp_path: Path) -> None:
    export_trial(run, 0, tmp_path / "expected", model=MODEL)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    place = tmp_path / "exports"
    place.mkdir()
    found = []
    for event in itertools.count():
        out = place / f"out{event}"
        was_killed = killed_at(lambda out=out: export_trial(run, 0, out, model=MODEL), event, place)  # type: ignore[misc]
        found.append(assert_whole_or_absent(out, expected))
        if not was_killed:
            break
        if not found[-1] and event % 5 == 0:  # what the killed one has left is in nobody's way
            assert export_trial(run, 0, out, model=MODEL).validation_accuracy == run.records[0].accuracy
            assert assert_whole_or_absent(out, expected)
    assert len(found) > 15
    # Not there up to one moment, and whole from then on; the last kills come after the rename.
    assert found == sorted(found)
    assert found[-1]


def test_a_killed_export_at_any_time(run: Run, tmp_path: Path) -> None:
    export_trial(run, 0, tmp_path / "expected", model=MODEL)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    started = time.monotonic()
    process = forked(lambda: export_trial(run, 0, tmp_path / "whole", model=MODEL))
    os.waitpid(process, 0)
    seconds, rng = time.monotonic() - started, random.Random(0)
    for number in range(10):
        out = tmp_path / f"out{number}"
        process = forked(lambda out=out: export_trial(run, 0, out, model=MODEL))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 1.2 * seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert_whole_or_absent(out, expected)
