"""Databases that are locked, restarted or gone: real SQLite files, a real PostgreSQL server on loopback."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from driven_search import Search, content
from postgresql import Proxy, Server, running_server

from rlsearch.errors import ConfigError, RunFolderError, UserError
from rlsearch.results.tables import read_trials
from rlsearch.search import database, postgresql, study_file
from rlsearch.search.database import DatabaseAwayError
from rlsearch.search.postgresql import check_storage
from rlsearch.search.prepare import Prepared, prepare
from rlsearch.search.repair import repair_run
from rlsearch.search.run import resume_search
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.searcher import StopSearch
from rlsearch.search.space import parse_space
from rlsearch.search.study import RunStudy
from rlsearch.search.unsaved import settle

Away = Callable[[], Callable[[], object]]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(parse_space(content()))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def team(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server that runs, and an environment that names it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    if not server.is_running():
        server.start()
    return server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds in place of a minute."""
    monkeypatch.setattr(database, "PATIENCE", 2.0)
    monkeypatch.setattr(study_file, "PATIENCE", 2.0)
    for module in (database, study_file):
        monkeypatch.setattr(module, "TRY_SECONDS", 0.2)
    monkeypatch.setattr(postgresql, "TRY_SECONDS", 0.2)


@pytest.fixture(params=["sqlite", "postgresql"])
def search(request: pytest.FixtureRequest, tmp_path: Path, prepared: Prepared, impatient: None) -> Search:
    if request.param == "postgresql":
        request.getfixturevalue("team")
    return Search(tmp_path / "run", prepared, storage=request.param)


@pytest.fixture
def away(request: pytest.FixtureRequest, search: Search) -> Away:
    """Has the search's database answer nobody, and returns what brings it back."""

    def go() -> Callable[[], object]:
        if search.folder.study_path.suffix == ".json":
            server = request.getfixturevalue("team")
            server.stop()
            return server.start
        other = sqlite3.connect(search.folder.study_path)
        other.execute("BEGIN EXCLUSIVE")
        return other.close

    return go


def after(seconds: float, act: Callable[[], object]) -> threading.Thread:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_a_search_is_written_and_resumed_alike(search: Search, prepared: Prepared) -> None:
    for number in range(8):
        search.start(str(number))
        if number == 5:
            search = Search(search.folder.path, prepared)  # as after a kill
            assert search.start("again") == 5
            search.end("again", accuracy=0.55)
        else:
            search.end(str(number), accuracy=0.5 + number / 100)
    assert search.states() == ["COMPLETE"] * 8
    records = read_trials(search.folder.trials_path)
    assert [record.accuracy for record in records] == pytest.approx([0.5 + n / 100 for n in range(8)])
    assert RunStudy.open(search.folder.study_path).records() == records


