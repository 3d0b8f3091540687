"""What a `DataSpec` accepts, what `load_data` gives, and the real sets where they are at hand (RLSEARCH_DATA)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from rlsearch.config import from_mapping
from rlsearch.errors import ConfigError, DataError, Problem
from rlsearch.training.data import DataSpec, ImageData, known_data, load_data, load_test


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DataSpec("digits"))


@pytest.fixture(scope="module")
def real() -> Path:
    """The folder of real images, which is not part of the project."""
    folder = os.environ.get("RLSEARCH_DATA")
    if not folder:
        pytest.skip("set RLSEARCH_DATA to the folder that holds cifar10/, imagenette/, MNIST/ and FashionMNIST/")
    return Path(folder)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"name": "digits", "validation_fraction": 0.5, "limit": 2, "image_size": 1, "crop": 0, "seed": 0}, []),
        ({"name": "parquet:here"}, []),
        ({"name": "digit"}, ["data.name"]),
        ({"name": "parquet:"}, ["data.name"]),
        ({"name": "parqet:here"}, ["data.name"]),
        (
            {"name": "x", "validation_fraction": 1.0, "limit": 1, "image_size": 0, "crop": -1, "seed": -1},
            [f"data.{key}" for key in ("name", "validation_fraction", "limit", "image_size", "crop", "seed")],
        ),
        ({"name": "digits", "validation_fraction": 0.0}, ["data.validation_fraction"]),
        ({"name": "digits", "validation_fraction": float("nan")}, ["data.validation_fraction"]),
    ],
)
def test_every_value_out_of_range_is_named_at_once(settings: dict[str, object], keys: list[str]) -> None:
    problems: list[Problem] = []
    from_mapping(DataSpec, settings, "data", problems)
    assert [problem.key for problem in problems] == keys


def test_problems_say_what_would_be_right() -> None:
    told = [str(DataSpec(name).problems()[0]) for name in ("digit", "parqet:x", "imagefolder:")]
    assert told == [
        "data.name: unknown data set 'digit'; did you mean 'digits'?",
        "data.name: unknown kind 'parqet' of 'parqet:x'; did you mean 'parquet'?",
        "data.name: 'imagefolder:' must name a folder, as in imagefolder:PATH",
    ]
    with pytest.raises(ConfigError, match="2 problems"):
        load_data(DataSpec("digit", seed=-1))


def test_known_data_are_exactly_these() -> None:
    assert known_data() == [
        "digits", "cifar10", "cifar100", "svhn", "stl10", "mnist", "fashionmnist", "imagenette",
        "parquet:PATH", "imagefolder:PATH",
    ]  # fmt: skip


def test_mean_and_deviation_are_those_of_the_training_pixels(digits: ImageData) -> None:
    pixels = digits.train.images / 255
    assert digits.mean == pytest.approx([pixels.mean()] * 3, abs=1e-12)
    assert digits.std == pytest.approx([pixels.std()] * 3, abs=1e-9)


def test_a_channel_of_one_colour_can_be_normalised(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (4, 4), (10 * index, 255, 0)).save(tmp_path / name / f"{index}.png")
    data = load_data(DataSpec(f"imagefolder:{tmp_path}"))
    assert data.mean[1:] == (1.0, 0.0)
    assert data.std[1:] == (1 / 255, 1 / 255)
    assert data.std[0] > 1 / 255


def test_a_limit_counts_before_the_split() -> None:
    data = load_data(DataSpec("digits", limit=100, validation_fraction=0.2))
    assert np.bincount(data.train.labels).tolist() == [8] * 10
    assert np.bincount(data.validation.labels).tolist() == [2] * 10


def test_the_user_has_the_last_word_on_augmentation() -> None:
    data = load_data(DataSpec("digits", flip=True, crop=0, image_size=16))
    assert (data.flip, data.crop, data.input_shape) == (True, 0, (3, 16, 16))
    with pytest.raises(DataError, match=r"data.crop must be less than the image's side, got 8 for images of 8x8"):
        load_data(DataSpec("digits", crop=8))


def test_too_few_images_are_told() -> None:
    with pytest.raises(DataError, match=r"2 training images .* leave 2 to train on and 0 to validate"):
        load_data(DataSpec("digits", limit=2, validation_fraction=0.1))


def test_the_arrays_travel_without_a_copy(digits: ImageData) -> None:
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(digits, protocol=5, buffer_callback=buffers.append)
    assert len(content) < 2000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 1438 * (64 + 8)
    again = pickle.loads(content, buffers=buffers)
    assert np.array_equal(again.train.images, digits.train.images)
    assert (again.mean, again.classes, again.name) == (digits.mean, digits.classes, "digits")


def test_real_cifar10(real: Path) -> None:
    data = load_data(DataSpec(f"parquet:{real}/cifar10", limit=2000))
    assert data.train.images.shape == (1800, 3, 32, 32)
    assert np.bincount(data.train.labels).tolist() == [180] * 10
    assert data.classes[:2] == ("airplane", "automobile")
    assert (data.flip, data.crop) == (True, 4)
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)


def test_real_imagenette(real: Path) -> None:
    folder = DataSpec(f"parquet:{real}/imagenette", image_size=64, limit=100)
    data = load_data(folder)
    assert data.train.images.shape == (90, 3, 64, 64)
    assert data.classes[0] == "tench"
    assert load_test(folder).images.shape == (500, 3, 64, 64)


@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashionmnist", 0.2860)])
def test_real_idx_sets(real: Path, name: str, mean: float) -> None:
    data = load_data(DataSpec(name, root=str(real)))
    assert (len(data.train.labels), len(data.validation.labels)) == (54_000, 6_000)
    assert data.mean[0] == pytest.approx(mean, abs=0.001)
    assert load_test(DataSpec(name, root=str(real))).images.shape == (10_000, 1, 28, 28)
