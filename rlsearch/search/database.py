"""The database that holds a study: SQLite in the run's folder, or a team's PostgreSQL; and waiting for it.

A database may be locked by a reader, restarted or out of reach for a while. Whatever is asked of it is tried again for
a minute; after that the search stops, and nothing that ended is lost.

PostgreSQL's address, user and password come from where its own programs take them, and from nowhere else: the
environment (PGHOST, PGPORT, PGUSER, PGDATABASE, PGPASSWORD or PGPASSFILE, PGSERVICE). No address that this program
makes holds a password, so that none can get into a file, a table or a process title.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import socket
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from rlsearch.errors import RlsearchError, RunFolderError, UserError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
STORAGES = (SQLITE, POSTGRESQL)

PATIENCE = 60.0
"""Seconds for which a database that does not answer is asked again."""

_POSTGRESQL_URL = "postgresql+psycopg://"
_TRY_SECONDS = 5
_PAUSE_SECONDS = 0.5
# Any number that nobody else locks: alone for the making of the tables, with a study's id for the study.
_LOCK = 0x726C7365
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

    @contextlib.contextmanager
    def held(self, study_id: int) -> Iterator[None]:
        """The right to write to a study of PostgreSQL, for as long as the block runs and the connection lasts.

        One of SQLite is its folder's, whose lock is enough; two copies of a folder name one study in PostgreSQL.

        Raises:
            RunFolderError: another process has it, and the message says which.
        """
        if self.engine.dialect.name != POSTGRESQL:
            yield
            return
        with self.patiently(self.engine.connect) as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()  # closed after the block, which ends the lock, and not given back to the pool
            lock = {"lock": _LOCK, "study": study_id}
            if not connection.scalar(text("SELECT pg_try_advisory_lock(:lock, :study)"), lock):
                raise RunFolderError(
                    f"the study in PostgreSQL at {postgresql_place()}: is in use by {_holder(connection, lock)}; wait "
                    "for it (copies of a run's folder share its study)"
                )
            yield

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


def open_sqlite(path: Path) -> PatientStorage:
    """The storage in a file; made where there is none."""
    return PatientStorage(f"sqlite:///{path.resolve()}", {"timeout": _TRY_SECONDS})


def open_postgresql() -> PatientStorage:
    """The storage in the database that the environment names; Optuna's tables are made where there are none.

    Raises:
        UserError: psycopg is missing, or the database does not let us in.
    """
    with _connection() as connection:
        # Two searches that begin at once would both make the tables, and one would fail.
        connection.execute(text(f"SELECT pg_advisory_lock({_LOCK})"))
        return PatientStorage(_POSTGRESQL_URL, _postgresql_arguments())


def look_at_postgresql() -> tuple[str, float]:
    """Version of the server that the environment names, and seconds that a query takes there and back (median of 9).

    Raises:
        UserError: as `open_postgresql`.
    """
    seconds = []
    with _connection() as connection:
        for _ in range(9):
            started = time.perf_counter()
            version = connection.scalar(text("SHOW server_version"))
            seconds.append(time.perf_counter() - started)
    return str(version), statistics.median(seconds)


@contextlib.contextmanager
def _connection() -> Iterator[Connection]:
    missing = missing_driver(POSTGRESQL)
    if missing is not None:
        raise UserError(f"search.storage: {missing}")
    engine = create_engine(_POSTGRESQL_URL, connect_args=_postgresql_arguments())
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        raise UserError(
            f"search.storage: PostgreSQL at {postgresql_place()} does not let us in "
            f"({' '.join(str(error.orig).split())}); its address and password come from the environment: set PGHOST, "
            "PGPORT, PGUSER, PGDATABASE, and PGPASSWORD or PGPASSFILE"
        ) from None
    finally:
        engine.dispose()


def _postgresql_arguments() -> dict[str, Any]:
    return {
        "connect_timeout": 10,
        # A network that swallows everything would otherwise hold a search for a quarter of an hour.
        "tcp_user_timeout": 30_000,
        # The server's keep-alives, of two hours, would hold the study of a machine that lost its power for as long.
        "options": f"-c lock_timeout={_TRY_SECONDS}s -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=10 "
        "-c tcp_keepalives_count=3",
        # What the database's keeper, and who finds a study in use, sees of a search.
        "application_name": f"rlsearch, process {os.getpid()} on {socket.gethostname()}"[:63],
    }


def _holder(connection: Connection, lock: dict[str, int]) -> str:
    """The process that has a study's lock, as far as PostgreSQL tells."""
    query = (
        "SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) "
        "WHERE locktype = 'advisory' AND classid = :lock AND objid = :study AND granted"
    )
    return connection.scalar(text(query), lock) or "another process"


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
