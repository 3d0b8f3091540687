"""Batches on a device: every image once an epoch, moved only as allowed, the same for the same seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsearch.errors import DataError
from rlsearch.training.augmentation import shifted
from rlsearch.training.data import ImageData, ImageSplit
from rlsearch.training.device_data import DeviceData

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def image_data(
    count: int = 20, channels: int = 3, side: int = 6, flip: bool | str = True, crop: int = 2, cutout: int = 0
) -> ImageData:
    """Images in which every shift and flip can be told apart; read-only, as Ray's are."""
    source = np.random.default_rng(0)

    def split(num_images: int) -> ImageSplit:
        images = source.integers(1, 256, (num_images, channels, side, side), dtype=np.uint8)
        labels = source.integers(0, 10, num_images)
        for array in (images, labels):
            array.setflags(write=False)
        return ImageSplit(images, labels)

    return ImageData(split(count), split(7), 10, tuple("0123456789"), MEAN, STD, flip, crop, "made up", cutout)


def normalised(images: np.ndarray) -> Tensor:
    """The definition, in float64: (x / 255 - mean) / std, on three channels."""
    pixels = torch.from_numpy(np.array(images)).double().expand(-1, 3, -1, -1) / 255
    return (pixels - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)


def variants(image: np.ndarray, crop: int, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """Every image that augmentation may make of ``image`` (C, H, W), by row, column and flip."""
    side = image.shape[-1]
    padded = np.pad(image, ((0, 0), (crop, crop), (crop, crop)))
    made = {}
    for row in range(2 * crop + 1):
        for column in range(2 * crop + 1):
            window = padded[:, row : row + side, column : column + side]
            made[row, column, False] = normalised(window[None])[0]
            if flip:
                made[row, column, True] = normalised(window[None, :, :, ::-1])[0]
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("flip", "crop"), [(True, 2), (False, 2), (True, 0), (False, 0)])
def test_augmentation_makes_exactly_the_allowed_images(device: str, channels: int, flip: bool, crop: int) -> None:
    data = image_data(channels=channels, flip=flip, crop=crop)
    on_device = DeviceData(data, device)
    allowed = [variants(image, crop, flip) for image in data.train.images]
    seen = set()
    for epoch in range(30):
        for images, labels, indices in on_device.train_batches(8, epoch, seed=0):
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.tolist() == data.train.labels[indices.cpu()].tolist()
            for image, index in zip(images.cpu().double(), indices.tolist(), strict=True):
                made = [key for key, variant in allowed[index].items() if torch.allclose(image, variant, atol=1e-5)]
                assert len(made) == 1
                seen.add(made[0])
    assert seen == set(allowed[0])


@given(count=st.integers(2, 40), batch_size=st.integers(1, 45), epoch=st.integers(0, 1000), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_image_once(count: int, batch_size: int, epoch: int, seed: int) -> None:
    data = DeviceData(image_data(count, side=2, crop=1), "cpu")
    batches = [indices.tolist() for _, _, indices in data.train_batches(batch_size, epoch, seed)]
    seen = [index for batch in batches for index in batch]
    left_out = 1 if count % batch_size == 1 and batch_size > 1 else 0
    assert len(seen) == count - left_out
    assert len(set(seen)) == len(seen)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches) == data.num_batches(batch_size)
    assert batches == [indices.tolist() for indices in data.epoch_order(batch_size, epoch, seed)]


def epoch_of(data: DeviceData, batch_size: int, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
    batches = list(data.train_batches(batch_size, epoch, seed))
    return torch.cat([batch[0] for batch in batches]).cpu(), torch.cat([batch[2] for batch in batches]).cpu()


def test_seed_and_epoch_decide_and_nothing_else() -> None:
    data = DeviceData(image_data(), "cpu")
    images, order = epoch_of(data, 8, epoch=3, seed=1)
    torch.manual_seed(99)
    again, order_again = epoch_of(DeviceData(image_data(), "cpu"), 5, epoch=3, seed=1)
    assert torch.equal(order, order_again)
    assert torch.equal(images, again), "batch size and torch's own random state change nothing"
    for epoch, seed in ((4, 1), (3, 2), (1, 3)):
        assert not torch.equal(order, epoch_of(data, 8, epoch, seed)[1])


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_a_gpu_sees_what_the_cpu_sees() -> None:
    for channels in (1, 3):
        results = [epoch_of(DeviceData(image_data(channels=channels), device), 8, 2, 5) for device in DEVICES]
        assert torch.equal(results[0][1], results[1][1])
        assert torch.allclose(results[0][0], results[1][0], atol=1e-6)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # said of the mode, not of us
def test_batches_never_wait_for_the_gpu() -> None:
    data = DeviceData(image_data(64), "cuda")
    list(data.train_batches(8, 0, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels, _ in data.train_batches(8, 1, 0):
            shifted(images, 1, data.generator(0, 1))
            assert labels.is_cuda
        list(data.validation_batches(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_plain_or_mirrored(channels: int) -> None:
    data = image_data(channels=channels)
    on_device = DeviceData(data, "cpu")
    indices = torch.tensor([4, 0, 4])
    expected = normalised(data.train.images[[4, 0, 4]])
    assert torch.allclose(on_device.view(indices).double(), expected, atol=1e-6)
    assert torch.allclose(on_device.view(indices, flipped=True).double(), expected.flip(3), atol=1e-6)
    assert on_device.view(indices, flipped=True).is_contiguous(memory_format=torch.channels_last)


def test_evaluation_batches_keep_order_and_normalisation() -> None:
    data = image_data()
    on_device = DeviceData(data, "cpu")
    batches = list(on_device.validation_batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    expected = normalised(data.validation.images)
    assert torch.allclose(torch.cat([images for images, _ in batches]).double(), expected, atol=1e-6)
    assert torch.cat([labels for _, labels in batches]).tolist() == data.validation.labels.tolist()
    split = list(on_device.split_batches(data.validation, 5))
    assert torch.equal(torch.cat([images for images, _ in split]), torch.cat([images for images, _ in batches]))
    smaller = ImageSplit(data.validation.images[:, :, 1:], data.validation.labels)
    with pytest.raises(DataError, match=r"shape \(3, 5, 6\) .* \(3, 6, 6\); set data.image_size"):
        on_device.split_batches(smaller, 5)


def test_what_it_says_of_itself() -> None:
    data = DeviceData(image_data(count=9, channels=1, crop=1), "cpu")
    assert (data.num_train, data.num_validation, data.input_shape) == (9, 7, (3, 6, 6))
    assert (data.flip, data.crop, data.device.type) == (True, 1, "cpu")
    assert data.num_bytes == (9 + 7) * (36 + 8)
    assert [data.num_batches(size) for size in (1, 2, 3, 4, 8, 9, 10)] == [9, 4, 3, 2, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_are_shifted_by_whole_cells(dtype: torch.dtype, layout: torch.memory_format) -> None:
    features = (torch.rand(200, 5, 4, 6) + 1).to(dtype).contiguous(memory_format=layout)
    moved = shifted(features, 1, torch.Generator().manual_seed(0))
    assert moved.dtype == dtype
    assert moved.is_contiguous(memory_format=layout)
    padded = F.pad(features, (1, 1, 1, 1))
    seen = set()
    for index in range(200):
        fits = [
            (row, column)
            for row in range(3)
            for column in range(3)
            if torch.equal(moved[index], padded[index, :, row : row + 4, column : column + 6])
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9
    again = shifted(features, 1, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
