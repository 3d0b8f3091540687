"""Decoded images on disk: read instead of decoded, exact, and in nobody's way when something is not sound."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_files import encoded, picture, write_folder, write_set, write_shard

from rlsearch.training import data_decode, decoded_cache
from rlsearch.training.data import DataSpec, ImageData, load_data, load_test


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("RLSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded, as it happens."""
    names: list[str] = []
    real = data_decode.decode_image

    def counting(where: str, *arguments: Any) -> Any:
        names.append(where)
        return real(where, *arguments)

    monkeypatch.setattr(data_decode, "decode_image", counting)
    return names


def settle(folder: Path) -> None:
    """Makes all files a minute old, as those of a real set are."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - 60, time.time() - 60))


def parquet(folder: Path) -> str:
    return f"parquet:{write_set(folder)}"


def image_folder(folder: Path) -> str:
    write_folder(folder / "train", {"b": 14, "a": 16})
    write_folder(folder / "val", {"b": 3, "a": 3}, first=50)
    return f"imagefolder:{folder}"


def same(first: ImageData, second: ImageData) -> bool:
    pairs = ((first.train, second.train), (first.validation, second.validation))
    pixels = all(np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels) for a, b in pairs)
    return pixels and first.mean == second.mean and first.std == second.std


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("make", [parquet, image_folder])
def test_a_set_is_decoded_once(
    make: Callable[[Path], str], settled: bool, tmp_path: Path, cache: Path, decoded: list[str]
) -> None:
    name = make(tmp_path / "set")
    if settled:
        settle(tmp_path / "set")
    first = load_data(DataSpec(name))
    assert len(decoded) == 30
    assert bool(list(cache.glob("*.key"))) == settled
    assert same(first, load_data(DataSpec(name)))
    others = [
        load_data(DataSpec(name, limit=20, validation_fraction=0.4, seed=seed, flip=False, crop=2)) for seed in (1, 2)
    ]
    assert len(decoded) == 30, "other limits, seeds and fractions find the same pixels"
    assert load_test(DataSpec(name)).images.shape[0] == 6
    assert len(decoded) == len(set(decoded)) == 36
    shutil.rmtree(cache)
    assert same(first, load_data(DataSpec(name)))
    assert not same(*others)
    assert len(decoded) == 66


def test_other_pixels_are_other_entries(tmp_path: Path, cache: Path, decoded: list[str]) -> None:
    name = parquet(tmp_path / "set")
    settle(tmp_path / "set")
    whole = load_data(DataSpec(name))
    small = load_data(DataSpec(name, image_size=4))
    assert (whole.input_shape, small.input_shape) == ((3, 6, 6), (3, 4, 4))
    assert len(decoded) == 60
    shutil.move(tmp_path / "set", tmp_path / "moved")
    assert same(whole, load_data(DataSpec(f"parquet:{tmp_path / 'moved'}")))
    assert len(decoded) == 60, "where the files lie does not matter"


def test_a_changed_file_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    name = parquet(tmp_path / "set")
    settle(tmp_path / "set")
    first = load_data(DataSpec(name))
    shard = tmp_path / "set" / "train-00001-of-00003.parquet"
    write_shard(shard, [encoded(picture(n)) for n in range(500, 510)], [n % 3 for n in range(10, 20)])
    changed = load_data(DataSpec(name))
    assert not same(first, changed)
    everything = np.concatenate([changed.train.images, changed.validation.images])
    assert picture(505).transpose(2, 0, 1).tobytes() in {image.tobytes() for image in everything}


def test_a_file_changed_to_one_of_the_same_size_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    for number in range(8):
        path = tmp_path / "set" / str(number % 2) / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number), "BMP"))
    settle(tmp_path / "set")
    spec = DataSpec(f"imagefolder:{tmp_path / 'set'}")
    first, size = load_data(spec), path.stat().st_size
    path.write_bytes(encoded(picture(500), "BMP"))
    os.utime(path, (time.time() - 30, time.time() - 30))
    assert path.stat().st_size == size
    assert not same(first, load_data(spec))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_bit(place: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(bytes(content))

    return spoil


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    "spoil", [truncate, empty, lengthen, *(flip_bit(place) for place in (1, 8, 22, 62, 127, 128, 1500, -1))]
)
def test_a_damaged_entry_is_made_anew(
    spoil: Callable[[Path], None], tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, decoded: list[str]
) -> None:
    name = parquet(tmp_path / "set")
    first = load_data(DataSpec(name))
    (entry,) = cache.glob("*.npy")
    sound = entry.read_bytes()
    spoil(entry)
    assert same(first, load_data(DataSpec(name)))
    assert "is damaged" in caplog.text
    assert len(decoded) == 60
    assert entry.read_bytes() == sound
    assert same(first, load_data(DataSpec(name)))
    assert len(decoded) == 60


@pytest.mark.parametrize("content", [b"", b"../../elsewhere", b"0" * 32, b"\xff\xfe"])
def test_a_damaged_key_leads_nowhere(content: bytes, tmp_path: Path, cache: Path) -> None:
    name = parquet(tmp_path / "set")
    settle(tmp_path / "set")
    first = load_data(DataSpec(name))
    (key,) = cache.glob("*.key")
    key.write_bytes(content)
    assert same(first, load_data(DataSpec(name)))


def test_a_small_part_of_a_large_set_is_decoded_alone(
    tmp_path: Path, cache: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "_SMALL", 10)
    name = parquet(tmp_path / "set")
    settle(tmp_path / "set")
    alone = load_data(DataSpec(name, limit=6, validation_fraction=0.5))
    assert len(decoded) == 6
    assert not list(cache.glob("*.npy"))
    load_data(DataSpec(name, limit=8))
    assert len(decoded) == 36, "a quarter is worth the whole"
    assert same(alone, load_data(DataSpec(name, limit=6, validation_fraction=0.5)))
    assert len(decoded) == 36, "what is known to be there is taken"


def test_a_disk_without_room_costs_a_warning(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = parquet(tmp_path / "set")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        first = load_data(DataSpec(name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caplog.text
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"], "nothing half written is left"
    caplog.clear()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("RLSEARCH_CACHE", str(blocked))
    assert same(first, load_data(DataSpec(name)))
    assert "decoded images are not kept in" in caplog.text


def test_the_entry_that_was_used_the_longest_ago_leaves_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for two entries of 30 images (3 x 6 x 6), under a quarter of what is free or used."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(9 * 3500 - used()))

    def used() -> int:
        return sum(file.stat().st_size for file in cache.glob("*.npy"))

    def entries() -> dict[str, float]:
        return {file.name: file.stat().st_mtime for file in cache.glob("*.npy")}

    names = [f"parquet:{write_set(tmp_path / str(rows), 1, rows)}" for rows in (28, 29, 30)]
    made = []
    for age, name in enumerate(names[:2]):
        load_data(DataSpec(name))
        (entry,) = set(entries()) - set(made)
        made.append(entry)
        os.utime(cache / entry, (time.time() - 1000 + age, time.time() - 1000 + age))
    load_data(DataSpec(names[0]))
    assert entries()[made[0]] > time.time() - 100, "now the second is the oldest used"
    load_data(DataSpec(names[2]))
    assert len(entries()) == 2
    assert made[0] in entries()
    assert made[1] not in entries()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load_data(DataSpec(f"parquet:{write_set(tmp_path / 'large', 3, 40)}"))
    assert "more than the cache's share of the disk" in caplog.text
    assert made[0] in entries(), "what never fits drives nothing out"


def test_what_killed_processes_left_is_removed(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    left = [cache / f".{'0' * 32}.npy.abc", cache / "0.key", cache / f"{'0' * 32}.lock"]
    for path in left:
        path.write_text("0" * 32)
        os.utime(path, (1, 1))
    young = cache / f".{'1' * 32}.npy.abc"
    young.write_text("")
    load_data(DataSpec(parquet(tmp_path / "set")))
    assert not any(path.exists() for path in left)
    assert young.exists()


RACER = """
import sys
from pathlib import Path
import numpy as np
from rlsearch.training import data_decode
from rlsearch.training.data_files import read_parquet
from rlsearch.training.decoded_cache import cached

count, real = 0, data_decode.decode_image
def counting(*arguments):
    global count
    count += 1
    return real(*arguments)
data_decode.decode_image = counting
raw = read_parquet("train", Path(sys.argv[1]), None)
print("ready", flush=True)
sys.stdin.readline()
everything = np.arange(len(raw.labels))
pixels = cached(raw, everything).pixels(everything, None)
print(count, int(pixels.astype(np.int64).sum()))
"""


def test_processes_at_once_do_not_hurt_each_other(tmp_path: Path, cache: Path) -> None:
    folder = write_set(tmp_path / "set", rows=100)
    start = [sys.executable, "-c", RACER, str(folder)]
    racers = [
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    told = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        output, errors = racer.communicate(timeout=60)
        assert errors == ""
        told.append(output.split())
    assert len({total for _, total in told}) == 1
    assert sorted(int(count) for count, _ in told) == [0, 0, 300], "one decodes, the others wait for it"
    assert int(told[0][1]) == sum(int(picture(n).astype(np.int64).sum()) for n in range(300))
