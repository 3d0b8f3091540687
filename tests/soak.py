"""Runs a search under random faults, through its real command line, and proves its books in the end.

    python tests/soak.py --minutes 30          faults of every kind, one after the other
    python tests/soak.py --kills 100           so many random SIGKILLs of the driver in a row, a resume after each
    python tests/soak.py --storage postgresql  the study in a server of its own, which crashes now and then too

The trials are real and cheap: each trains a ResNet-20 on a few digits images for a second or two. The search is resumed
after whatever ended it, and asked for more trials whenever it has all. In the end every trial must have ended exactly
once, study, tables, TensorBoard and weights must agree, what had once ended must be as it was, and no process, lock or
temporary file may be left: `tests/books.py` looks. Exits 1 where something is not in order; `--work` keeps the run.

The disk that gets full is a file system in memory that holds the run, where one can be mounted; else the driver's files
are limited to the size that its study has (RLIMIT_FSIZE). The table says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from books import check_books, compare, has_study, left_behind, planned_trials, read_ended, read_study
from faults import RoomyDisk, faults, kill_driver
from optuna.trial import TrialState
from postgresql import Server, find_programs, running_server
from real_driver import Driver

SPACE = """
model: {name: resnet20}
data: {name: digits, limit: 300}
training: {epochs: 3, batch_size: 32}
objectives: {accuracy: maximize, params: minimize, train_flops: minimize}
space:
  replacement: {units: "layer*", blocks: [skip, scalar, channel], max_fraction: 0.5}
  learn_drop: {threshold: {low: 1.0e-3, high: 1.0e-1, log: true}}
