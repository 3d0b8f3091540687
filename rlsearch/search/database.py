"""The database that holds a study, and waiting for it.

A database may be locked by a reader, restarted or out of reach for a while. Whatever is asked of it is tried again for
a minute; after that the search stops, and nothing that ended is lost.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from rlsearch.errors import RlsearchError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
STORAGES = (SQLITE, POSTGRESQL)

PATIENCE = 60.0
"""Seconds for which a database that does not answer is asked again."""

TRY_SECONDS = 5
"""Seconds for which one statement waits for a lock of another's."""

PAUSE_SECONDS = 0.5
"""Seconds between two tries."""

Result = TypeVar("Result")

Told = Callable[[str], None]
"""Hears, on one line, what keeps a search waiting."""


class DatabaseAwayError(RlsearchError):
    """The database is locked, or does not answer."""


def unheard(text: str) -> None:
    """For who does not want to be told."""


def patiently(
    ask: Callable[[], Result], told: Told, patience: float, away: type[Exception] = DatabaseAwayError
) -> Result:
    """What ``ask`` returns, asked again for as long as the patience lasts.

    Args:
        ask: asks a database.
        told: hears once, when the waiting begins, why.
        patience: seconds.
        away: what ``ask`` raises where it may be asked again; raised where it was in vain.
    """
    started = time.monotonic()
    is_told = False
    while True:
        try:
            return ask()
        except away as error:
            if time.monotonic() - started >= patience:
                raise
            if not is_told:
                told(f"waiting for the study's database, a minute at most: {error}")
                is_told = True
            time.sleep(PAUSE_SECONDS)


class PatientStorage(RDBStorage):
    """Optuna's storage, which asks again where the database is locked or away.

    Attributes:
        told: hears once, when it begins to wait, why.
        patience: seconds for which one call goes on asking; 0 once it was in vain.
    """

    def __init__(self, url: str, arguments: dict[str, Any], told: Told) -> None:
        self.told = told
        self.patience = PATIENCE
        self.patiently(functools.partial(self._open, url, arguments))
        event.listen(self.engine, "handle_error", _tell_away)
        weakref.finalize(self, self.engine.dispose)  # connections are closed with whatever uses the study

    def _open(self, url: str, arguments: dict[str, Any]) -> None:
        """Optuna's own beginning, which looks for its tables and makes those that are missing."""
        try:
            super().__init__(url, {"connect_args": arguments, "pool_pre_ping": True})
        except (SQLAlchemyError, OptunaError) as error:
            self.engine.dispose()
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, DBAPIError):
                cause = cause.__cause__
            reason = None if cause is None else _why_away(self.engine.dialect.name, cause.orig)
            if reason is None:
                raise
            raise DatabaseAwayError(reason) from error

    def patiently(self, ask: Callable[[], Result]) -> Result:
        """What ``ask`` returns, asked again for as long as the patience lasts.

        Raises:
            DatabaseAwayError: it was in vain.
        """
        try:
            return patiently(ask, self.told, self.patience)
        except DatabaseAwayError:
            self.patience = 0.0
            raise

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """As Optuna's, but a trial whose creation was done, and only not confirmed, is not created twice."""
        is_again = False

        def create() -> FrozenTrial:
            nonlocal is_again
            if is_again and template_trial is not None:
                trials = RDBStorage.get_all_trials(self, study_id, deepcopy=False, states=(TrialState.RUNNING,))
                done = next((trial for trial in trials if trial.user_attrs == template_trial.user_attrs), None)
                if done is not None:
                    return done
            is_again = True
            return super(PatientStorage, self)._create_new_trial(study_id, template_trial)

        return self.patiently(create)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; one that was done, and only not confirmed, is no error."""
        is_again = False

        def write() -> bool:
            nonlocal is_again
            if is_again and state.is_finished() and RDBStorage.get_trial(self, trial_id).state == state:
                return True
            is_again = True
            return super(PatientStorage, self).set_trial_state_values(trial_id, state, values)

        return self.patiently(write)


def _patient(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def wrapped(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patiently(functools.partial(method, self, *args, **kwargs))

    return wrapped


# What a study asks, by itself and by Optuna's cache in front of it. Writing one of these twice changes nothing.
for _name in (
    "get_all_studies",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "_get_trials",
    "set_trial_user_attr",
    "set_trial_system_attr",
):
    setattr(PatientStorage, _name, _patient(_name))


def _tell_away(context: ExceptionContext) -> None:
    """Has errors of a database that may come back raised as such: Optuna would call them invalid data."""
    if context.is_pre_ping:
        return  # an old connection that is dead gets a new one
    error = context.original_exception
    reason = _why_away("" if context.engine is None else context.engine.dialect.name, error)
    if reason is not None:
        raise DatabaseAwayError(reason) from error


def _why_away(dialect: str, error: BaseException | None) -> str | None:
    """What a database's driver said, on one line, where it may come back; None where that would not help."""
    reason = " ".join(str(error).split())
    if dialect == SQLITE:
        return reason if "locked" in reason or "busy" in reason else None
    kinds = {kind.__name__ for kind in type(error).__mro__}  # psycopg may not be installed
    return None if kinds.isdisjoint({"OperationalError", "InterfaceError"}) else reason


def open_sqlite(path: Path, told: Told = unheard) -> PatientStorage:
    """The storage in a file; made where there is none."""
    return PatientStorage(f"sqlite:///{path.resolve()}", {"timeout": TRY_SECONDS}, told)
