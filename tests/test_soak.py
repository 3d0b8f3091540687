"""The soak runs, its faults are faults, and it says where books are not in order."""

from __future__ import annotations

import errno
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from books import planned_trials, read_study
from faults import RoomyDisk, full_disk, locked_database
from one_process_search import end_next_trial, search_in_one_process
from real_driver import Driver
from soak import Soak, met_pythons_start

from rlsearch.search.outcome import Outcome

SOAK = Path(__file__).parent / "soak.py"


class Patient(Driver):
    """Stands for a driver that lives on whatever happens."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def wait(self, seconds: float | None) -> int | None:
        """Lets the time pass in which a driver would meet the fault."""
        time.sleep(min(seconds or 0, 2))
        return None


@pytest.mark.cluster
def test_one_kill_and_a_resume_through_the_command_line() -> None:
    ended = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "1", "--seed", "2"], capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])["figures"]
    assert figures["faults"] == figures["faults: SIGKILL of the driver"] == 1
    assert figures["trials COMPLETE"] == figures["trials planned"]
    assert figures["differences (0 expected)"] == 0


def test_the_soak_names_what_is_not_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, temporary = tmp_path / "disk" / "run", tmp_path / "temporary"
    temporary.mkdir()
    search_in_one_process(run, 2, untold=1)
    end_next_trial(run, Outcome("FAIL", reason="worker_lost: gone").to_dict())
    soak = Soak(tmp_path, temporary, random.Random(0))
    soak.prove()
    assert soak.differences == []
    (run / "epochs" / "trial-00001.parquet").unlink()
    soak.prove()
    figures = soak.report()
    assert figures["differences (0 expected)"] == len(soak.differences) > 0
    told = capsys.readouterr().out
    assert "epochs/trial-00001.parquet: is missing" in told
    assert "  trial 2: FAIL, worker_lost: gone" in told


def test_only_a_ctrl_c_in_pythons_own_start_may_end_in_a_traceback(tmp_path: Path) -> None:
    """Real ones: of an import, and out of the program's own main."""
    (tmp_path / "early.py").write_text("raise KeyboardInterrupt\n")
    codes = {"import early": True, "def main():\n    raise KeyboardInterrupt\nmain()": False, "1 / 0": False}
    for code, is_early in codes.items():
        ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert "Traceback" in ended.stderr
        assert met_pythons_start(ended.stderr) == is_early


def test_a_full_disk_is_full_and_gets_room_again(tmp_path: Path) -> None:
    with RoomyDisk(tmp_path / "disk") as disk:
        if not disk.is_mounted:
            pytest.skip("no file system can be mounted here")
        run = tmp_path / "disk" / "run"
        run.mkdir()
        found: list[int | None] = []

        def write() -> None:
            time.sleep(0.5)
            try:
                (run / "much").write_bytes(bytes(1 << 20))
            except OSError as error:
                found.append(error.errno)

        writer = threading.Thread(target=write)
        writer.start()
        assert full_disk(Patient(), run, random.Random(0))
        writer.join()
        assert found == [errno.ENOSPC]
        (run / "much").write_bytes(bytes(1 << 20))
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_locked_database_is_locked_and_then_free(tmp_path: Path) -> None:
    assert not locked_database(Patient(), tmp_path, random.Random(0))
    search_in_one_process(tmp_path / "run", 2)
    refused = []

    def write() -> None:
        time.sleep(0.5)
        connection = sqlite3.connect(tmp_path / "run" / "study.db", timeout=0)
        try:
            connection.execute("DELETE FROM studies")
        except sqlite3.OperationalError as error:
            refused.append(str(error))
        finally:
            connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    assert locked_database(Patient(), tmp_path / "run", random.Random(0))
    writer.join()
    assert refused == ["database is locked"]
    assert len(read_study(tmp_path / "run")) == planned_trials(tmp_path / "run") == 2