def test_what_locks_the_file_for_a_while_is_waited_for(tmp_path: Path, prepared: Prepared, impatient: None) -> None:
    search, told = Search(tmp_path / "run", prepared), list[str]()
    search.study.on_wait(told.append)
    search.start("a")
    other = sqlite3.connect(search.folder.study_path, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    timer = after(1.0, other.rollback)
    search.end("a")
    timer.join()
    other.close()
    assert search.states() == ["COMPLETE"]
    assert len(told) >= 1
    assert "locked" in told[0]


@pytest.mark.parametrize("is_for_good", [False, True])
@pytest.mark.parametrize("moment", ["the check", "right after it"])
def test_a_file_that_is_locked_when_a_resume_opens_it_is_waited_for(
    tmp_path: Path,
    prepared: Prepared,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    is_for_good: bool,
) -> None:
    search, told = Search(tmp_path / "run", prepared), list[str]()
    search.start("a")
    if moment == "right after it":
        monkeypatch.setattr(study_file, "_check_intact", lambda path: None)
    other = sqlite3.connect(search.folder.study_path, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    if is_for_good:
        with pytest.raises(DatabaseAwayError, match="locked"):
            RunStudy.open(search.folder.study_path, told.append)
        assert time.monotonic() - started >= database.PATIENCE
    else:
        timer = after(1.0, other.rollback)
        assert RunStudy.open(search.folder.study_path, told.append).num_trials == 1
        assert time.monotonic() - started >= 1
        timer.join()
    other.close()
    assert len(told) == 1
    assert re.fullmatch("waiting for the study's database, a minute at most: .*locked.*", told[0])


def test_a_server_that_is_restarted_when_a_resume_opens_its_study_is_waited_for(
    team: Server, tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_file, "PATIENCE", 3.0)
    file = Search(tmp_path / "run", prepared, storage="postgresql").folder.study_path
    with monkeypatch.context() as patch:
        patch.setenv("PGPASSWORD", "wrong")
        started = time.monotonic()
        with pytest.raises(UserError, match="authentication failed"):
            RunStudy.open(file)
        assert time.monotonic() - started < 2
    team.stop()
    started = time.monotonic()
    with pytest.raises(UserError, match="does not let us in"):
        RunStudy.open(file)
    assert time.monotonic() - started >= 3
    timer, told = after(1.0, team.start), list[str]()
    assert RunStudy.open(file, told.append).num_trials == 0
    timer.join()
    assert len(told) == 1
    assert "waiting for the study's database, a minute at most: search.storage: PostgreSQL at" in told[0]


@pytest.mark.parametrize("moment", ["a proposal", "an end"])
def test_a_server_that_is_restarted_is_waited_for(
    team: Server, tmp_path: Path, prepared: Prepared, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 30.0)
    search, told = Search(tmp_path / "run", prepared, storage="postgresql"), list[str]()
    search.study.on_wait(told.append)
    for number in range(8):
        if number == 5 and moment == "a proposal":
            team.stop()
            timer = after(1.0, team.start)
        search.start(str(number))
        if number == 5 and moment == "an end":
            team.stop()
            timer = after(1.0, team.start)
        search.end(str(number))
    timer.join()
    assert search.states() == ["COMPLETE"] * 8
    assert len(told) == 1


def test_what_ends_while_the_database_is_away_for_good_is_kept(search: Search, prepared: Prepared, away: Away) -> None:
    for trial_id in "abc":
        search.start(trial_id)
    search.end("a", accuracy=0.7)
    back = away()
    started = time.monotonic()
    with pytest.raises(StopSearch) as stopped:
        search.end("b", accuracy=0.6)
    assert isinstance(stopped.value.cause, DatabaseAwayError)
    assert search.searcher.release() == 1  # the third one, which still runs
    assert time.monotonic() - started < 15
    back()
    assert settle(RunStudy.open(search.folder.study_path), search.folder.path) == [
        "trial 1: had ended while the database was away",
        "trial 2: was left running; a resume takes it up again",
    ]
    again = Search(search.folder.path, prepared)
    assert [record.accuracy for record in again.study.records()] == [0.7, 0.6]
    assert not (search.folder.path / "unsaved").exists()
    assert again.start("d") == 2


def test_an_outcome_that_was_kept_and_damaged_is_told_and_trained_again(search: Search, away: Away) -> None:
    search.start("a")
    back = away()
    with pytest.raises(StopSearch):
        search.end("a", accuracy=0.6)
    back()
    file = search.folder.path / "unsaved" / "trial-00000.json"
    file.write_text(file.read_text().replace("0.6", "0.9"))
    lines = settle(RunStudy.open(search.folder.study_path), search.folder.path)
    assert lines == [
        "unsaved/trial-00000.json: is damaged, and was left aside: its trial is taken up again",
        "trial 0: was left running; a resume takes it up again",
    ]


def test_work_that_was_done_and_not_confirmed_is_not_done_twice(
    team: Server, tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(team.port)
    threading.Thread(target=proxy.serve, daemon=True).start()
    monkeypatch.setenv("PGPORT", str(proxy.port))
    search = Search(tmp_path / "run", prepared, storage="postgresql")
    for number in range(8):
        if number % 2:
            proxy.cut_after = b"INSERT INTO trials"
        search.start(str(number))
        assert proxy.cut_after is None
        if number % 3:
            proxy.cut_after = b"UPDATE trials"
        search.end(str(number))
        assert proxy.cut_after is None
    proxy.close()
    assert search.states() == ["COMPLETE"] * 8
    assert [record.trial for record in search.study.records()] == list(range(8))


def test_copies_of_a_folder_do_not_write_to_their_study_at_once(
    team: Server, tmp_path: Path, prepared: Prepared
) -> None:
    search = Search(tmp_path / "run", prepared, storage="postgresql")
    other = Search(tmp_path / "other", prepared, storage="postgresql")
    shutil.copytree(search.folder.path, tmp_path / "copy")
    copied = RunStudy.open(RunFolder(tmp_path / "copy").study_path)
    holder = re.escape(f"is in use by rlsearch, process {os.getpid()} on {socket.gethostname()}; wait for it")
    with search.study.held():
        with other.study.held():
            pass
        with pytest.raises(RunFolderError, match=holder), copied.held():
            raise AssertionError
        for command in (resume_search, repair_run):
            with pytest.raises(RunFolderError, match=holder):
                command(tmp_path / "copy")
        team.stop()  # which ends the lock, and is no error where nothing is asked
    team.start()
    with copied.held():
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"storage": "postgresql"}', '{"storage": 1, "study": 2}'])
def test_a_damaged_name_of_a_study_is_told(team: Server, tmp_path: Path, prepared: Prepared, content: str) -> None:
    file = Search(tmp_path / "run", prepared, storage="postgresql").folder.study_path
    file.write_text(content)
    with pytest.raises(RunFolderError, match="restore it from a copy"):
        RunStudy.open(file)


def test_a_team_has_its_searches_side_by_side_and_tables_are_made_once(
    team: Server, tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(autocommit=True) as connection:
        connection.execute("CREATE DATABASE fresh")
    monkeypatch.setenv("PGDATABASE", "fresh")
    with ThreadPoolExecutor(4) as pool:
        searches = list(pool.map(lambda n: Search(tmp_path / f"run-{n}", prepared, storage="postgresql"), range(4)))
    for number, search in enumerate(searches):
        search.start("a")
        search.end("a", accuracy=0.5 + number / 10)
    for number, search in enumerate(searches):
        (record,) = RunStudy.open(search.folder.study_path).records()
        assert (record.trial, record.accuracy) == (0, 0.5 + number / 10)


def test_who_is_not_let_in_is_told_before_anything_is_written_and_no_password_is(
    team: Server, tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(tmp_path / "run", prepared, storage="postgresql")
    monkeypatch.setenv("PGPASSWORD", "canary-that-is-wrong")
    for ask in (lambda: check_storage("postgresql"), lambda: RunStudy.open(search.folder.study_path)):
        with pytest.raises(UserError, match=r"does not let us in .*password authentication failed.*set PGHOST") as told:
            ask()
        assert "canary" not in str(told.value)
    monkeypatch.setenv("PGPORT", "1")
    with pytest.raises(UserError, match=r"PostgreSQL at 127.0.0.1:1/postgres does not let us in .*refused"):
        check_storage("postgresql")


def test_another_database_than_that_of_the_run_is_told(team: Server, tmp_path: Path, prepared: Prepared) -> None:
    search = Search(tmp_path / "run", prepared, storage="postgresql")
    file = search.folder.study_path
    file.write_text(file.read_text().replace('"study": "run', '"study": "other'))
    with pytest.raises(RunFolderError, match=r"has no study other.*; point PGHOST, PGPORT and PGDATABASE"):
        RunStudy.open(file)
    for damaged in ("", "[]", '{"storage": "sqlite", "study": "run"}', '{"storage": "postgresql", "study": 3}'):
        file.write_text(damaged)
        with pytest.raises(RunFolderError, match="restore it from a copy"):
            RunStudy.open(file)


def test_an_unknown_storage_is_told() -> None:
    with pytest.raises(ConfigError, match=r"search.storage: must be one of sqlite, postgresql, got mysql"):
        parse_space(content(search={"storage": "mysql"}))
