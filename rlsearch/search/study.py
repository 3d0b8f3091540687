"""The Optuna study of a run: the one source of truth about its trials.

It lies in the run's folder (``study.db``, SQLite), or in a PostgreSQL database, with its name in the folder
(``study.json``).

A trial is written twice. When it is proposed, one write puts down its parameters, policy, training, seed and exact
constraints, as RUNNING. When it ends, its outcome is written first, with the metrics of every epoch, and its state
after it: a process that is killed in between leaves a RUNNING trial that has an outcome, which `reconcile` closes.

A trial that an interruption cut short becomes WAITING, Optuna's word for "put in the queue". A resume takes it up again
under its own number, with the same policy and seed, so that numbers have no gaps, trial 0 stays the baseline, and
nothing is counted twice.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from rlsearch.errors import RlsearchError, RunFolderError
from rlsearch.policy import Policy
from rlsearch.results.tables import METRICS, TrialRecord
from rlsearch.search.database import PatientStorage, Told, unheard
from rlsearch.search.outcome import OUTCOME, Outcome
from rlsearch.search.postgresql import held
from rlsearch.search.sampler import Proposal
from rlsearch.search.study_digest import DIGEST, PLANNED, SPACE, check_content, digest_of
from rlsearch.search.study_file import new_storage, open_storage
from rlsearch.training.loop import TrainingSpec

_TARGET = "trials"
_STOPPING = "stopping"
_WARM_START = "warm_start"
# What Optuna lets through where a database holds what it has not written.
_UNREADABLE = (optuna.exceptions.OptunaError, SQLAlchemyError, RuntimeError, ValueError, LookupError, TypeError)
# Optuna's own prefix of a constraint among a trial's system attributes; `Trial.set_constraint` needs a live Trial.
_CONSTRAINT = "constraints:"
Ended = tuple[Outcome, Mapping[str, float]]
"""How a trial ended: its outcome, and how far measured values miss the constraints."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial that is to be trained.

    Attributes:
        number: in the study.
        policy: what is trained.
        training: how.
        seed: of the training.
        origin: who proposed it.
    """

    number: int
    policy: Policy
    training: TrainingSpec
    seed: int
    origin: str


class RunStudy:
    """The study of a run. One process at a time writes to it: the holder of the run folder's lock.

    Whatever is asked of it raises `rlsearch.search.database.DatabaseAwayError` where its database was locked or away
    for a minute.

    Attributes:
        study: as the sampler reads it.
        objectives: metric to direction, in the order of the study's values.
    """

    def __init__(self, storage: PatientStorage, study: optuna.Study, objectives: Mapping[str, str]) -> None:
        self._storage = storage
        self.study = study
        self.objectives = dict(objectives)
        self._study_id = storage.get_study_id_from_name(study.study_name)

    @classmethod
    def create(
        cls,
        path: Path,
        name: str,
        space: Mapping[str, Any],
        target: int,
        warm_start: Sequence[Mapping[str, Any]] = (),
    ) -> RunStudy:
        """A new study, whole or not there at all: one that was killed in the making could be neither begun nor resumed.

        Args:
            path: of the file, by a name of `rlsearch.search.study_file.STUDY_FILES`; it must not exist.
            name: the study's own name.
            space: the resolved search space.
            target: how many trials the search ends with.
            warm_start: what the search knows at its start.

        Raises:
            UserError: PostgreSQL cannot be reached.
        """
        _quiet()
        objectives: dict[str, Literal["minimize", "maximize"]] = space["objectives"]
        with new_storage(path, name) as storage:
            study = optuna.create_study(storage=storage, study_name=name, directions=[*objectives.values()])
            with warnings.catch_warnings():
                # It only names the values for a dashboard; Optuna has called it experimental since version 3.2.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(objectives))
            study.set_user_attr(DIGEST, digest_of(dict(space)))
            study.set_user_attr(SPACE, dict(space))
            study.set_user_attr(_WARM_START, [dict(row) for row in warm_start])
            study.set_user_attr(_TARGET, target)
        storage, _ = open_storage(path)
        return cls(storage, optuna.load_study(storage=storage, study_name=name), objectives)

    @classmethod
    def open(cls, path: Path, told: Told = unheard) -> RunStudy:
        """The study of an existing run.

        Args:
            path: of the file in the run's folder.
            told: hears what it waits for, where the database is locked or away.

        Raises:
            RunFolderError: the file is missing or damaged, or the study is.
            UserError: PostgreSQL cannot be reached.
        """
        _quiet()
        if not path.is_file():
            raise RunFolderError(f"{path}: is missing; restore it from a copy: without it nothing can be resumed")
        try:
            storage, name = open_storage(path, told)
            study = optuna.load_study(storage=storage, study_name=name)
            attributes = study.user_attrs
            if not {SPACE, _TARGET} <= set(attributes):
                remedy = "delete the folder and start the search again"
                raise RunFolderError(f"{path}: the search was stopped before it began; {remedy}")
            check_content(path, study)
        except RlsearchError:
            raise
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:300]
            raise RunFolderError(f"{path}: is no study of a run ({reason}); restore it from a copy") from None
        return cls(storage, study, attributes[SPACE]["objectives"])

    @property
    def space(self) -> dict[str, Any]:
        """The resolved search space that the study was made for."""
        space: dict[str, Any] = self.study.user_attrs[SPACE]
        return space

    @property
    def target(self) -> int:
        """How many trials the search ends with."""
        return int(self.study.user_attrs[_TARGET])

    @target.setter
    def target(self, value: int) -> None:
        self.study.set_user_attr(_TARGET, value)

    @property
    def stopping(self) -> dict[str, Any]:
        """What `rlsearch.search.stopping` keeps from session to session; empty at first."""
        return dict(self.study.user_attrs.get(_STOPPING, {}))

    @stopping.setter
    def stopping(self, value: Mapping[str, Any]) -> None:
        self.study.set_user_attr(_STOPPING, dict(value))

    @property
    def warm_start(self) -> list[dict[str, Any]]:
        """What the search knew at its start, as `rlsearch.search.warm_start` keeps it; empty for most searches."""
        known: list[dict[str, Any]] = self.study.user_attrs.get(_WARM_START, [])
        return known

    def held(self) -> AbstractContextManager[None]:
        """The right to write, where the folder's lock cannot show that another has it.

        Raises:
            RunFolderError: another process has it, and the message says which.
        """
        return held(self._storage, self._study_id)

    def on_wait(self, told: Told) -> None:
        """Has ``told`` called whenever the database begins to keep the search waiting."""
        self._storage.told = told

    def add(self, proposal: Proposal, seed: int) -> PlannedTrial:
        """Puts down a proposal as a RUNNING trial, in one write."""
        attributes = {
            "policy": proposal.policy.to_dict(),
            "policy_hash": proposal.policy.hash,
            "training": asdict(proposal.training),
            "origin": proposal.origin,
            "seed": seed,
        }
        attributes[DIGEST] = digest_of([attributes[name] for name in PLANNED])
        trial_id = self._storage.create_new_trial(self._study_id, proposal.to_trial(attributes))
        number = self._storage.get_trial_number_from_id(trial_id)
        return PlannedTrial(number, proposal.policy, proposal.training, seed, proposal.origin)

    def waiting(self) -> list[PlannedTrial]:
        """The trials that wait to be taken up again, by number."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return [_planned(trial) for trial in sorted(trials, key=lambda trial: trial.number)]

    def take_up(self, number: int) -> None:
        """Makes a WAITING trial RUNNING again."""
        self._storage.set_trial_state_values(self._trial_id(number), TrialState.RUNNING)

    def finish(self, number: int, outcome: Outcome, violations: Mapping[str, float]) -> TrialRecord:
        """Closes a trial for good: its outcome, its constraints, its state.

        Args:
            number: of the trial.
            outcome: COMPLETE and PRUNED need an epoch whose objectives are all finite.
            violations: metric to how far a measured value misses a constraint; at or below 0 it keeps it.
        """
        trial_id = self._trial_id(number)
        known = self._storage.get_trial_system_attrs(trial_id)
        for metric, violation in violations.items():
            if _CONSTRAINT + metric not in known:
                self._storage.set_trial_system_attr(trial_id, _CONSTRAINT + metric, violation)
        self._keep(trial_id, outcome)
        return self._close(trial_id, outcome)

    def interrupt(self, number: int) -> None:
        """Puts a RUNNING trial that was cut short into the queue of a later resume."""
        self._storage.set_trial_state_values(self._trial_id(number), TrialState.WAITING)

    def reconcile(self, kept: Mapping[int, Ended] | None = None) -> list[str]:
        """Settles what a killed process left RUNNING: closed where its outcome is known, else in the queue.

        Args:
            kept: outcomes, by number, that could not be written because the database was away.

        Returns:
            what was done, a line each.
        """
        done = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            ended = (kept or {}).get(trial.number)
            if ended is not None:
                self.finish(trial.number, *ended)
                done.append(f"trial {trial.number}: had ended while the database was away")
            elif OUTCOME in trial.user_attrs:
                record = self._close(trial._trial_id, Outcome.from_dict(trial.user_attrs[OUTCOME]))
                done.append(f"trial {trial.number}: had ended as {record.state}, and was not closed")
            else:
                self.interrupt(trial.number)
                done.append(f"trial {trial.number}: was left running; a resume takes it up again")
        return done

    def records(self) -> list[TrialRecord]:
        """All trials that have ended, by number."""
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        return [_record(trial) for trial in ended]

    def epochs(self, number: int) -> list[dict[str, Any]]:
        """The metrics of every epoch of a trial that has ended."""
        trial = self.study.get_trials(deepcopy=False)[number]
        return [dict(row) for row in Outcome.from_dict(trial.user_attrs[OUTCOME]).epochs]

    @property
    def num_trials(self) -> int:
        """All trials of the study, those that run or wait included."""
        return len(self.study.get_trials(deepcopy=False))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _keep(self, trial_id: int, outcome: Outcome) -> None:
        content = outcome.to_dict()
        self._storage.set_trial_user_attr(trial_id, OUTCOME, {**content, DIGEST: digest_of(content)})

    def _close(self, trial_id: int, outcome: Outcome) -> TrialRecord:
        state, values = TrialState.FAIL, None
        if outcome.state == "PRUNED":
            state = TrialState.PRUNED
        elif outcome.has_values(self.objectives):
            # One that broke a constraint is COMPLETE to Optuna: the sampler learns from its values.
            state, values = TrialState.COMPLETE, [float(outcome.final[name]) for name in self.objectives]
        self._storage.set_trial_state_values(trial_id, state, values)
        return _record(self._storage.get_trial(trial_id))


