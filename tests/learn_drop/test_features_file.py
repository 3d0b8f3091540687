"""A file of features: whole or not there, known by its key, gone with its process; also on a disk that is full."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlsearch.learn_drop import feature_file
from rlsearch.learn_drop.feature_file import FeatureFile
from rlsearch.learn_drop.feature_store import Places, available_disk_bytes

KEY = {"run": "one", "cut": 3}
CONTENT = bytes(range(100))
FINAL = "rlsearch-features-one.bin"

# Writes a file, says so, and waits to be told how to end. The module alone is loaded, since torch takes its time.
PROCESS = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("feature_file", {feature_file.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
file = module.FeatureFile.created(Path(sys.argv[1]), sys.argv[2], 100)
file.content()[:] = bytes(range(100))
if sys.argv[3] == "whole":
    file.commit(100, {{"run": "one", "cut": 3}})
print("ready", flush=True)
sys.stdin.readline()
"""


def written(folder: Path, run: str = "one") -> FeatureFile:
    file = FeatureFile.created(folder, run, 100)
    file.content()[:] = CONTENT
    file.commit(100, KEY)
    return file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process with a whole file of run ``one``."""
    yield from started(tmp_path, "one", "whole")


def started(folder: Path, run: str, how_far: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROCESS, str(folder), run, how_far]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield running
        running.kill()


def killed(running: subprocess.Popen[str]) -> None:
    running.send_signal(signal.SIGKILL)
    running.wait()


def test_only_a_whole_file_bears_the_name(tmp_path: Path) -> None:
    file = FeatureFile.created(tmp_path, "one", 100)
    assert len(names(tmp_path)) == 1
    assert FINAL not in names(tmp_path)
    file.commit(100, KEY)
    assert names(tmp_path) == [FINAL]
    file.begin()
    assert FINAL not in names(tmp_path), "what is being changed may not be taken for whole"
    file.commit(40, KEY)
    assert names(tmp_path) == [FINAL]
    assert file.path.stat().st_size == 4096 + 40
    file.close()
    assert names(tmp_path) == []
    file.close()


def test_it_goes_when_nobody_holds_it(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert names(tmp_path) == [FINAL]
    del file
    gc.collect()
    assert names(tmp_path) == []


def test_it_goes_with_its_process(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    assert names(tmp_path) == [FINAL]
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # the child ends at once
def test_a_forked_child_leaves_it_alone(tmp_path: Path) -> None:
    file = written(tmp_path)
    child = os.fork()
    if child == 0:
        file.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert names(tmp_path) == [FINAL]


def test_a_killed_process_leaves_it_to_the_resumed_one(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    assert FeatureFile.found(tmp_path, "one", 100, KEY) is None, "it is in use"
    assert names(tmp_path) == [FINAL]
    killed(process)
    file = FeatureFile.found(tmp_path, "one", 100, KEY)
    assert file is not None
    assert file.content() == CONTENT
    assert FeatureFile.found(tmp_path, "two", 100, KEY) is None


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (KEY | {"cut": 4}, "are of another cut"),
        ({"run": "two", "cut": 2}, "are of another cut, run"),
        ({"run": "one"}, "are of another cut"),
        (KEY | {"views": 2}, "are of another views"),
    ],
)
def test_a_file_of_another_key_is_not_taken(
    tmp_path: Path, process: subprocess.Popen[str], key: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    killed(process)
    assert FeatureFile.found(tmp_path, "one", 100, key) is None
    assert f"{said}: they are built again" in caplog.text
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "said"),
    [(4096 + 99, "are truncated"), (4096, "are truncated"), (30, "no readable key"), (0, "no readable key")],
)
def test_a_truncated_file_is_not_taken(
    tmp_path: Path, process: subprocess.Popen[str], size: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    killed(process)
    os.truncate(tmp_path / FINAL, size)
    assert FeatureFile.found(tmp_path, "one", 100, KEY) is None
    assert said in caplog.text
    assert names(tmp_path) == []


@pytest.mark.parametrize("header", [b"\xff\xfe", b"[]", b"{}", json.dumps({"magic": "other", "key": KEY}).encode()])
def test_a_strange_file_is_not_taken(tmp_path: Path, header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FINAL).write_bytes(header.ljust(4196))
    assert FeatureFile.found(tmp_path, "one", 100, KEY) is None
    assert "no readable key" in caplog.text
    assert names(tmp_path) == []


def test_a_file_of_before_a_power_cut_is_not_taken(
    tmp_path: Path, process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed(process)
    monkeypatch.setattr(feature_file, "_boot", lambda: "after")
    assert FeatureFile.found(tmp_path, "one", 100, KEY) is None
    assert "before this machine started" in caplog.text


@pytest.mark.parametrize("how_far", ["part", "whole"])
def test_what_the_dead_left_is_cleared_away(tmp_path: Path, how_far: str) -> None:
    (tmp_path / "mine.bin").write_text("of somebody else")
    for other in started(tmp_path, "two", how_far):
        left = [name for name in names(tmp_path) if "two" in name]
        assert len(left) == 1
        file = written(tmp_path)
        assert names(tmp_path) == sorted([*left, FINAL, "mine.bin"]), "the living keep theirs"
        file.close()
        killed(other)
        file = written(tmp_path)
        assert names(tmp_path) == ["mine.bin", FINAL]


def test_a_run_twice_at_once_has_two_files(tmp_path: Path) -> None:
    first, second = written(tmp_path), written(tmp_path)
    second.content()[:] = bytes(100)
    assert first.content() == CONTENT
    first.close()
    assert names(tmp_path) == [FINAL], "it is the other's now"
    second.close()
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk cannot be mounted here")
    except FileNotFoundError:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    gc.collect()
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_met_before_the_mapping(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        FeatureFile.created(small_disk, "one", 2_000_000)
    assert names(small_disk) == []
    assert available_disk_bytes(small_disk) == 1 << 20
    where = Places(torch.device("cpu"), {"file": 1 << 30}, small_disk, "one")
    assert where.opened(2_000_000) is None
    assert where.refused == ["file: [Errno 28] No space left on device"]
    file = FeatureFile.created(small_disk, "one", 900_000)
    file.content()[:] = b"x" * 900_000  # all of it is really there
    with pytest.raises(OSError, match="No space left"):
        FeatureFile.created(small_disk, "two", 900_000)
    assert len(names(small_disk)) == 1


def test_without_fallocate_the_space_is_written(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    file = FeatureFile.created(tmp_path, "one", 3_000_000)
    assert file.path.stat().st_size == 4096 + 3_000_000
    with pytest.raises(OSError, match="No space left"):
        FeatureFile.created(small_disk, "one", 2_000_000)
    assert names(small_disk) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        FeatureFile.created(tmp_path / "missing", "one", 100)
    assert Places(torch.device("cpu"), {"file": 1000}, tmp_path / "missing", "one").opened(100) is None
