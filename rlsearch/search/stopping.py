"""When a search ends before it has all its trials: its time is spent, or its GPU time, or its front no longer grows.

Trials that run then go on to their end; only no further one starts. What the rules have to know of earlier sessions
lies in the study.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from rlsearch.errors import ConfigError, Problem, UserError
from rlsearch.results.selection import normalised_hypervolume
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.search.settings import SearchSettings
from rlsearch.search.study import RunStudy

# A trial that fails or breaks a constraint says nothing about whether better ones are left.
_COUNTED = ("COMPLETE", "PRUNED")
# A killed process loses at most so much of what its running trials have spent.
_SECONDS_BETWEEN_WRITES = 60.0


@dataclass(frozen=True)
class Ending:
    """Why no further trial starts.

    Attributes:
        why: for people.
        resume_with: options with which ``rlsearch resume`` goes on.
    """

    why: str
    resume_with: str


@dataclass(frozen=True)
class Kept:
    """What stays in the study from one session to the next.

    Attributes:
        gpu_seconds: GPU time spent.
        gpu_hours: the limit that a resume has set; None for the search space's.
        settled: whether the search has ended because its front no longer grew.
        counted_from: how many trials had counted when a resume went on in spite of that.
    """

    gpu_seconds: float = 0.0
    gpu_hours: float | None = None
    settled: bool = False
    counted_from: int = 0


class StoppingRules:
    """The rules of one session.

    Args:
        settings: of the search.
        study: of the run; read once, written where something has to be kept.
        gpus: how many GPUs one trial takes, possibly a fraction.
    """

    def __init__(self, settings: SearchSettings, study: RunStudy, gpus: float = 0.0) -> None:
        self._settings = settings
        self._study = study
        self._gpus = gpus
        self._kept = _kept(study)
        now = time.monotonic()
        self._deadline = None if settings.time_budget is None else now + settings.time_budget
        self._spent_before = self._kept.gpu_seconds
        self._started: dict[int, float] = {}
        self._ended_seconds = 0.0
        self._written = now

    def trial_started(self, number: int) -> None:
        """A trial takes its GPUs."""
        self._started[number] = time.monotonic()

    def trial_goes_on(self) -> None:
        """Called now and then while trials run."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write_spent()

    def trial_ended(self, number: int) -> None:
        """A trial gives its GPUs back: at its end, or cut short."""
        self._ended_seconds += time.monotonic() - self._started.pop(number)
        self._write_spent()

    @property
    def gpu_hours_spent(self) -> float:
        """GPU hours of all trials of the run, those that run now and those cut short among them."""
        now = time.monotonic()
        running = sum(now - started for started in self._started.values())
        return (self._spent_before + self._gpus * (self._ended_seconds + running)) / 3600

    def budget_spent(self) -> Ending | None:
        """Whether time or GPU time has run out: then nothing starts, not even what was interrupted."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return Ending("the time budget is spent", "--time-budget 2h")
        limit = self._settings.gpu_hours
        if limit is not None and self.gpu_hours_spent > limit:
            spent = f"{self.gpu_hours_spent:.3g} GPU hours are spent"
            return Ending(f"{spent}, the limit is {limit:g} (search.gpu_hours)", "--gpu-hours +10")
        return None

    def settled(self, records: Collection[TrialRecord], objectives: Mapping[str, str]) -> Ending | None:
        """Whether the front no longer grows: then nothing new is proposed.

        Args:
            records: the trials that have ended, over all sessions, in any order.
            objectives: metric to direction.
        """
        least, window = self._settings.min_gain, self._settings.gain_window
        if least is None:
            return None
        if not self._kept.settled:
            if num_counted(records) < max(self._settings.startup_trials, self._kept.counted_from) + window:
                return None
            gain = recent_gain(Run(Path(), objectives, records=tuple(records)), window)
            if gain is None or gain >= least:
                return None
            self._keep(replace(self._kept, settled=True))
        told = f"the last {window} trials added less than {100 * least:.3g} % to the front's hypervolume"
        return Ending(f"{told} (search.min_gain)", "--trials +50")

    def _write_spent(self) -> None:
        self._written = time.monotonic()
        if self._gpus:
            self._keep(replace(self._kept, gpu_seconds=3600 * self.gpu_hours_spent))

    def _keep(self, kept: Kept) -> None:
        self._kept = kept
        self._study.stopping = asdict(kept)


def go_on(study: RunStudy, asked_for_more: bool, gpu_hours: str | None) -> Kept:
    """With what a resume goes on; nothing is written yet.

    Args:
        study: of the run.
        asked_for_more: whether the user asked for more trials or more time. A search that ended because its front no
            longer grew then runs for another ``gain_window`` trials at least.
        gpu_hours: the new limit in all, ``+10`` for so many more than are spent, None for the one there is.

    Raises:
        UserError: ``gpu_hours`` is no such number, or is spent already.
    """
    kept = _kept(study)
    if gpu_hours is not None:
        kept = replace(kept, gpu_hours=_limit(gpu_hours, kept.gpu_seconds / 3600))
    if kept.settled and (asked_for_more or gpu_hours is not None):
        kept = replace(kept, settled=False, counted_from=num_counted(study.records()))
    return kept


def check_gpu_hours(settings: SearchSettings, gpus: float) -> None:
    """Whether a limit on GPU time means anything where trials take so many GPUs.

    Raises:
        ConfigError: it does not.
    """
    if settings.gpu_hours is not None and not gpus:
        message = "limits GPU time, but trials take no GPU here: there is none; use search.time_budget instead"
        raise ConfigError([Problem("search.gpu_hours", message)], "search space")


def stopping_warning(settings: SearchSettings) -> str | None:
    """What to warn of where a rule cannot act before the search has all its trials; else None."""
    first = settings.startup_trials + settings.gain_window
    if settings.min_gain is None or first < settings.trials:
        return None
    return (
        f"search.min_gain looks at the front after {first} trials at the earliest (startup_trials + gain_window), and "
        f"the search has {settings.trials}: it will not end sooner; lower search.gain_window, or give more trials"
    )


def recent_gain(run: Run, window: int) -> float | None:
    """By how much the last ``window`` trials that count made the front's hypervolume grow, as a share of what it is.

    Both values are scaled by the baseline, whenever that ended: the share is in [0, 1].

    Args:
        run: its trials in any order.
        window: how many of the COMPLETE and PRUNED trials, by the time at which they ended.

    Returns:
        None while there is no baseline, or nothing on the front is better than its reference.
    """
    now = normalised_hypervolume(run)
    if not now:
        return None
    last = sorted((record for record in run.records if record.state in _COUNTED), key=_end)[-window:]
    before = normalised_hypervolume(run, without={record.trial for record in last})
    assert before is not None  # the baseline is there
    return 1 - before / now


def num_counted(records: Iterable[TrialRecord]) -> int:
    """How many trials tell whether the front still grows."""
    return sum(record.state in _COUNTED for record in records)


def _end(record: TrialRecord) -> tuple[datetime, int]:
    assert record.ended is not None  # it has ended
    return record.ended, record.trial


def _kept(study: RunStudy) -> Kept:
    return Kept(**study.stopping)


def _limit(text: str, spent: float) -> float:
    """The GPU hours that a user means."""
    text = text.strip()
    if not re.fullmatch(r"\+?(\d+\.?\d*|\.\d+)", text):
        raise UserError(f"--gpu-hours: must be a number, or one with a plus for so many more, got {text!r}")
    limit = float(text) + (spent if text.startswith("+") else 0.0)
    if limit <= spent:
        raise UserError(f"--gpu-hours: must be above the {spent:.3g} that the run has spent, got {text}; +10 adds ten")
    return limit
