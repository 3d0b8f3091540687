"""Parquet shards and image folders of the user's own: read exactly, and every fault named by file and row."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlsearch.errors import DataError
from rlsearch.training.data import DataSpec, load_data, load_test

NUM_CLASSES = 3


def picture(index: int, height: int = 6, width: int = 6) -> np.ndarray:
    """An image that no other index has, (height, width, 3)."""
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def write_shard(path: Path, images: Sequence[Any], labels: Sequence[Any], row_group_size: int = 4) -> None:
    table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=row_group_size)


def write_set(folder: Path, num_shards: int = 3, rows: int = 10) -> Path:
    """Shards whose n-th image overall is ``picture(n)`` with label n modulo 3; the test shard goes on from 1000."""
    folder.mkdir(exist_ok=True)
    for shard in range(num_shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        name = f"train-{shard:05}-of-{num_shards:05}.parquet"
        write_shard(folder / name, [encoded(picture(n)) for n in numbers], [n % NUM_CLASSES for n in numbers])
    write_shard(folder / "test-00000-of-00001.parquet", [encoded(picture(n)) for n in range(1000, 1006)], [0, 1, 2] * 2)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def spec(folder: Path, **settings: Any) -> DataSpec:
    return DataSpec(f"parquet:{folder}", **settings)


def test_every_image_arrives_once_with_its_own_label(shards: Path) -> None:
    data = load_data(spec(shards, validation_fraction=0.2))
    images = np.concatenate([data.train.images, data.validation.images])
    labels = np.concatenate([data.train.labels, data.validation.labels])
    assert (len(data.train.labels), len(data.validation.labels)) == (24, 6)
    expected = {picture(n).transpose(2, 0, 1).tobytes(): n % NUM_CLASSES for n in range(30)}
    assert {image.tobytes(): label for image, label in zip(images, labels, strict=True)} == expected
    assert data.classes == ("0", "1", "2")
    assert (data.flip, data.crop, data.input_shape) == (True, 0, (3, 6, 6))


def test_the_test_split_is_read_in_its_own_order(shards: Path) -> None:
    test = load_test(spec(shards, limit=3))
    assert test.images.tobytes() == b"".join(picture(n).transpose(2, 0, 1).tobytes() for n in range(1000, 1006))
    assert test.labels.tolist() == [0, 1, 2] * 2


def test_training_never_opens_the_test_shards(shards: Path) -> None:
    (shards / "test-00000-of-00001.parquet").write_bytes(b"never read")
    assert len(load_data(spec(shards)).train.labels) == 27
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet cannot be read as Parquet"):
        load_test(spec(shards))


def test_a_limit_takes_the_first_of_each_class_and_decodes_no_more(shards: Path) -> None:
    last = shards / "train-00002-of-00003.parquet"
    write_shard(last, [b"no image"] * 10, [n % NUM_CLASSES for n in range(10)])
    data = load_data(spec(shards, limit=12, validation_fraction=0.25))
    images = np.concatenate([data.train.images, data.validation.images])
    assert {image.tobytes() for image in images} == {picture(n).transpose(2, 0, 1).tobytes() for n in range(12)}


@pytest.mark.parametrize(
    "content",
    [["cat", "dog", "eel", "fox"], [{"label": i, "name": name} for i, name in enumerate(("cat", "dog", "eel", "fox"))]],
)
def test_class_names_may_name_more_classes_than_there_are_images(shards: Path, content: list[Any]) -> None:
    (shards / "classes.json").write_text(json.dumps(content))
    data = load_data(spec(shards))
    assert (data.num_classes, data.classes) == (4, ("cat", "dog", "eel", "fox"))


def test_other_names_of_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", [encoded(picture(n)) for n in range(8)], [0, 1] * 4)
    write_shard(tmp_path / "val.parquet", [encoded(picture(9))], [1])
    write_shard(tmp_path / "training_notes.parquet", [b""], [99])
    assert load_data(spec(tmp_path)).num_classes == 2
    assert load_test(spec(tmp_path)).labels.tolist() == [1]


def break_truncated(folder: Path) -> None:
    path = folder / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-200])


def break_column(folder: Path) -> None:
    pq.write_table(pa.table({"img": [b""], "label": [0]}), folder / "train-00001-of-00003.parquet")


def break_types(folder: Path) -> None:
    table = pa.table({"image": ["text"], "label": [0.5]})
    pq.write_table(table, folder / "train-00001-of-00003.parquet")


def break_label(label: int | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_shard(
            folder / "train-00001-of-00003.parquet", [encoded(picture(n)) for n in range(5)], [0, 1, 2, label, 0]
        )

    return write


def break_label_known_classes(folder: Path) -> None:
    (folder / "classes.json").write_text('["cat", "dog", "eel"]')
    break_label(3)(folder)


def break_image(content: bytes | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        images = [encoded(picture(n)) for n in range(6)]
        write_shard(folder / "train-00001-of-00003.parquet", [*images, content, *images], [0, 1, 2] * 4 + [0])

    return write


def break_data_page(folder: Path) -> None:
    path = folder / "train-00001-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the first page of the image column, which reading the labels does not touch
    path.write_bytes(bytes(content))


BIG_ENDIAN_16 = encoded(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1000)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_truncated, "train-00001-of-00003.parquet cannot be read as Parquet, it may be truncated"),
        (break_column, "train-00001-of-00003.parquet: column 'image' is missing, found: img, label"),
        (
            break_types,
            "'image' must be binary .an encoded image., got string; column 'label' must be whole numbers, got d",
        ),
        (break_label(-1), r"train-00001-of-00003.parquet, row 3: label -1 is out of range, it must be in \[0, 2\]"),
        (break_label(None), "train-00001-of-00003.parquet, row 3: label is missing"),
        (break_label(10**12), "no image has label 3 and the largest label is 1000000000000; number them anew"),
        (break_label_known_classes, r"row 3: label 3 is out of range, it must be in \[0, 2\] for 3 classes"),
        (break_image(b"no image"), "train-00001-of-00003.parquet, row 6: the image cannot be decoded"),
        (break_image(b""), "train-00001-of-00003.parquet, row 6: the image cannot be decoded"),
        (break_image(None), "train-00001-of-00003.parquet, row 6: image is missing"),
        (break_image(encoded(picture(3), "JPEG")[:-90]), "row 6: the image cannot be decoded .*Truncated"),
        (break_image(encoded(picture(3))[:-40]), "row 6: the image cannot be decoded"),
        (
            break_image(encoded(picture(3, 6, 8))),
            r"row 6: the image is 6x8 \(height x width\) but .* is 6x6; set data.im",
        ),
        (break_image(BIG_ENDIAN_16), "row 6: the image has mode I;16, not 8 bits a channel"),
        (break_data_page, "train-00001-of-00003.parquet cannot be read, it may be damaged"),
    ],
)
def test_a_fault_in_a_shard_is_named(shards: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(shards)
    with pytest.raises(DataError, match=message):
        load_data(spec(shards))


def test_a_test_label_that_train_does_not_have_is_named(shards: Path) -> None:
    write_shard(shards / "test-00000-of-00001.parquet", [encoded(picture(0))] * 2, [0, 3])
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet, row 1: label 3 is out of range"):
        load_test(spec(shards))


def test_folders_that_hold_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data folder .*gone does not exist"):
        load_data(spec(tmp_path / "gone"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data folder .*file is not a folder"):
        load_data(spec(tmp_path / "file"))
    with pytest.raises(DataError, match=r"no train-\*.parquet; found file"):
        load_data(spec(tmp_path))
    write_shard(tmp_path / "train.parquet", [], [])
    with pytest.raises(DataError, match="the train shards hold no rows"):
        load_data(spec(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", "[1, 2]", '[{"label": 1, "name": "cat"}]', "[", '["cat"', "\xff"])
def test_class_names_of_the_wrong_form(shards: Path, content: str) -> None:
    (shards / "classes.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"classes.json (must be a list of class names|cannot be read as JSON)"):
        load_data(spec(shards))


def write_folder(root: Path, counts: dict[str, int], first: int = 0) -> None:
    for name, count in counts.items():
        (root / name / "deep").mkdir(parents=True)
        for index in range(count):
            place = root / name / ("deep" if index % 2 else "") / f"{index:03}.PNG"
            place.write_bytes(encoded(picture(first)))
            first += 1


def test_an_image_folder_has_a_folder_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"b": 4, "a": 6})
    write_folder(tmp_path / "val", {"b": 1}, first=50)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_data(DataSpec(f"imagefolder:{tmp_path}", validation_fraction=0.2))
    assert data.classes == ("a", "b")
    assert np.bincount(np.concatenate([data.train.labels, data.validation.labels])).tolist() == [6, 4]
    of_b = {image.tobytes() for split in (data.train, data.validation) for image in split.images[split.labels == 1]}
    assert of_b == {picture(n).transpose(2, 0, 1).tobytes() for n in range(4)}
    test = load_test(DataSpec(f"imagefolder:{tmp_path}"))
    assert test.labels.tolist() == [1]
    assert test.images[0].tobytes() == picture(50).transpose(2, 0, 1).tobytes()


def test_an_image_folder_without_train_has_no_test_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 5, "dog": 5})
    assert load_data(DataSpec(f"imagefolder:{tmp_path}")).classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"there is no test split; put it into .*test, beside .*train"):
        load_test(DataSpec(f"imagefolder:{tmp_path}"))


def test_faults_of_an_image_folder_are_named(tmp_path: Path) -> None:
    folder = DataSpec(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match="no class folders"):
        load_data(folder)
    write_folder(tmp_path / "train", {"cat": 5, "dog": 0})
    with pytest.raises(DataError, match="dog: no image in the folder of this class"):
        load_data(folder)
    write_folder(tmp_path / "test", {"cow": 1})
    with pytest.raises(DataError, match=r"class folders cow are not among those of .*train"):
        load_test(folder)
    (tmp_path / "train" / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"broken.jpg: the image cannot be decoded"):
        load_data(folder)
