"""A team's database of studies: which one it is, who may write to a study, and what can be said of it.

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
from collections.abc import Iterator
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from rlsearch.errors import RunFolderError, UserError
from rlsearch.search.database import POSTGRESQL, TRY_SECONDS, PatientStorage, Told, patiently, unheard

_URL = "postgresql+psycopg://"
# Any number that nobody else locks: alone for the making of the tables, with a study's id for the study.
_LOCK = 0x726C7365
# What clients and servers say while a server is restarted; a wrong password stays wrong.
_MAY_COME_BACK = ("Connection refused", "starting up", "shutting down", "not yet accepting", "in recovery")


class ServerAwayError(UserError):
    """The server that the environment names is not there, or only starts."""


def open_postgresql(told: Told = unheard, patience: float = 0.0) -> PatientStorage:
    """The storage in the database that the environment names; Optuna's tables are made where there are none.

    Args:
        told: hears what it waits for, also of the storage that it returns.
        patience: seconds for which a server that is only starting, or not there, is asked again.

    Raises:
        UserError: psycopg is missing, or the database does not let us in.
    """
    return patiently(functools.partial(_open, told), told, patience, away=ServerAwayError)


@contextlib.contextmanager
def held(storage: PatientStorage, study_id: int) -> Iterator[None]:
    """The right to write to a study, for as long as the block runs and the connection lasts.

    One of SQLite is its folder's, whose lock is enough; two copies of a folder name one study in PostgreSQL.

    Raises:
        RunFolderError: another process has it, and the message says which.
    """
    if storage.engine.dialect.name != POSTGRESQL:
        yield
        return
    with storage.patiently(storage.engine.connect) as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # closed after the block, which ends the lock, and not given back to the pool
        lock = {"lock": _LOCK, "study": study_id}
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:lock, :study)"), lock):
            raise RunFolderError(
                f"the study in PostgreSQL at {postgresql_place()}: is in use by {_holder(connection, lock)}; wait "
                "for it (copies of a run's folder share its study)"
            )
        yield


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


def _open(told: Told) -> PatientStorage:
    with _connection() as connection:
        # Two searches that begin at once would both make the tables, and one would fail.
        connection.execute(text(f"SELECT pg_advisory_lock({_LOCK})"))
        return PatientStorage(_URL, _arguments(), told)


@contextlib.contextmanager
def _connection() -> Iterator[Connection]:
    missing = missing_driver(POSTGRESQL)
    if missing is not None:
        raise UserError(f"search.storage: {missing}")
    engine = create_engine(_URL, connect_args=_arguments())
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        kind = ServerAwayError if any(sign in reason for sign in _MAY_COME_BACK) else UserError
        raise kind(
            f"search.storage: PostgreSQL at {postgresql_place()} does not let us in ({reason}); its address and "
            "password come from the environment: set PGHOST, PGPORT, PGUSER, PGDATABASE, and PGPASSWORD or PGPASSFILE"
        ) from None
    finally:
        engine.dispose()


def _arguments() -> dict[str, Any]:
    return {
        "connect_timeout": 10,
        # A network that swallows everything would otherwise hold a search for a quarter of an hour.
        "tcp_user_timeout": 30_000,
        # The server's keep-alives, of two hours, would hold the study of a machine that lost its power for as long.
        "options": f"-c lock_timeout={TRY_SECONDS}s -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=10 "
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
