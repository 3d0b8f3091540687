"""What a search leaves and shows while it runs: no secret of its environment, and no door for others.

One real search by the command line, with a training that fails and a process that is killed, so that error texts are
written too. Everything that it writes is kept by a second name from the moment it appears, Ray's logs among it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlsearch.cli.doctor_ray import is_loopback, listening
from rlsearch.results.tables import read_run
from rlsearch.search.cluster_access import wants_token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

PROJECT = Path(__file__).resolve().parents[1]
CANARY = f"canary-{os.urandom(8).hex()}"
SECRETS = {
    "PGPASSWORD": CANARY,
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "HF_TOKEN": f"hf_{CANARY}",
    "DATABASE_URL": f"postgresql://searcher:{CANARY}@db.example/study",
    "RAY_AUTH_TOKEN": CANARY * 2,
    "RAY_ADDRESS": f"ray://someone:{CANARY}@127.0.0.1:1",
}
MODELS = """
import os, signal, sys
from pathlib import Path
import torch
from rlsearch import build_model

def make(num_classes):
    model = build_model("resnet20", num_classes)
    if torch.empty(0).device.type == "meta" or "worker" not in sys.argv[0]:
        return model  # it is only looked at
    for number in range(100):
        try:
            Path(f"built {number}").touch(exist_ok=False)
            break
        except FileExistsError:
            continue
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        raise RuntimeError("a planned failure")
    return model
"""
SPACE = """
model: {name: "own_models:make"}
data: {name: digits, limit: 100}
training: {epochs: 1, batch_size: 32}
space: {replacement: {units: "layer*", blocks: [skip, scalar], max_fraction: 0.5}}
search: {trials: 3, baseline_seeds: 1, max_concurrent: 1}
resources: {cpu: 1, gpu: 0}
"""
AFTERWARDS = """
import sys
from rlsearch.cli import main
run = sys.argv[1]
for words in (["pareto", run, "--json"], ["report", run], ["repair", run], ["doctor"],
              ["export", run, "--model", "own_models:make", "--out", run + "-out"]):
    sys.argv = ["rlsearch", *words]
    try:
        main()
    except SystemExit as end:
        print(words[0], "ended with", end.code)
