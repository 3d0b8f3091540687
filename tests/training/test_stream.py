"""Streamed sets: the same images as in memory, every one once, from any step on, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_files import encoded, picture, write_folder, write_set, write_shard
from torch import Tensor

from rlsearch.errors import ConfigError, DataError
from rlsearch.policy import LearnDrop, ModelSpec, Policy
from rlsearch.training import data as data_module
from rlsearch.training import encoded_images
from rlsearch.training.data import DataSpec, load_data, load_test
from rlsearch.training.data_decode import decode_image, random_region
from rlsearch.training.device_data import DeviceData
from rlsearch.training.encoded_images import Shard, ShardImages
from rlsearch.training.image_stream import StreamSplit, epoch_order
from rlsearch.training.loop import TrainingSpec
from rlsearch.training.stream_data import StreamData, open_images
from rlsearch.training.trial import Trial
from rlsearch.training.trial_spec import TrialSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return f"parquet:{write_set(tmp_path / 'set')}"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_folder(tmp_path / "images" / "train", {"b": 14, "a": 16})
    write_folder(tmp_path / "images" / "val", {"b": 3, "a": 3}, first=50)
    return f"imagefolder:{tmp_path / 'images'}"


def opened(name: str, workers: int = 0, **options: Any) -> StreamData:
    images = open_images(load_data(DataSpec(name, stream=True, workers=workers, **options)), "cpu")
    assert isinstance(images, StreamData)
    return images


def same(first: Iterator[tuple[Tensor, ...]], second: Iterator[tuple[Tensor, ...]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_stream_gives_what_memory_gives(kind: str, workers: int, request: pytest.FixtureRequest) -> None:
    """With the crop given, so that both crop alike."""
    name = request.getfixturevalue(kind)
    options: dict[str, Any] = {"image_size": 5, "crop": 1, "cutout": 2, "flip": "alternating", "limit": 28}
    stream, memory = opened(name, workers, **options), DeviceData(load_data(DataSpec(name, **options)), "cpu")
    assert (stream.num_train, stream.num_validation, stream.input_shape) == (25, 3, (3, 5, 5))
    assert torch.equal(stream.labels, memory.labels)
    for epoch in (0, 1):
        assert same(stream.train_batches(8, epoch, 3), memory.train_batches(8, epoch, 3))
    assert all(
        images.is_contiguous(memory_format=torch.channels_last) for images, _, _ in stream.train_batches(8, 0, 3)
    )
    assert same(stream.validation_batches(2), memory.validation_batches(2))
    spec = DataSpec(name, **options)
    tests = load_test(spec), load_test(replace(spec, stream=True, workers=workers))
    assert isinstance(tests[1], StreamSplit)
    for images in (stream, memory):
        assert same(images.split_batches(tests[0], 4), images.split_batches(tests[1], 4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_stream_goes_on_at_any_step_and_decodes_nothing_before(
    start: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of 20x30 under random resized crops, in row groups of 4 of which 2 are shuffled together."""
    monkeypatch.setattr(encoded_images, "_WINDOW_IMAGES", 8)
    for number in range(3):
        images = [encoded(picture(10 * number + row, 20, 30), "JPEG") for row in range(10)]
        write_shard(tmp_path / f"train-{number}.parquet", images, [row % 2 for row in range(10)])
    name = f"parquet:{tmp_path}"
    straight = list(opened(name, image_size=8).train_batches(7, 2, 5))
    assert [len(labels) for _, labels, _ in straight] == [7, 7, 7, 6]
    resumed = opened(name, workers, image_size=8)
    reads = tmp_path / "reads"
    real = ShardImages.open_group

    def noting(images: ShardImages, group: int) -> Any:
        with reads.open("a") as file:
            file.write(f"{group}\n")
        return real(images, group)

    monkeypatch.setattr(ShardImages, "open_group", noting)
    assert same(resumed.train_batches(7, 2, 5, start_step=start), iter(straight[start:]))
    read = {int(line) for line in reads.read_text().split()} if reads.exists() else set()
    split = resumed._train
    wanted = torch.cat([torch.empty(0, dtype=torch.int64), *(indices for _, _, indices in straight[start:])]).numpy()
    assert read == set(split.groups()[wanted].tolist())
    if workers == 0:
        assert len(reads.read_text().split() if reads.exists() else []) == len(read), "each row group is read once"