def _planned(trial: FrozenTrial) -> PlannedTrial:
    """What a trial that was put down is to train."""
    attributes = trial.user_attrs
    policy = Policy.from_dict(attributes["policy"], f"trial {trial.number} of the study")
    training = TrainingSpec(**attributes["training"])
    return PlannedTrial(trial.number, policy, training, attributes["seed"], attributes["origin"])


def _record(trial: FrozenTrial) -> TrialRecord:
    """The row of a trial that has ended."""
    attributes = trial.user_attrs
    outcome = Outcome.from_dict(attributes[OUTCOME])
    final = outcome.final
    return TrialRecord(
        trial=trial.number,
        state=outcome.state,
        policy=json.dumps(attributes["policy"], sort_keys=True),
        policy_hash=attributes["policy_hash"],
        seed=attributes["seed"],
        origin=attributes["origin"],
        reason=outcome.reason,
        training=json.dumps(attributes["training"], sort_keys=True),
        fidelity=final.get("epoch", 0),
        dropped_units=final.get("dropped_units"),
        step_memory=final.get("step_memory"),
        packed=final.get("packed"),
        device=final.get("device"),
        started=_with_zone(trial.datetime_start),
        ended=_with_zone(trial.datetime_complete),
        **{name: final.get(name) for name in METRICS},
    )


def _with_zone(moment: datetime | None) -> datetime | None:
    """Optuna keeps the local time without its zone."""
    return None if moment is None else moment.astimezone()


def _quiet() -> None:
    """Optuna announces every study that is made or loaded; the search has its own progress."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
