"""A PostgreSQL server of one's own on loopback, of the system's package; the password is a word that is looked for."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PASSWORD = "canary-of-the-database"
USER = "searcher"


class Server:
    """A running server.

    Attributes:
        environment: what its clients need.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        # It refuses to run for root, and so do containers that have nobody else.
        self._user = "postgres" if getpass.getuser() == "root" else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": USER,
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": "postgres",
        }
        if self._user is not None:
            shutil.chown(folder, self._user)
        word = folder / "word"
        word.write_text(PASSWORD)
        self._run("initdb", "--username", USER, "--auth=scram-sha-256", "--pwfile", str(word), "--no-sync")
        word.unlink()

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "--wait", "--log", str(self._folder / "log"), "--options", options, "start")

    def stop(self) -> None:
        """As a crash does: connections end at once, and what was not committed is gone."""
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

    def is_running(self) -> bool:
        return (self._folder / "data" / "postmaster.pid").exists()

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, "--pgdata", str(self._folder / "data"), *arguments],
            user=self._user,
            extra_groups=None if self._user is None else [],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            check=True,
        )


@contextmanager
def running_server() -> Iterator[Server]:
    """A server of its own, gone afterwards; skips the test where PostgreSQL is not installed."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="rlsearch-pg-", dir="/tmp"))
    server = Server(programs, folder)
    try:
        server.start()
        yield server
    finally:
        if server.is_running():
            server.stop()
        shutil.rmtree(folder)


def find_programs() -> Path | None:
    """Where ``initdb`` lies; Debian puts it into no search path."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


class Proxy:
    """Stands between clients and a server, and can cut a connection right behind a COMMIT that it passed on.

    A database that is restarted at the wrong moment does that: the work is done, and nobody is told.

    Attributes:
        cut_after: the beginning of a statement; the COMMIT of the next one like it is never confirmed. None for none.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_after: bytes | None = None

    def serve(self) -> None:
        """Passes on what comes, to the end of the test."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server))
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            threading.Thread(target=_answer, args=(server, client), daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        is_near = False
        with client, server:
            while content := _received(client):
                is_near |= self.cut_after is not None and self.cut_after in content
                if is_near and b"COMMIT" in content:
                    self.cut_after = None
                    client.shutdown(socket.SHUT_RDWR)  # before the answer can come
                    server.sendall(content)
                    time.sleep(0.2)  # until it is done
                    return
                server.sendall(content)


def _answer(server: socket.socket, client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := _received(server):
            client.sendall(content)


def _received(source: socket.socket) -> bytes:
    """What came; empty where the other side is gone."""
    try:
        return source.recv(65536)
    except OSError:
        return b""
