"""What a confirmation shows while it runs: a live display in a terminal, one plain line a training everywhere else."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from rlsearch.confirm import ConfirmPlan, ConfirmWatch
from rlsearch.results.confirmed import ConfirmedTraining
from rlsearch.results.describe import describe_duration, describe_policy, describe_value
from rlsearch.results.selection import policy_of
from rlsearch.results.tables import TrialRecord
from rlsearch.training.metrics import EpochMetrics


class ConfirmProgress(ConfirmWatch):
    """What is to be trained and about how long that takes; then the trainings done of how many, and the time left.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plan = ConfirmPlan((), (), ())
        self._num_ended = 0
        self._started = time.monotonic()
        self._line = ""
        self._live = Live(get_renderable=self._display, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> ConfirmProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def planned(self, plan: ConfirmPlan) -> None:
        """Says what is to come, and starts the display."""
        self._plan, self._started = plan, time.monotonic()
        self._console.print(plan_line(plan), soft_wrap=True, highlight=False)
        if self._console.is_terminal and plan.remaining:
            self._live.start()

    def training_started(self, record: TrialRecord, seed: int) -> None:
        """Shown until the first epoch ends."""
        self._line = f"trial {record.trial}, seed {seed}  starts  {describe_policy(policy_of(record))}"

    def epoch_ended(self, metrics: EpochMetrics) -> None:
        """Shown until the next one ends."""
        record, seed = self._plan.remaining[self._num_ended]
        done = f"epoch {metrics.epoch}/{metrics.epochs}  {describe_value('accuracy', metrics.accuracy)}"
        self._line = f"trial {record.trial}, seed {seed}  {done}  {describe_policy(policy_of(record))}"

    def training_ended(self, training: ConfirmedTraining) -> None:
        """Leaves one line."""
        self._num_ended += 1
        told = training.reason or f"{describe_value('accuracy', training.test_accuracy)} on test"
        line = f"trial {training.trial}, seed {training.seed}: {told}"
        self._console.print(
            Text(line if self._console.is_terminal else f"{line} ({self.summary()})"), soft_wrap=True, highlight=False
        )

    def summary(self) -> str:
        """Where it stands, on one line."""
        left = len(self._plan.remaining) - self._num_ended
        total = self._plan.num_trainings
        seconds = self._seconds_left()
        told = f"{total - left} of {total} trainings done"
        return told if seconds is None else f"{told}, {describe_duration(seconds)} left"

    def _seconds_left(self) -> float | None:
        """At the pace of what was trained so far, which is measured against the search's own times."""
        times = [record.train_seconds or 0.0 for record, _ in self._plan.remaining]
        trained, left = sum(times[: self._num_ended]), sum(times[self._num_ended :])
        if not trained:
            return self._plan.seconds if not self._num_ended else None
        return left * (time.monotonic() - self._started) / trained

    def _display(self) -> Group:
        """The live display."""
        total = self._plan.num_trainings
        done = total - len(self._plan.remaining) + self._num_ended
        line = Text(self._line, overflow="ellipsis", no_wrap=True)
        # A bar does not end its line.
        return Group(line, ProgressBar(total=max(1, total), completed=done, width=40), Text(f"\n{self.summary()}"))


def plan_line(plan: ConfirmPlan) -> str:
    """What is to be trained, as in ``12 trainings: trials 0, 3, 7, 9 with seeds 1, 2, 3; about 2m10s``."""
    trials, seeds = (", ".join(map(str, items)) for items in ([record.trial for record in plan.records], plan.seeds))
    told = f"{plan.num_trainings} trainings: trials {trials}, each with seeds {seeds}"
    done = plan.num_trainings - len(plan.remaining)
    if not plan.remaining:
        return f"{told}; all of them are done"
    if done:
        told = f"{told}; {done} are done"
    if plan.seconds is None:
        return told
    return f"{told}; about {describe_duration(plan.seconds)} if each takes as long as in the search"
