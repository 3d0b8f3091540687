"""What a search shows while it runs: a live display in a terminal, one plain line a trial everywhere else."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlsearch.results.describe import describe_duration, describe_policy, describe_value
from rlsearch.results.selection import candidates, normalised_hypervolume, policy_of
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.search.study import PlannedTrial

# How many of the last trials tell the pace.
_PACE_TRIALS = 20
_STYLES = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "INFEASIBLE": "magenta"}
_WORDS = {"PRUNED": "pruned", "FAIL": "failed", "INFEASIBLE": "infeasible"}


class SearchProgress:
    """Trials done of how many, their states, the best accuracy, the hypervolume, and the time left.

    Args:
        console: where to show it.
        objectives: metric to direction.
        total: how many trials the search ends with.
        records: those that have ended before.
    """

    def __init__(
        self, console: Console, objectives: Mapping[str, str], total: int, records: Sequence[TrialRecord] = ()
    ) -> None:
        self._console = console
        self._objectives = dict(objectives)
        self._total = total
        self._started = time.monotonic()
        # The start of the pace, then the ends of the last trials.
        self._ends = deque([self._started], maxlen=_PACE_TRIALS + 1)
        self._running: dict[int, tuple[PlannedTrial, Mapping[str, Any]]] = {}
        self._take(records)
        self._live = Live(get_renderable=self._display, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> SearchProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def trial_started(self, planned: PlannedTrial) -> None:
        """A trial was handed to a worker."""
        self._running[planned.number] = (planned, {})

    def epoch_ended(self, planned: PlannedTrial, metrics: Mapping[str, Any]) -> None:
        """A trial goes on."""
        self._running[planned.number] = (planned, metrics)

    def trial_ended(self, record: TrialRecord, records: Sequence[TrialRecord]) -> None:
        """A trial has ended; ``records`` are all that have."""
        self._running.pop(record.trial, None)
        self._ends.append(time.monotonic())
        self._take(records)
        line = Text.assemble(f"trial {record.trial}: ", (record.state, _STYLES[record.state]), f" {_told(record)}")
        if not self._console.is_terminal:
            line.append(f" ({self.summary()})")
        self._console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        """Something that concerns the search as a whole."""
        self._console.print(Text(text), soft_wrap=True)

    def summary(self) -> str:
        """Where the search stands, on one line."""
        parts = [f"{len(self._records)} of {self._total} trials done", *self._states(), *self._best()]
        if self._hypervolume is not None:
            parts.append(f"hypervolume {self._hypervolume:.4f}")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{describe_duration(left)} left")
        return ", ".join(parts)

    def seconds_left(self) -> float | None:
        """How long the rest will take at the pace of the last trials; None before as many have ended as run at once.

        Trials that started together end together: the first of them says little about the pace.
        """
        if len(self._ends) - 1 < max(1, len(self._running)):
            return None
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        left = self._total - len(self._records)
        return max(0.0, pace * left - (time.monotonic() - self._ends[-1])) if left else 0.0

    def _take(self, records: Sequence[TrialRecord]) -> None:
        self._records = list(records)
        run = Run(Path(), self._objectives, records=tuple(records))
        self._hypervolume = normalised_hypervolume(run)
        self._complete = candidates(run)

    def _states(self) -> list[str]:
        counts = Counter(record.state for record in self._records)
        # Nothing to tell while all is well: what is done is complete.
        return [f"{counts[state]} {word}" for state, word in _WORDS.items() if counts[state]]

    def _best(self) -> list[str]:
        measured = [record for record in self._complete if record.accuracy is not None]
        if not measured:
            return []
        best = max(measured, key=lambda record: record.accuracy or 0.0)
        return [f"best accuracy {describe_value('accuracy', best.accuracy)} (trial {best.trial})"]

    def _display(self) -> Group:
        """The live display."""
        running = Table.grid(padding=(0, 2))
        for number, (planned, metrics) in sorted(self._running.items()):
            epoch = f"epoch {metrics['epoch']}/{metrics['epochs']}" if metrics else "starts"
            accuracy = describe_value("accuracy", metrics["accuracy"]) if metrics else ""
            policy = Text(describe_policy(planned.policy), overflow="ellipsis", no_wrap=True)
            running.add_row(Text(f"trial {number}", "cyan"), epoch, accuracy, policy)
        bar = ProgressBar(total=max(1, self._total), completed=len(self._records), width=40)
        elapsed = describe_duration(time.monotonic() - self._started)
        # A bar does not end its line.
        return Group(running, bar, Text(f"\n{self.summary()}, {elapsed} so far"))


def _told(record: TrialRecord) -> str:
    """One ended trial, in words."""
    policy = describe_policy(policy_of(record))
    if record.state != "COMPLETE":
        return f"{policy}: {record.reason}"
    note = f" ({record.reason})" if record.reason else ""
    return f"{describe_value('accuracy', record.accuracy)} {policy}{note}"
