"""A driver that is killed at whatever moment loses nothing and counts nothing twice."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from books import check_books, compare, left_behind, read_ended, read_study
from one_process_search import CONTENT, end_next_trial, search_in_one_process
from rich.console import Console
from warm_ray import Forked, Forks, warm_ray

from rlsearch.errors import RunFolderError
from rlsearch.results.tables import read_trials
from rlsearch.search.run import resume_search
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.study import RunStudy

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked, and looked up in /proc"),
]
KILLS = 30
# A driver's life goes from its start to the end of so many trials.
TRIALS_A_LIFE = 3
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Machine:
    """Where drivers are started.

    Attributes:
        address: of Ray.
        forks: starts them.
        temporary: where they put their temporary files.
    """

    address: str
    forks: Forks
    temporary: Path


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with (
        tempfile.TemporaryDirectory(prefix="rl-kills-", dir="/tmp") as temporary,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", temporary)
        with warm_ray(2, ["drivers"], "drivers:warm_up") as (address, forks):
            yield Machine(address, forks, Path(temporary))


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two trials, of which the last was trained and not told; and what that reported."""
    folder = tmp_path_factory.mktemp("kills") / "run"
    outcome = search_in_one_process(folder, 1, untold=1)[-1]
    assert [trial.state.name for trial in read_study(folder).values()] == ["COMPLETE", "WAITING"]
    (folder / "checkpoints" / "trial-00001" / "last.pt").write_bytes(b"of an earlier epoch")
    return folder, outcome


def killed_at_every_write(
    forks: Forks, base: Path | None, work: Path, function: str, *arguments: Any
) -> Iterator[Path]:
    """Copies of a folder, each as the process leaves it that is killed before its first, its second, ... write."""
    for nth in itertools.count(1):
        folder = Path(tempfile.mkdtemp(prefix=f"{nth}-", dir=work)) / "run"
        if base is not None:
            shutil.copytree(base, folder)
        exit_code = forks.start(function, str(folder), *arguments, nth).wait(PATIENCE_SECONDS)
        if exit_code == 0:  # it has no n-th write
            assert nth > 10
            return
        assert exit_code == -9
        yield folder
        shutil.rmtree(folder.parent)


def go_on(machine: Machine, folder: Path, trials: int) -> None:
    """Resumes a run to its end; Ray is needed only where something is left to be trained."""
    known = read_study(folder).values()
    if len(known) == trials and all("outcome" in trial.user_attrs for trial in known):
        resume_search(folder, console=Console(quiet=True))
    else:
        assert machine.forks.start("drivers:drive", str(folder), machine.address, trials).wait(PATIENCE_SECONDS) == 0


