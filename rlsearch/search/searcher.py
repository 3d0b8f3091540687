"""Tune's Searcher over the study: what is trained next comes from it, what comes out goes back into it.

Tune asks and tells here, in the driver, and nowhere else; workers never see the study.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from ray.tune.search import Searcher

from rlsearch.errors import OutOfMemoryError, SearchError
from rlsearch.results.tables import TrialRecord
from rlsearch.search.database import DatabaseAwayError
from rlsearch.search.hang import stacks_of_hung
from rlsearch.search.outcome import CONSTRAINT, STORAGE, Outcome, unmeasured
from rlsearch.search.progress import SearchProgress
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.scheduler import Racing
from rlsearch.search.space import SearchSpace
from rlsearch.search.start_design import BASELINE, SAMPLER, SENSITIVITY
from rlsearch.search.stopping import Ending, StoppingRules
from rlsearch.search.study import PlannedTrial, RunStudy
from rlsearch.search.unsaved import keep_outcome
from rlsearch.search.worker import Job
from rlsearch.training.trial_spec import TrialSpec

_DETAIL_LINES = 12
_STACK_LINES = 80
_REASON_LENGTH = 250
Method = TypeVar("Method", bound=Callable[..., Any])


def has_failed(record: TrialRecord) -> bool:
    """Whether a trial gave no result: it failed, or ran out of memory. One that broke a constraint gave one."""
    out_of_memory = (record.reason or "").startswith(OutOfMemoryError.reason)
    return record.state == "FAIL" or (record.state == "INFEASIBLE" and out_of_memory)


class StopSearch(BaseException):
    """Leaves Tune's loop at once, from wherever it calls us.

    No Exception: Tune turns those into text, and then waits up to 15 s for its workers to end by themselves.

    Attributes:
        cause: the error that ends the search; None where it is over, or somebody asked it to stop.
    """

    def __init__(self, cause: Exception | None = None) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _stops(method: Method) -> Method:
    """An error in here is no trial's fault: it ends the search, with its own type and message."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raise StopSearch(error) from error

    return cast("Method", wrapped)