search: {trials: 6, startup_trials: 2, max_concurrent: 2, max_failures: 1000000}
resources: {cpu: 1, gpu: 0}
"""
MORE_TRIALS = 10
# In a row of kills a driver's life goes from its start to the end of so many trials.
TRIALS_A_LIFE = 3
PATIENCE_SECONDS = 60.0
MEAN_PAUSE_SECONDS = 20.0
# How a driver ends that a signal met: killed, stopped, or met before it could handle any.
_SIGNALLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 143}


class Soak:
    """One run under faults.

    Args:
        work: a folder of this soak's own; ``disk/run`` in it is the search's.
        temporary: where drivers put their temporary files.
        rng: draws the faults and their moments.
        server: of PostgreSQL, which the environment names, for the study; None for SQLite.

    Attributes:
        faults: how many were injected, by kind.
        differences: what was found not to be in order.
        resumed: how often the search was taken up again.
    """

    def __init__(self, work: Path, temporary: Path, rng: random.Random, server: Server | None = None) -> None:
        self.run = work / "disk" / "run"
        self.faults: Counter[str] = Counter()
        self.differences: list[str] = []
        self.resumed = 0
        self._rng, self._temporary, self._space = rng, temporary, work / "space.yaml"
        self._space.write_text(
            SPACE if server is None else SPACE.replace("search: {", "search: {storage: postgresql, ")
        )
        self._kinds = faults(server)
        self._log = work / "log"
        self._started = time.monotonic()
        self._ended = read_ended(self.run)

    def under_faults(self, minutes: float) -> None:
        """Injects faults of all kinds for so long."""
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            with self._driver() as driver:
                met = set()
                while driver.wait(self._rng.expovariate(1 / MEAN_PAUSE_SECONDS)) is None and time.monotonic() < until:
                    kind = self._rng.choice(sorted(self._kinds))
                    self._tell(kind)
                    if self._kinds[kind](driver, self.run, self._rng):
                        self.faults[kind] += 1
                        met.add(kind)
                if driver.wait(0) is None:  # the time is over
                    kill_driver(driver, self.run, self._rng)
                    self.faults["SIGKILL of the driver"] += 1
                self._check_end(driver.wait(0), driver, _SIGNALLED | {0} | self._excused(met, driver.told()))

    def in_a_row(self, kills: int) -> None:
        """So many random SIGKILLs of a driver, at moments of its whole life."""
        kind, lives = "SIGKILL of the driver", [self._measured_life()]
        while self.faults[kind] < kills:
            with self._driver(TRIALS_A_LIFE) as driver:
                started = time.monotonic()
                if driver.wait(self._rng.uniform(0, 1.1 * statistics.median(lives))) is None:
                    driver.send(signal.SIGKILL)
                    self.faults[kind] += 1
                else:
                    lives.append(time.monotonic() - started)
                self._check_end(driver.wait(PATIENCE_SECONDS), driver, {0, -signal.SIGKILL})

    def to_the_end(self) -> None:
        """Lets the search have all of its trials."""
        with self._driver(0) as driver:
            self._check_end(driver.wait(None), driver, {0})

    def prove(self) -> None:
        """Proves the books of a search that has all of its trials."""
        self._await_nothing_left()
        self._differ(check_books(self.run, planned_trials(self.run)))

    def report(self) -> dict[str, object]:
        """The figures, after a table for people."""
        trials = read_study(self.run)
        states = Counter(trial.state.name for trial in trials.values())
        rows = [(f"faults: {kind}", count) for kind, count in sorted(self.faults.items())]
        rows += [
            ("faults", self.faults.total()),
            ("resumed", self.resumed),
            ("trials planned", planned_trials(self.run)),
        ]
        rows += [(f"trials {state}", count) for state, count in sorted(states.items())]
        rows += [("minutes", round((time.monotonic() - self._started) / 60, 1))]
        rows += [("differences (0 expected)", len(self.differences))]
        for name, value in rows:
            print(f"{name:<44} {value}")
        for line in self.differences:
            print(f"  {line}")
        for number, trial in trials.items():
            if trial.state != TrialState.COMPLETE:  # no difference: a process that was killed twice is not tried again
                print(f"  trial {number}: {trial.state.name}, {trial.user_attrs.get('outcome', {}).get('reason')}")
        return dict(rows)

    def _measured_life(self) -> float:
        """Seconds that a whole search of its own takes here; nobody kills it."""
        folder, started = self._space.parent / "not killed", time.monotonic()
        driver = Driver(["search", str(self._space), "--run-dir", str(folder)], self._temporary, self._log)
        try:
            self._check_end(driver.wait(None), driver, {0})
        finally:
            driver.end()
        shutil.rmtree(folder)
        return time.monotonic() - started

    @contextlib.contextmanager
    def _driver(self, trials: int | None = None) -> Iterator[Driver]:
        """A driver that begins the search or goes on with it, and what is checked after its end.

        Args:
            trials: it ends with so many more than have ended; None for more as soon as all have ended.
        """
        arguments = ["search", str(self._space), "--run-dir", str(self.run)]
        if has_study(self.run):
            self.resumed += 1
            arguments, planned = ["resume", str(self.run)], planned_trials(self.run)
            if trials is not None:
                arguments += ["--trials", str(max(planned, len(self._ended) + trials))]
            elif len(self._ended) >= planned:
                arguments += ["--trials", f"+{MORE_TRIALS}"]
        self._tell(" ".join(arguments[:1] + arguments[2:]))
        driver = Driver(arguments, self._temporary, self._log)
        try:
            yield driver
        finally:
            driver.end()
        if self._rng.random() < 0.5:  # else the next one starts while Ray's processes are being ended
            self._await_nothing_left()
        before, self._ended = self._ended, read_ended(self.run)
        self._differ(compare(before, self._ended))
        self._tell(f"{len(self._ended)} trials have ended, {len(self.differences)} differences")

    def _check_end(self, code: int | None, driver: Driver, expected: set[int]) -> None:
        told = driver.told()
        # On a machine that is too busy Ray's own servers take each other for dead; Ray dies of a SIGTERM in its start.
        if "has been marked dead" in told or "SIGTERM received at" in told:
            self.faults["Ray ended the driver"] += 1
        elif code not in expected:
            self._differ([f"a driver ended with {code}, and said: {told[-2000:]}"])
        elif met_pythons_start(told):
            self.faults["SIGINT in Python's own start"] += 1
        elif "Traceback" in told:
            self._differ([f"a driver said: {told[-3000:]}"])

    def _excused(self, met: set[str], told: str) -> set[int]:
        """Exit codes that the faults which a driver met account for."""
        if "full disk" in met:
            return {1, 2}
        # A resume waits for its server. A new search is told at once: its address may well be wrong.
        is_refused = "does not let us in" in told and not has_study(self.run)
        return {2} if "restarted database" in met and is_refused else set()

    def _await_nothing_left(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := left_behind(self._temporary)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self._differ(left)

    def _differ(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.differences:  # what was left once is found each time
                self._tell(f"DIFFERENCE: {line}")
                self.differences.append(line)

    def _tell(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:7.1f} s  {text}", file=sys.stderr, flush=True)


def met_pythons_start(told: str) -> bool:
    """Whether Ctrl-C came before the first line of the program's own ``main``: Python tells that by a traceback."""
    return told.startswith("Traceback") and told.rstrip().endswith("KeyboardInterrupt") and ", in main\n" not in told


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long faults are injected")
    parser.add_argument("--kills", type=int, help="instead of it, so many SIGKILLs in a row")
    parser.add_argument("--storage", choices=["sqlite", "postgresql"], default="sqlite", help="of the study")
    parser.add_argument("--seed", type=int, default=0, help="draws the faults and their moments")
    parser.add_argument("--work", type=Path, help="a folder for the run, which is then kept")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    # In the background it is ignored, and drivers would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.work is not None and options.work.exists() and any(options.work.iterdir()):
        parser.error(f"--work: {options.work} must be empty")
    if options.storage == "postgresql" and find_programs() is None:
        parser.error("--storage: PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server()) if options.storage == "postgresql" else None
        os.environ.update({} if server is None else server.environment)
        # Short, for Ray's sockets lie in it.
        temporary = tempfile.TemporaryDirectory(prefix="rl-soak-", dir="/tmp", ignore_cleanup_errors=True)
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-soak-run-")))
        work.mkdir(parents=True, exist_ok=True)
        disk = stack.enter_context(RoomyDisk(work / "disk"))
        soak = Soak(work, Path(stack.enter_context(temporary)), random.Random(options.seed), server)
        if options.kills is None:
            soak.under_faults(options.minutes)
        else:
            soak.in_a_row(options.kills)
        soak.to_the_end()
        soak.prove()
        print(f"{'the disk':<44} {disk.kind}")
        figures = soak.report()
        if options.work is not None and disk.is_mounted:
            shutil.copytree(soak.run, work / "run")  # the disk is gone in a moment
    print(json.dumps({"name": "soak", "storage": options.storage, "seed": options.seed, "figures": figures}))
    sys.exit(bool(soak.differences))


if __name__ == "__main__":
    main()