"""


@dataclass
class Seen:
    """What was seen of a search.

    Attributes:
        run: its folder.
        printed: by all commands.
        titles: of its processes.
        hosts: the addresses on which they listened.
        tokens: whether Ray wanted a token when it was asked.
        planted: whether a checkpoint that runs code lies where trial 1 looks for its own.
    """

    run: Path
    places: tuple[Path, ...]
    printed: str = ""
    titles: set[bytes] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    tokens: set[bool | None] = field(default_factory=set)
    planted: bool = False


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._path), "w")


def watch(session: int, seen: Seen, temporary: Path, kept: Path, stop: threading.Event) -> None:
    """Looks at the processes of a session, and keeps what they write by a second name, until told to stop."""
    names: set[str] = set()
    planted = seen.run / "checkpoints" / "trial-00001" / "last.pt"
    while not stop.wait(0.05):
        if (seen.run / "checkpoints").exists() and not planted.exists() and not seen.planted:
            planted.parent.mkdir(exist_ok=True)
            torch.save({"trial": Payload(seen.run.parent / "unpickled"), "epochs": []}, planted)
            seen.planted = True
        members = {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session_of(pid) == session}
        for pid in members:
            with suppress(OSError):
                seen.titles.add(Path(f"/proc/{pid}/cmdline").read_bytes())
        owners = {inode: pid for pid in members for inode in _sockets_of(pid)}
        for host, port, inode in listening():
            if inode in owners:
                seen.hosts.add(host)
                if not seen.tokens and b"gcs_server" in _title(owners[inode]):
                    seen.tokens.add(wants_token(f"127.0.0.1:{port}"))
        for folder, _, files in os.walk(temporary):  # Ray removes folders meanwhile, which this does not mind
            for path in map(Path(folder).joinpath, files):
                name = str(path.relative_to(temporary)).replace("/", "_")
                if name not in names and path.is_file() and not path.is_symlink():
                    names.add(name)
                    with suppress(OSError):
                        os.link(path, kept / name)


def _session_of(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


def _sockets_of(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    return found


def _title(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home")
    (folder / "own_models.py").write_text(MODELS)
    (folder / "space.yaml").write_text(SPACE)
    # Short, for Ray's sockets; and what is kept must be on the same file system.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short, tempfile.TemporaryDirectory(dir="/tmp") as kept:
        found = Seen(folder / "run", (folder, home, Path(short), Path(kept)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(PROJECT), "HOME": str(home), "TMPDIR": short, "COLUMNS": "200"} | SECRETS
        command = [sys.executable, "-m", "rlsearch", "search", "space.yaml", "--run-dir", "run"]
        options: dict[str, Any] = {"cwd": folder, "env": environment, "text": True, "start_new_session": True}
        stop = threading.Event()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
            watcher = threading.Thread(target=watch, args=(process.pid, found, Path(short), Path(kept), stop))
            watcher.start()
            try:
                found.printed += process.communicate(timeout=200)[0]
            finally:
                stop.set()
                watcher.join()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, found.printed
        done = subprocess.run([sys.executable, "-c", AFTERWARDS, "run"], capture_output=True, check=False, **options)
        found.printed += done.stdout + done.stderr
        yield found


def test_the_search_went_as_planned(seen: Seen) -> None:
    """Or the other tests would look at less than they say."""
    records = read_run(seen.run).records
    assert sorted(record.state for record in records) == ["COMPLETE"] * 2 + ["FAIL"], seen.printed
    assert any("a planned failure" in (record.reason or "") for record in records)
    assert "its process was lost; it starts once more" in seen.printed
    assert (seen.run.parent / "run-out" / "policy.json").is_file(), seen.printed
    assert (seen.run / "report.html").is_file()
    assert any(b"TrialTrainable" in title for title in seen.titles)
    logs = {path.name for path in seen.places[-1].iterdir()}
    assert any("gcs_server" in name for name in logs)
    assert any("worker-" in name for name in logs)
    assert "a planned failure" in "".join(map(str, read_run(seen.run).records))


def test_no_file_holds_a_secret(seen: Seen) -> None:
    files = [path for place in seen.places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += repr(pq.read_table(path).to_pylist()).encode()
        assert CANARY.encode() not in content, path


def test_nothing_printed_and_no_title_holds_a_secret(seen: Seen) -> None:
    assert "rlsearch resume" in seen.printed
    assert "RAY_ADDRESS is 127.0.0.1:1" in seen.printed
    assert CANARY not in seen.printed
    assert not [title for title in seen.titles if CANARY.encode() in title]


def test_ray_listens_on_loopback_alone_and_wants_a_token(seen: Seen) -> None:
    assert len(seen.hosts) > 0
    assert all(map(is_loopback, seen.hosts)), seen.hosts
    assert seen.tokens == {True}


def test_the_token_is_nowhere_but_in_its_private_file(seen: Seen) -> None:
    """Ray itself would leave one in the home folder, for everyone to read."""
    kept = seen.places[-1]
    (token,) = [path for path in kept.iterdir() if path.name.endswith("_token")]
    assert token.stat().st_mode & 0o077 == 0
    assert not list(seen.places[1].rglob("auth_token"))
    content = token.read_bytes()
    assert len(content) == 64
    for place in seen.places:
        for path in place.rglob("*"):
            assert path == token or not path.is_file() or content not in path.read_bytes(), path
    assert content.decode() not in seen.printed
    assert not [title for title in seen.titles if content in title]


def test_a_planted_checkpoint_is_not_unpickled(seen: Seen) -> None:
    assert seen.planted
    assert "started again, its checkpoint could not be used" in (read_run(seen.run).records[1].reason or "")
    assert not (seen.run.parent / "unpickled").exists()