class StudySearcher(Searcher):
    """Asks the sampler, writes the study, and keeps the run's tables up with it.

    Args:
        space: what is searched.
        study: the truth.
        folder: where the tables are.
        sampler: proposes.
        progress: is told what happens.
        rules: may end the search before it has all its trials; None for the space's, of trials that take no GPU.

    Attributes:
        racing: the scheduler that may have stopped a trial; None without racing.
        records: the trials that have ended, by number.
        error_of: from a trial's Tune id to what Ray says about the loss of its worker.
        why_ended: why no further trial was started before the search had all of them, or None.
        resume_with: options with which a resume goes on nevertheless, or None.
    """

    def __init__(
        self,
        space: SearchSpace,
        study: RunStudy,
        folder: RunFolder,
        sampler: PolicySampler,
        progress: SearchProgress,
        rules: StoppingRules | None = None,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._space = space
        self._study = study
        self._folder = folder
        self._sampler = sampler
        self._progress = progress
        self._rules = rules or StoppingRules(space.search, study)
        self._running: dict[str, PlannedTrial] = {}
        self._last: dict[str, Outcome] = {}
        self._held: list[tuple[PlannedTrial, Outcome]] = []
        self._num_failed = 0
        # Nobody else writes to the study, so that it is counted once.
        self._waiting = study.waiting()
        self._num_trials = study.num_trials
        self._target = study.target
        self.records = {record.trial: record for record in study.records()}
        self.racing: Racing | None = None
        self.error_of: Callable[[str], str] = lambda trial_id: ""
        self.why_ended: str | None = None
        self.resume_with: str | None = None

    @_stops
    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, as the config of a Trainable."""
        planned = self._next()
        if planned is None:
            return str(Searcher.FINISHED)
        self._running[trial_id] = planned
        self._rules.trial_started(planned.number)
        self._progress.trial_started(planned)
        spec = TrialSpec(self._space.model, self._space.data, planned.training, planned.policy, planned.seed)
        return {"job": Job(planned.number, spec, str(self._folder.checkpoints(planned.number)))}

    @_stops
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch that is not the last."""
        self._last[trial_id] = result["outcome"].cleaned()
        self._rules.trial_goes_on()
        self._progress.epoch_ended(self._running[trial_id], self._last[trial_id].final)

    @_stops
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial, good or bad.

        Raises:
            SearchError: its worker could not write: the trial stays among those that a resume takes up again.
        """
        self._check_storage(result)
        planned = self._running.pop(trial_id)
        self._rules.trial_ended(planned.number)
        outcome = self._outcome(trial_id, planned.number, result, error).cleaned()
        self._held.append((planned, outcome))
        # What is relative to the baseline can only be judged once that has ended; it started first.
        if self._waits_for_baseline():
            return
        self._held.sort(key=lambda item: item[0].number)  # the baseline before what is relative to it
        while self._held:
            self._close(*self._held.pop(0))
        if not self._running and self._is_over():
            raise StopSearch  # Tune would now wait some seconds for its workers to end by themselves

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is saved at any moment."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resume reads the study."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which never happens here."""
        return {}

    def is_protected(self, trial_id: str) -> bool:
        """Whether a trial is one that all others are compared with, never to be raced out."""
        return self._running[trial_id].origin != SAMPLER

    def is_probe(self, trial_id: str) -> bool:
        """Whether a trial is to train to racing's first rung and no further."""
        return self._running[trial_id].origin == SENSITIVITY

    def release(self) -> int:
        """Puts what still runs into the queue of a later resume; how many that were."""
        for planned in self._running.values():
            self._rules.trial_ended(planned.number)
        unfinished = [*self._running.values(), *(planned for planned, _ in self._held)]
        with contextlib.suppress(DatabaseAwayError):  # what is left RUNNING then, a resume puts in its queue itself
            for planned in unfinished:
                self._study.interrupt(planned.number)
        self._running.clear()
        self._held.clear()
        return len(unfinished)

    def _is_over(self) -> bool:
        """Whether nothing is left to be started."""
        return self.why_ended is not None or len(self.records) >= self._target

    def _next(self) -> PlannedTrial | None:
        if self._ends(self._rules.budget_spent()):
            return None
        if self._waiting:
            planned = self._waiting.pop(0)
            self._study.take_up(planned.number)
            return planned
        if self._num_trials >= self._target:
            return None
        if self._ends(self._rules.settled(self.records.values(), self._space.objectives)):
            return None
        proposal = self._sampler.propose(self._study.study)
        if proposal is None:
            self.why_ended = "the search space holds no further policy that meets the constraints"
            return None
        self._num_trials += 1
        return self._study.add(proposal, self._space.search.seed + proposal.repeat)

    def _ends(self, ending: Ending | None) -> bool:
        """Notes why no further trial starts, where one of the rules says so."""
        if ending is not None:
            self.why_ended, self.resume_with = ending.why, ending.resume_with
        return ending is not None

    def _outcome(self, trial_id: str, number: int, result: Mapping[str, Any] | None, error: bool) -> Outcome:
        """How a trial ended, before its constraints are looked at."""
        last = self._last.pop(trial_id, Outcome("RUNNING"))
        if error:
            stacks = stacks_of_hung(self._folder.checkpoints(number))
            if stacks:
                limit = f"{self._space.search.epoch_timeout:g} s (search.epoch_timeout)"
                detail = "\n".join(stacks.splitlines()[:_STACK_LINES])
                return Outcome("FAIL", last.epochs, f"timeout: an epoch took longer than {limit}", detail)
            lines = [line.strip() for line in self.error_of(trial_id).splitlines() if line.strip()]
            told = lines[-1][:_REASON_LENGTH] if lines else "killed, or out of host memory"
            reason = f"worker_lost: its process ended twice without a result: {told}"
            return Outcome("FAIL", last.epochs, reason, "\n".join(lines[-_DETAIL_LINES:]))
        if result is None or "outcome" not in result:
            return Outcome("FAIL", last.epochs, "no_result: it reported nothing")
        outcome: Outcome = result["outcome"]
        if self.racing is not None and trial_id in self.racing.raced_out:
            return Outcome("PRUNED", outcome.epochs, self.racing.raced_out[trial_id])
        if outcome.state != "COMPLETE":
            return outcome
        missing = unmeasured(outcome.final, self._space.objectives)
        if missing:
            values = ", ".join(f"{name} is {outcome.final.get(name)}" for name in missing)
            return Outcome("FAIL", outcome.epochs, f"no_result: every objective must be a finite number, but {values}")
        return outcome

    def _check_storage(self, result: Mapping[str, Any] | None) -> None:
        """Ends the search where a worker could not write to the run's folder: no further one could."""
        outcome = (result or {}).get("outcome")
        if outcome is not None and (outcome.reason or "").startswith(f"{STORAGE}: "):
            told = f"{outcome.reason.removeprefix(f'{STORAGE}: ')}; nothing that ended is lost"
            raise SearchError(f"{told}: mend it, then go on by `rlsearch resume {self._folder.path}`")

    def _waits_for_baseline(self) -> bool:
        return any(c.relative for c in self._space.constraints) and any(
            planned.origin == BASELINE for planned in self._running.values()
        )

    def _close(self, planned: PlannedTrial, outcome: Outcome) -> None:
        """Writes the end of a trial: first the study, then what follows from it."""
        violations = self._violations(planned, outcome)
        broken = [name for name, violation in violations.items() if violation > 0]
        if broken and outcome.state == "COMPLETE":
            bounds = {constraint.metric: str(constraint) for constraint in self._space.constraints}
            told = ", ".join(f"{name} must be {bounds[name]}, is {outcome.final[name]:g}" for name in broken)
            outcome = Outcome("INFEASIBLE", outcome.epochs, f"{CONSTRAINT}: {told}", outcome.detail)
        if self.racing is not None:
            self.racing.learn(outcome.epochs, outcome.state)
        try:
            record = self._study.finish(planned.number, outcome, violations)
        except DatabaseAwayError:
            keep_outcome(self._folder.path, planned.number, outcome, violations)
            raise
        self.records[record.trial] = record
        records = [self.records[number] for number in sorted(self.records)]
        self._folder.write_trial(record, outcome.epochs, list(self._space.objectives))
        self._folder.write_trials(records)
        self._progress.trial_ended(record, records)
        self._check_failures(record)

    def _violations(self, planned: PlannedTrial, outcome: Outcome) -> dict[str, float]:
        """How far the measured values miss the constraints; empty where nothing was measured to the end."""
        if not outcome.has_values(self._space.objectives):
            return {}
        metrics = outcome.final
        reference = metrics if planned.origin == BASELINE else self._baseline_metrics()
        return {
            constraint.metric: constraint.violation(metrics[constraint.metric], reference.get(constraint.metric, 0.0))
            for constraint in self._space.constraints
            if not constraint.relative or constraint.metric in reference
        }

    def _baseline_metrics(self) -> Mapping[str, float]:
        """What the baseline measured; empty where it did not get to its end, and nothing can be relative to it."""
        baseline = next((record for record in self.records.values() if record.origin == BASELINE), None)
        if baseline is None or baseline.state not in ("COMPLETE", "INFEASIBLE"):
            return {}
        values = {c.metric: baseline.metric(c.metric) for c in self._space.constraints}
        return {name: value for name, value in values.items() if value is not None}

    def _check_failures(self, record: TrialRecord) -> None:
        """Ends a search whose trials keep failing: the cause is not the policies."""
        self._num_failed += has_failed(record)
        if self._num_failed > self._space.search.max_failures:
            raise SearchError(
                f"more than {self._space.search.max_failures} trials have failed (search.max_failures); "
                f"the last one: {record.reason}"
            )
