"""The watchdog ends what belongs to a cluster and removes its folder, whatever stage its processes are in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsearch.search.watchdog import clean_up, start_watchdog

LATE = "import os, sys, time; time.sleep(1); os.makedirs(sys.argv[1], exist_ok=True); time.sleep(60)"
HIDDEN = "import os, sys, time; time.sleep(2); os.makedirs(bytes.fromhex(sys.argv[1]).decode(), exist_ok=True)"
LOGGING = "import sys, time; file = open(sys.argv[1] + sys.argv[2], 'w'); print('open', flush=True); time.sleep(60)"
STRANGER = "import sys, time; time.sleep(60)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
def test_processes_of_all_stages_are_ended_and_the_folder_stays_away(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    arguments = [
        [LOGGING, str(folder), "/log"],  # it has a file open
        [LATE, str(folder / "session" / "logs")],  # it is about to make the folder anew
        [STRANGER, str(tmp_path)],
        [HIDDEN, str(folder / "session").encode().hex()],  # it will make the folder anew, and does not name it
    ]
    processes = [
        subprocess.Popen([sys.executable, "-c", *line], stdout=subprocess.PIPE, text=True) for line in arguments
    ]
    assert processes[0].stdout is not None
    processes[0].stdout.readline()
    try:
        clean_up(folder, os.getpid())  # which is not our parent: as after its end
        assert processes[3].wait() == 0  # it was not noticed, and what it made was
        assert not folder.exists()
        assert [process.poll() for process in processes] == [-9, -9, None, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_folder_of_a_driver_that_ended_while_ray_started_stays_away(tmp_path: Path) -> None:
    """The driver waits for the watchdog; it did not shut down what it had only begun to start."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    watchdog = start_watchdog(folder)
    starting = subprocess.Popen([sys.executable, "-c", HIDDEN, str(folder / "session").encode().hex()])
    assert watchdog.stdin is not None
    watchdog.stdin.close()
    assert starting.wait() == 0
    assert watchdog.wait() == 0
    assert not folder.exists()
