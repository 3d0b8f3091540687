"""A process that hangs ends itself, whatever holds it; real processes, and real hangs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlsearch.search.hang import ends_when_hung, stacks_of_hung

HANGING = """
import ctypes, sys, time
from pathlib import Path
from rlsearch.search.hang import ends_when_hung

def waiting():
    {line}

with ends_when_hung(Path(sys.argv[1]), 0.5):
    waiting()
"""


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(60)",
        "ctypes.PyDLL(None).sleep(60)",  # never gives up the interpreter, as a deadlock in a library
        "\n    while True: pass",
    ],
)
def test_a_process_that_hangs_ends_and_leaves_where_it_stood(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "trial"
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANGING.format(line=line), str(folder)], timeout=50)
    assert ended.returncode == 1
    assert time.monotonic() - started < 45
    assert "in waiting" in stacks_of_hung(folder)


def test_what_ends_in_time_leaves_nothing(tmp_path: Path) -> None:
    with ends_when_hung(tmp_path, 30):
        assert [path.suffix for path in tmp_path.iterdir()] == [".txt"]
    assert list(tmp_path.iterdir()) == []
    assert stacks_of_hung(tmp_path) == ""


def test_an_error_is_not_held_up_and_leaves_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mistake"), ends_when_hung(tmp_path, 30):
        raise ValueError("mistake")
    assert stacks_of_hung(tmp_path) == ""
