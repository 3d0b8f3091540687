"""What tests of several folders share."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_up_run import SPACE, made_up_records, record, write_run
from own_cache import own_cache

from rlsearch.results.tables import TrialRecord

__all__ = ["own_cache"]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """What is imported by now is no garbage: looking through all of torch takes half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Python's own end collects all of it, or some libraries tell of leaks."""
    gc.unfreeze()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a finished run of 24 trials, 21 of them complete."""
    return write_run(tmp_path / "runs" / "digits", made_up_records())


@pytest.fixture
def make_record() -> Any:
    """`record`: one trial, with the columns that a test cares about."""
    return record


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """Writes a run of the given records, and gives its folder."""

    def make(records: list[TrialRecord], space: Mapping[str, Any] = SPACE) -> Path:
        return write_run(tmp_path / "run", records, space)

    return make
