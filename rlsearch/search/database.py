"""The database that holds a study: SQLite in the run's folder, or a team's PostgreSQL; and waiting for it.

A database may be locked by a reader, restarted or out of reach for a while. Whatever is asked of it is tried again for
a minute; after that the search stops, and nothing that ended is lost.

PostgreSQL's address, user and password come from where its own programs take them, and from nowhere else: the
environment (PGHOST, PGPORT, PGUSER, PGDATABASE, PGPASSWORD or PGPASSFILE, PGSERVICE). No address that this program
makes holds a password, so that none can get into a file, a table or a process title.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from rlsearch.errors import RlsearchError, UserError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
STORAGES = (SQLITE, POSTGRESQL)

PATIENCE = 60.0
"""Seconds for which a database that does not answer is asked again."""

_POSTGRESQL_URL = "postgresql+psycopg://"
_TRY_SECONDS = 5
_PAUSE_SECONDS = 0.5
# Any number that nobody else locks.
_TABLES_LOCK = 0x726C7365
_POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 10,
    # A network that swallows everything would otherwise hold a search for a quarter of an hour.
    "tcp_user_timeout": 30_000,
    "options": f"-c lock_timeout={_TRY_SECONDS}s",
    "application_name": "rlsearch",
}
Result = TypeVar("Result")


class DatabaseAwayError(RlsearchError):
    """The database is locked, or does not answer."""


class PatientStorage(RDBStorage):
    """Optuna's storage, which asks again where the database is locked or away.

    Attributes:
        told: hears once, when it begins to wait, why.
        patience: seconds for which one call goes on asking; 0 once it was in vain.
    """

    def __init__(self, url: str, arguments: dict[str, Any]) -> None:
        self.told: Callable[[str], None] = lambda reason: None
        self.patience = 0.0
        super().__init__(url, {"connect_args": arguments, "pool_pre_ping": True})
        event.listen(self.engine, "handle_error", _tell_away)
        weakref.finalize(self, self.engine.dispose)  # connections are closed with whatever uses the study

    def patiently(self, ask: Callable[[], Result]) -> Result:
        """What ``ask`` returns, asked again for as long as the patience lasts.

        Raises:
            DatabaseAwayError: it was in vain.
        """
        started = time.monotonic()
        is_told = False
        while True:
            try:
                return ask()
            except DatabaseAwayError as error:
                if time.monotonic() - started >= self.patience:
                    self.patience = 0.0
                    raise
                if not is_told:
                    self.told(str(error))
                    is_told = True
                time.sleep(_PAUSE_SECONDS)

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
    error = context.original_exception
    reason = " ".join(str(error).split())
    if context.engine is not None and context.engine.dialect.name == SQLITE:
        is_away = "locked" in reason or "busy" in reason
    else:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # psycopg may not be installed
        is_away = not kinds.isdisjoint({"OperationalError", "InterfaceError"})
    if is_away:
        raise DatabaseAwayError(reason) from error


def open_sqlite(path: Path) -> PatientStorage:
    """The storage in a file; made where there is none."""
    return PatientStorage(f"sqlite:///{path.resolve()}", {"timeout": _TRY_SECONDS})


def open_postgresql() -> PatientStorage:
    """The storage in the database that the environment names; Optuna's tables are made where there are none.

    Raises:
        UserError: psycopg is missing, or the database does not let us in.
    """
    missing = missing_driver(POSTGRESQL)
    if missing is not None:
        raise UserError(f"search.storage: {missing}")
    engine = create_engine(_POSTGRESQL_URL, connect_args=_POSTGRESQL_ARGUMENTS)
    try:
        with engine.connect() as connection:
            # Two searches that begin at once would both make the tables, and one would fail.
            connection.execute(text(f"SELECT pg_advisory_lock({_TABLES_LOCK})"))
            return PatientStorage(_POSTGRESQL_URL, _POSTGRESQL_ARGUMENTS)
    except DBAPIError as error:
        raise UserError(
            f"search.storage: PostgreSQL at {postgresql_place()} does not let us in "
            f"({' '.join(str(error.orig).split())}); its address and password come from the environment: set PGHOST, "
            "PGPORT, PGUSER, PGDATABASE, and PGPASSWORD or PGPASSFILE"
        ) from None
    finally:
        engine.dispose()


def missing_driver(storage: str) -> str | None:
    """What is missing on this machine to speak to a storage; None where nothing is."""
    if storage != POSTGRESQL or importlib.util.find_spec("psycopg") is not None:
        return None
    return "postgresql needs psycopg: pip install 'psycopg[binary]>=3.2'"


def check_storage(storage: str) -> None:
    """Whether a new study can be made in a storage of `STORAGES`.

    Raises:
        UserError: PostgreSQL does not let us in.
    """
    if storage == POSTGRESQL:
        open_postgresql().engine.dispose()


def postgresql_place() -> str:
    """The database that the environment names, for people."""
    host, port = os.environ.get("PGHOST", "the local socket"), os.environ.get("PGPORT", "5432")
    service = os.environ.get("PGSERVICE")
    return f"service {service}" if service else f"{host}:{port}/{os.environ.get('PGDATABASE', '')}".rstrip("/")