def test_killed_at_every_write_of_a_trials_end(
    machine: Machine, waiting: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The study's tell, the tables, TensorBoard, the weights: between any two of them."""
    base, outcome = waiting
    before = read_ended(base)
    num_ended = []
    for folder in killed_at_every_write(machine.forks, base, tmp_path, "drivers:die_in_the_end_of_a_trial", outcome):
        ended = read_ended(folder)
        assert compare(before, ended) == []
        num_ended.append(len(ended))
        go_on(machine, folder, 2)
        assert compare(ended, read_ended(folder)) == []
        assert check_books(folder, 2) == []
    assert num_ended == sorted(num_ended)
    assert set(num_ended) == {1, 2}


def test_killed_at_every_write_of_a_resume_that_settles_what_a_kill_has_left(
    machine: Machine, waiting: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    base, outcome = waiting
    ends = killed_at_every_write(machine.forks, base, tmp_path, "drivers:die_in_the_end_of_a_trial", outcome)
    told = next(folder for folder in ends if "outcome" in read_study(folder)[1].user_attrs)
    torn = Path(shutil.copytree(told, tmp_path / "torn"))
    assert read_study(torn)[1].state.name == "RUNNING"  # and never closed
    before = read_ended(torn)
    for folder in killed_at_every_write(machine.forks, torn, tmp_path, "drivers:die_in_a_resume"):
        ended = read_ended(folder)
        assert compare(before, ended) == []
        go_on(machine, folder, 2)
        assert compare(ended, read_ended(folder)) == []
        assert check_books(folder, 2) == []


def test_killed_at_every_write_of_a_searchs_making(machine: Machine, tmp_path: Path) -> None:
    """Either nothing has begun, and the same search can be started; or it has, and can be resumed."""
    begun, known = set(), []
    for folder in killed_at_every_write(machine.forks, None, tmp_path, "drivers:die_in_the_making"):
        run, before = RunFolder(folder), known
        known = sorted(re.sub(r"\.\w{8}(?=$|-)", "", path.name) for path in folder.glob("*"))
        if known == before:
            continue  # the study grew in its temporary file
        try:
            run.check_free()
        except RunFolderError:
            study = RunStudy.open(run.study_path)
            run.check_space(study.space)
            assert study.target == CONTENT["search"]["trials"]
            run.remove_leftovers()
            begun.add(True)
        else:
            again = machine.forks.start("drivers:die_in_the_making", str(folder), 10**6)
            assert again.wait(PATIENCE_SECONDS) == 0
            begun.add(False)
        assert not list(folder.glob(".*"))
    assert begun == {False, True}


def test_tables_that_are_ahead_of_the_study_follow_it(
    machine: Machine, waiting: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """As where a study was brought back from a copy: what it does not know is trained, and counted once."""
    base, outcome = waiting
    folder = Path(shutil.copytree(base, tmp_path / "run"))
    end_next_trial(folder, outcome)
    assert len(read_trials(folder / "trials.parquet")) == 2
    shutil.copy(base / "study.db", folder / "study.db")
    before = read_ended(folder)
    go_on(machine, folder, 2)
    assert compare(before, read_ended(folder)) == []
    assert check_books(folder, 2) == []


@pytest.mark.timeout(900)  # a minute and a half, and many times that where other work has the cores
def test_thirty_kills_in_a_row_lose_nothing_and_count_nothing_twice(machine: Machine, tmp_path: Path) -> None:
    """The moments are drawn over the whole life of a driver: its start, the study's making, trainings, its end."""
    seed = int(os.environ.get("RLSEARCH_TESTS_SEED", time.time_ns() % 10**6))
    print(f"seed {seed} (RLSEARCH_TESTS_SEED draws the same moments again)")  # shown where this fails
    rng, folder, output = random.Random(seed), tmp_path / "run", tmp_path / "output"

    def drive(run: Path, trials: int) -> Forked:
        return machine.forks.start("drivers:drive", str(run), machine.address, trials, output=output)

    started = time.monotonic()
    assert drive(tmp_path / "not killed", TRIALS_A_LIFE).wait() == 0, output.read_text()
    lives, ended, kills, target = [time.monotonic() - started], read_ended(folder), [], TRIALS_A_LIFE
    slower = 1.0  # where other work has the cores by now, a life lasts longer than those that were measured
    while len(kills) < KILLS:
        target = max(target, len(ended) + TRIALS_A_LIFE)
        started, driver = time.monotonic(), drive(folder, target)
        if driver.wait(rng.uniform(0, 1.1 * slower * median(lives))) is None:
            driver.kill()
            assert driver.wait() == -9
            kills.append(len(ended))
        else:  # it had ended before
            assert driver.wait() == 0, output.read_text()
            lives.append(time.monotonic() - started)
        before, ended = ended, read_ended(folder)
        assert compare(before, ended) == []
        slower = max(1.0, slower * (1.1 if len(before) == len(ended) else 0.8))
    assert len(set(kills)) > 2  # they met all parts of a life
    assert drive(folder, target).wait() == 0, output.read_text()
    assert compare(ended, read_ended(folder)) == []
    assert check_books(folder, target) == []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := left_behind(machine.temporary)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