def test_resized_crops_differ_by_epoch_and_seed_alone(folder: str) -> None:
    data = opened(folder, image_size=4, flip=False)
    assert (data.crop, load_data(DataSpec(folder, image_size=4, flip=False)).crop) == (0, 0)
    order = {}
    for epoch, seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        images = torch.cat([images for images, _, _ in data.train_batches(8, epoch, seed)])
        indices = torch.cat([indices for _, _, indices in data.train_batches(8, epoch, seed)])
        assert sorted(indices.tolist()) == list(range(27))
        again = order.setdefault((epoch, seed), images[torch.argsort(indices)])
        assert torch.equal(again, images[torch.argsort(indices)])
    first, second, third = order.values()
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    numbers=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_a_random_region_lies_inside_the_image(width: int, height: int, numbers: list[float]) -> None:
    left, top, right, bottom = random_region((width, height), numbers)
    assert 0 <= left < right <= width * (1 + 1e-9)
    assert 0 <= top < bottom <= height * (1 + 1e-9)
    wide, tall = right - left, bottom - top
    assert wide * tall <= width * height * (1 + 1e-9)
    if wide < width and tall < height:
        assert wide * tall >= 0.08 * width * height * (1 - 1e-9)
        assert 0.75 * (1 - 1e-9) <= wide / tall <= 4 / 3 * (1 + 1e-9)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_a_region_is_cut_out_and_resized(image_format: str) -> None:
    """A picture whose colours say where a pixel lay; a large JPEG is decoded at a fraction of its size."""
    rows, columns = np.mgrid[0:256, 0:512]
    pixels = np.stack([rows, columns // 2, np.zeros_like(rows)], -1).astype(np.uint8)
    for numbers in ([0.0, 0.5, 0.9, 0.1], [0.99, 0.99, 0.5, 0.5], [0.3, 0.1, 0.0, 0.999]):
        left, top, right, bottom = random_region((512, 256), numbers)
        image = decode_image("here", encoded(pixels, image_format), 16, numbers).astype(float)
        step = (right - left) / 16, (bottom - top) / 16
        assert image.shape == (3, 16, 16)
        expected_rows = top + (np.arange(16) + 0.5) * step[1]
        expected_columns = (left + (np.arange(16) + 0.5) * step[0]) / 2
        assert np.abs(image[0].mean(1) - expected_rows).max() < 4
        assert np.abs(image[1].mean(0) - expected_columns).max() < 4


def test_a_small_region_of_a_large_jpeg_stays_sharp() -> None:
    """Lines one pixel wide would be grey if the whole image were decoded at a fraction of its size."""
    lines = np.repeat((np.arange(1024) % 2 * 255).astype(np.uint8)[None, :, None], 1024, 0).repeat(3, 2)
    image = decode_image("here", encoded(lines, "JPEG"), 256, [0.0, 0.5, 0.5, 0.5])
    assert image[0].std() > 40


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    window=st.integers(1, 5),
    epoch=st.integers(0, 50),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_an_order_has_every_image_once_window_by_window(
    sizes: list[int], window: int, epoch: int, data: st.DataObject
) -> None:
    images = ShardImages([Shard(Path("x"), np.zeros(sum(sizes), np.int64), tuple(sizes))], 8)
    images.window = window
    chosen = data.draw(st.sets(st.integers(0, sum(sizes) - 1), min_size=1))
    positions = np.array(sorted(chosen))
    split = StreamSplit(images, positions, np.zeros(len(positions), np.int64), (3, 8, 8))
    order = epoch_order(split, epoch, 1)
    assert sorted(order.tolist()) == list(range(len(positions)))
    assert torch.equal(order, epoch_order(split, epoch, 1))
    groups = split.groups()[order.numpy()]
    places = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    open_at = [sum(place[0] <= step <= place[-1] for place in places) for step in range(len(order))]
    assert max(open_at) <= window, "no more groups are open than a window has"


def test_a_set_is_streamed_when_it_would_fill_half_of_memory(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 30 * 3 * 6 * 6
    for memory, streamed in ((2 * needed, False), (2 * needed - 1, True)):
        monkeypatch.setattr(data_module, "host_memory", lambda memory=memory: memory)
        data = load_data(DataSpec(shards, crop=1))
        assert data.is_streamed == streamed
        assert isinstance(open_images(data, "cpu"), StreamData if streamed else DeviceData)
        assert not load_data(DataSpec(shards, limit=20)).is_streamed
        assert not load_data(DataSpec(shards, stream=False)).is_streamed
        assert (data.flip, data.crop, data.input_shape, data.classes) == (True, 1, (3, 6, 6), ("0", "1", "2"))


def test_a_streamed_set_is_light_and_is_opened_where_it_arrives(shards: str) -> None:
    data = load_data(DataSpec(shards, stream=True, workers=0))
    sent = pickle.dumps(data)
    assert len(sent) < 4000
    assert data.num_bytes == 2 * 30 * 8
    theirs = open_images(pickle.loads(sent), "cpu")
    assert same(theirs.train_batches(8, 1, 0), open_images(data, "cpu").train_batches(8, 1, 0))


def test_statistics_come_from_few_places_of_a_large_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsearch.training.image_stream._SAMPLE_IMAGES", 20)
    monkeypatch.setattr("rlsearch.training.image_stream._SAMPLE_GROUPS", 3)
    name = f"parquet:{write_set(tmp_path, 4, 40)}"
    opened_groups = []
    real = ShardImages.open_group
    monkeypatch.setattr(ShardImages, "open_group", lambda s, g: (opened_groups.append(g), real(s, g))[1])
    data = load_data(DataSpec(name, stream=True, workers=0, image_size=6))
    assert len(opened_groups) == 6, "of 40"
    whole = load_data(DataSpec(name, image_size=6, stream=False))
    assert isinstance(data.train, StreamSplit)
    assert len(data.train.sample()) <= 20
    assert np.allclose(data.mean, whole.mean, atol=0.02)
    assert np.allclose(data.std, whole.std, atol=0.02)
    assert data.mean == load_data(DataSpec(name, stream=True, image_size=6)).mean


def break_row(name: str, row: int = 6) -> Path:
    shard = Path(name.partition(":")[2]) / "train-00001-of-00003.parquet"
    images = [b"broken" if number == row else encoded(picture(10 + number)) for number in range(10)]
    write_shard(shard, images, [(10 + number) % 3 for number in range(10)])
    return shard


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_or_skipped_and_counted(
    shards: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    break_row(shards)
    message = r"train-00001-of-00003.parquet, row 6: the image cannot be decoded"
    with pytest.raises(DataError, match=message):
        load_data(DataSpec(shards, stream=True))
    spec = DataSpec(shards, stream=True, workers=workers, skip_broken=True, flip=False)
    data = load_data(spec)
    stopping = open_images(replace(data, train=replace(data.train, skip_broken=False)), "cpu")
    with pytest.raises(DataError, match=f"^.*{message}"):
        list(stopping.train_batches(8, 0, 0))
    images = open_images(data, "cpu")
    assert isinstance(images, StreamData)
    for epoch in range(3):
        seen = []
        for batch, labels, indices in images.train_batches(8, epoch, 0):
            assert len(batch) == len(labels) == len(indices)
            assert torch.equal(labels, images.labels[indices])
            seen += indices.tolist()
        assert len(seen) == 27
        assert len(set(seen)) == 26, "one is there twice, in place of the broken one"
        assert images.num_broken == 1
    told = [record for record in caplog.records if "1 images cannot be decoded and are skipped" in record.message]
    assert len(told) == 1
    assert "row 6" in told[0].message
    memory = load_data(replace(spec, stream=False))
    assert len(memory.train.labels) + len(memory.validation.labels) == 29


def test_a_broken_image_does_not_count_in_validation(shards: str) -> None:
    data = load_data(DataSpec(shards, stream=True, workers=0, skip_broken=True))
    position = int(data.validation.positions[1])
    shard = Path(shards.partition(":")[2]) / f"train-{position // 10:05}-of-00003.parquet"
    images = [b"" if row == position % 10 else encoded(picture(position // 10 * 10 + row)) for row in range(10)]
    write_shard(shard, images, [(position // 10 * 10 + row) % 3 for row in range(10)])
    stream = open_images(data, "cpu")
    assert isinstance(stream, StreamData)
    labels = [labels.tolist() for _, labels in stream.validation_batches(1)]
    assert [label for batch in labels for label in batch] == np.delete(data.validation.labels, 1).tolist()
    assert len(labels) == 2, "a batch of nothing is left out"
    assert stream.num_broken == 1


def remove(shard: Path) -> None:
    shard.unlink()


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:300])


def shorten(shard: Path) -> None:
    pq.write_table(pq.read_table(shard).slice(0, 6), shard, row_group_size=4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spoil", [remove, truncate, shorten])
def test_a_stream_that_ends_early_names_the_file(shards: str, spoil: Callable[[Path], None], workers: int) -> None:
    images = opened(shards, workers, skip_broken=True)
    spoil(Path(shards.partition(":")[2]) / "train-00001-of-00003.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet"):
        list(images.train_batches(8, 0, 0))
    assert no_children()


def test_a_file_that_vanished_is_named(folder: str) -> None:
    images = opened(folder, skip_broken=True)
    gone = Path(folder.partition(":")[2]) / "train" / "a" / "000.PNG"
    gone.unlink()
    with pytest.raises(DataError, match=r"000.PNG: the image cannot be read \(No such file or directory\)"):
        list(images.train_batches(8, 0, 0))


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", [encoded(picture(n, 6, 6 + n // 7)) for n in range(8)], [0, 1] * 4)
    data = load_data(DataSpec(f"parquet:{tmp_path}", stream=True, workers=0, limit=6))
    assert data.input_shape == (3, 6, 6)
    with pytest.raises(DataError, match=r"6x7 \(height x width\) but .* 6x6; set data.image_size"):
        load_data(DataSpec(f"parquet:{tmp_path}", stream=True, workers=0, validation_fraction=0.2))


def trained(name: str, features: str, **options: Any) -> Trial:
    settings = TrainingSpec(epochs=2, batch_size=8, lr=0.05)
    drop = LearnDrop(score="schedule", threshold=0.9, warmup=0.0, features=features)
    data = DataSpec(name, image_size=6, crop=1, workers=0, **options)
    return Trial(
        TrialSpec(ModelSpec("tiny_net:make", num_classes=2), data, settings, Policy(learn_drop=drop)), device="cpu"
    )


def test_a_trial_on_a_stream_is_the_one_in_memory(folder: str) -> None:
    """``auto`` recomputes on a stream; in memory it is told to."""
    trials = trained(folder, "auto", stream=True), trained(folder, "recompute", stream=False)
    histories = [[trial.run_epoch() for _ in range(2)] for trial in trials]
    for streamed, memory in zip(*histories, strict=True):
        for name in ("accuracy", "validation_loss", "train_loss", "train_flops", "dropped_units"):
            assert getattr(streamed, name) == getattr(memory, name)
    assert histories[0][-1].dropped_units > 0
    assert trials[0].features_in is None
    with pytest.raises(ConfigError, match=r"learn_drop.features: 'stored' needs images in memory, but .* is streamed"):
        trained(folder, "stored", stream=True)


def no_children() -> bool:
    """Whether every process that was started has ended, after a moment for those that are ending."""
    for _ in range(100):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.05)
    return False


def test_workers_end_with_the_iterator(shards: str) -> None:
    images = opened(shards, workers=2)
    batches = images.train_batches(4, 0, 0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert no_children()
    list(images.train_batches(4, 0, 0))
    assert no_children()
    state = torch.get_rng_state()
    next(images.validation_batches(2))
    assert no_children()
    assert torch.equal(state, torch.get_rng_state()), "the training's own random state is left alone"


def train_until_killed(name: str, begun: Connection) -> None:
    """In a process and a session of its own."""
    os.setsid()
    batches = opened(name, workers=2).train_batches(2, 0, 0)
    next(batches)
    begun.send(None)
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_end_with_the_process(shards: str) -> None:
    """Whether it ends by Ctrl-C, by being asked to or by being killed, even while a worker is only starting."""
    start = multiprocessing.get_context("spawn")
    trainings = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        ours, theirs = start.Pipe()
        training = start.Process(target=train_until_killed, args=(shards, theirs))
        training.start()
        trainings[number] = training
        assert ours.poll(30)
        assert training.pid is not None
        assert len(members(training.pid)) == 3
    for number, training in trainings.items():
        assert training.pid is not None
        os.kill(training.pid, number)
    try:
        for training in trainings.values():
            training.join(timeout=30)
            assert training.pid is not None
            deadline = time.monotonic() + 20
            while members(training.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert members(training.pid) == []
    finally:
        for left in (pid for training in trainings.values() for pid in members(training.pid or 0)):
            os.kill(left, signal.SIGKILL)


def members(session: int) -> list[int]:
    """The living processes of a session; a zombie has ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_settings_of_a_stream_are_checked(shards: str) -> None:
    told = [str(problem) for problem in DataSpec("digits", stream=True, workers=-1).problems()]
    assert told == [
        "data.workers: must be a whole number of at least 0, got -1",
        "data.stream: 'digits' is held in memory; parquet:, imagefolder: and imagenette can be streamed",
    ]
    with pytest.raises(ConfigError, match=r"data\.stream: must be true, false or auto, got 'never'"):
        load_data(DataSpec(shards, stream="never"))
