"""The file of a run's folder that holds its study, or says which one of PostgreSQL it is."""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna

from rlsearch.errors import RunFolderError
from rlsearch.files import replacing, write_atomic
from rlsearch.search.database import (
    PATIENCE,
    POSTGRESQL,
    SQLITE,
    TRY_SECONDS,
    DatabaseAwayError,
    PatientStorage,
    Told,
    open_sqlite,
    patiently,
    unheard,
)
from rlsearch.search.postgresql import open_postgresql, postgresql_place

STUDY_FILES = {SQLITE: "study.db", POSTGRESQL: "study.json"}
"""Storage to the name of its file in a run's folder."""


@contextlib.contextmanager
def new_storage(path: Path, name: str) -> Iterator[PatientStorage]:
    """Where a study is made: its file is there, whole, once the block has ended well.

    Args:
        path: of the file; it must not exist.
        name: of the study.

    Raises:
        UserError: PostgreSQL cannot be reached.
    """
    if path.name == STUDY_FILES[POSTGRESQL]:
        yield open_postgresql()  # a study that no folder names, because of a kill right here, is in nobody's way
        write_atomic(path, (json.dumps({"storage": POSTGRESQL, "study": name}) + "\n").encode())
        return
    with replacing(path) as temporary:
        storage = open_sqlite(temporary)
        yield storage
        storage.remove_session()
        storage.engine.dispose()


def open_storage(path: Path, told: Told = unheard) -> tuple[PatientStorage, str]:
    """The storage of an existing run's study, and the study's name.

    Args:
        path: of the file in the run's folder.
        told: hears what it waits for, also of the storage that it returns.

    Raises:
        RunFolderError: the file is damaged, or names no study that there is.
        UserError: PostgreSQL cannot be reached.
    """
    if path.name != STUDY_FILES[POSTGRESQL]:
        patiently(functools.partial(_check_intact, path), told, PATIENCE)
        storage = open_sqlite(path, told)
        names = optuna.get_all_study_names(storage)
        if len(names) != 1:
            raise RunFolderError(f"{path}: must hold one study, has {len(names)}; restore it from a copy")
        return storage, names[0]
    content = json.loads(path.read_text(encoding="utf-8"))
    name = content.get("study") if isinstance(content, dict) and content.get("storage") == POSTGRESQL else None
    if not isinstance(name, str):
        raise RunFolderError(f"{path}: must name a study in PostgreSQL; restore it from a copy")
    storage = open_postgresql(told, PATIENCE)
    if name not in optuna.get_all_study_names(storage):
        raise RunFolderError(
            f"{path}: PostgreSQL at {postgresql_place()} has no study {name}; point PGHOST, PGPORT and PGDATABASE to "
            "the database that the search was started with"
        )
    return storage, name


def _check_intact(path: Path) -> None:
    """SQLite's own check of the whole file: a torn study must be named, never half read.

    Raises:
        DatabaseAwayError: another process has locked it.
        RunFolderError: it is torn.
    """
    try:
        connection = sqlite3.connect(f"file:{path.resolve()}?mode=rw", uri=True, timeout=TRY_SECONDS)
        try:
            (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        if "locked" in (verdict := str(error)):
            raise DatabaseAwayError(f"{path}: {verdict}") from error
    if verdict != "ok":
        raise RunFolderError(f"{path}: is damaged ({verdict}); restore it from a copy")
