"""Crop, flip, cutout and normalisation: exactly what their definitions say, the first streams bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsearch.config import from_mapping
from rlsearch.errors import ConfigError, DataError, Problem
from rlsearch.training.data import DataSpec, ImageData, ImageSplit, load_data
from rlsearch.training.device_data import DeviceData

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def made_up(
    shape: tuple[int, int, int], flip: bool | str, crop: int, cutout: int = 0, count: int = 9, black: bool = False
) -> ImageData:
    source = np.random.default_rng(1)
    images = source.integers(0, 1 if black else 256, (count, *shape), dtype=np.uint8)
    split = ImageSplit(images, source.integers(0, 10, count))
    return ImageData(split, split, 10, tuple("0123456789"), MEAN, STD, flip, crop, "made up", cutout)


def by_definition(data: ImageData, epoch: int, seed: int) -> Tensor:
    """All images of an epoch, in its order, each operation by itself; the streams are those of the first version."""

    def stream(purpose: int) -> torch.Generator:
        state = np.random.SeedSequence([seed, epoch, purpose]).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    count, (height, width) = len(data.train.labels), data.train.images.shape[2:]
    images = torch.from_numpy(data.train.images)[torch.randperm(count, generator=stream(0))]
    generator = stream(1)
    rows, columns = torch.randint(0, 2 * data.crop + 1, (2, count), generator=generator).tolist()
    mirrored = torch.rand(count, generator=generator) < 0.5
    padded = F.pad(images, (data.crop,) * 4)
    places = zip(padded, rows, columns, strict=True)
    images = torch.stack([image[:, row : row + height, column : column + width] for image, row, column in places])
    if data.flip:
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    scale, shift = ((1 / (255 * std)).float().view(3, 1, 1), (-mean / std).float().view(3, 1, 1))
    return torch.addcmul(shift, images.float(), scale)


@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    flip=st.booleans(),
    crop=st.integers(0, 5),
    batch_size=st.integers(2, 10),
    epoch=st.integers(0, 99),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_bit_for_bit_as_defined(
    channels: int, height: int, width: int, flip: bool, crop: int, batch_size: int, epoch: int, seed: int
) -> None:
    data = made_up((channels, height, width), flip, min(crop, height - 1, width - 1))
    batches = [images for images, _, _ in DeviceData(data, "cpu").train_batches(batch_size, epoch, seed)]
    made = torch.cat(batches)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in batches)
    assert torch.equal(made, by_definition(data, epoch, seed)[: len(made)])


def mirrored_in(data: DeviceData, images: ImageData, epoch: int, seed: int) -> list[bool]:
    """Whether each image, in the order of the set, is mirrored in an epoch."""
    found = {}
    plain = data.view(torch.arange(data.num_train))
    for batch, _, indices in data.train_batches(4, epoch, seed):
        for image, index in zip(batch, indices.tolist(), strict=True):
            found[index] = torch.equal(image, plain[index].flip(2))
            assert found[index] or torch.equal(image, plain[index])
    return [found[index] for index in range(data.num_train)]


def test_alternating_turns_every_image_over_in_every_epoch() -> None:
    images = made_up((3, 5, 4), "alternating", 0, count=40)
    data = DeviceData(images, "cpu")
    first = mirrored_in(data, images, 0, seed=3)
    assert 8 < sum(first) < 32
    for epoch in range(1, 5):
        again = mirrored_in(DeviceData(images, "cpu"), images, epoch, seed=3)
        assert again == [value ^ (epoch % 2 == 1) for value in first]
    assert mirrored_in(data, images, 0, seed=4) != first


@pytest.mark.parametrize("side", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_cutout_sets_one_square_to_the_mean(side: int, channels: int) -> None:
    """The square lies around a centre inside the image, so that it may hang over the edge; every centre comes up."""
    height, width = 7, 6
    data = DeviceData(made_up((channels, height, width), False, 0, side, count=60, black=True), "cpu")
    expected = {}
    for row in range(height):
        for column in range(width):
            mask = torch.zeros(height, width, dtype=torch.bool)
            top, left = row - side // 2, column - side // 2
            mask[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = True
            expected[tuple(mask.flatten().tolist())] = (row, column)
    seen = set()
    for epoch in range(20):
        for images, _, _ in data.train_batches(16, epoch, 0):
            assert images.is_contiguous(memory_format=torch.channels_last)
            for image in images:
                assert torch.equal(image[0] == 0, image[2] == 0)
                seen.add(tuple((image[0] == 0).flatten().tolist()))
    assert seen == set(expected)


def test_cutout_and_alternating_leave_the_other_streams_alone() -> None:
    plain, cut = (DeviceData(made_up((3, 8, 8), True, 2, cutout, count=20), "cpu") for cutout in (0, 3))
    for (first, _, _), (second, _, _) in zip(plain.train_batches(8, 1, 0), cut.train_batches(8, 1, 0), strict=True):
        kept = second != 0
        assert torch.equal(first[kept], second[kept])
        assert 0 < (~kept).sum() <= 3 * 9 * len(first)
    unchanged = zip(plain.validation_batches(8), cut.validation_batches(8), strict=True)
    assert all(torch.equal(first, second) for (first, _), (second, _) in unchanged)


@pytest.mark.parametrize("flip", [True, "alternating"])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_an_epoch_goes_on_at_any_step(flip: bool | str, start: int) -> None:
    data = DeviceData(made_up((3, 6, 6), flip, 1, 2, count=26), "cpu")
    straight = list(data.train_batches(8, 3, 5))
    resumed = list(data.train_batches(8, 3, 5, start_step=start))
    assert len(resumed) == len(straight) - start
    for ours, theirs in zip(resumed, straight[start:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_settings_are_checked() -> None:
    problems: list[Problem] = []
    assert from_mapping(DataSpec, {"name": "digits", "flip": "alternating"}, "data", problems) is not None
    assert from_mapping(DataSpec, {"name": "digits", "flip": True}, "data", problems) is not None
    assert problems == []
    for content in ({"flip": "random"}, {"flip": 1}, {"cutout": -1}, {"cutout": True}):
        from_mapping(DataSpec, {"name": "digits", **content}, "data", problems)
    assert [str(problem) for problem in problems] == [
        "data.flip: must be true, false or alternating, got 'random'",
        "data.flip: must be true or false or text, got 1",
        "data.cutout: must be a whole number of at least 0, got -1",
        "data.cutout: must be a whole number, got True",
    ]
    with pytest.raises(ConfigError, match=r"data\.flip"):
        load_data(DataSpec("digits", flip="sometimes"))
    with pytest.raises(DataError, match=r"data\.cutout must be less than the image's side, got 8 for images of 8x8"):
        load_data(DataSpec("digits", cutout=8))
    data = load_data(DataSpec("digits", cutout=3, flip="alternating"))
    assert (data.cutout, data.flip) == (3, "alternating")
