"""Decoding: every mode to RGB, one size for all, and no set that is larger than the machine's memory."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rlsearch.errors import DataError
from rlsearch.training.data_decode import allocate_images, decode_images, resize_images


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decoded(content: bytes, image_size: int | None = None) -> np.ndarray:
    return decode_images([("here", content)], 1, image_size)[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    assert decoded(encoded(image)).tolist() == np.full((3, 4, 5), 255).tolist()


def test_a_palette_with_transparency_becomes_rgb_without_a_warning() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    content = encoded(image, transparency=bytes([255, 128]))
    assert decoded(content)[:, 0, 0].tolist() == [10, 20, 30]


def test_formats_that_start_other_programs_are_refused() -> None:
    with pytest.raises(DataError, match=r"here: the image cannot be decoded \(UnidentifiedImageError"):
        decoded(encoded(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (20, 20), (10, 17)])
def test_an_image_is_cropped_around_its_centre(width: int, height: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 200
    pixels[height // 2, width // 2] = 250
    square = decoded(encoded(Image.fromarray(pixels)), image_size=side)
    assert square.shape == (3, side, side)
    inner = square[:, 1:-1, 1:-1]
    assert inner.min() >= 190, "nothing from outside the centre square"
    assert inner.max() > 200


def test_halving_averages_the_pixels() -> None:
    pixels = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 8, 0), 8, 1)
    small = decoded(encoded(Image.fromarray(pixels)), image_size=8)
    assert small[0, [1, 1, 6, 6], [1, 6, 1, 6]].tolist() == [0, 80, 160, 240]


def test_a_large_jpeg_may_be_decoded_at_a_fraction() -> None:
    gradient = np.tile(np.linspace(0, 255, 640).astype(np.uint8), (480, 1))
    content = encoded(Image.fromarray(gradient), "JPEG", quality=95)
    square = decoded(content, image_size=32)
    exact = np.linspace(255 * 80 / 640, 255 * 560 / 640, 33)
    assert np.abs(square[0, 16] - (exact[1:] + exact[:-1]) / 2).max() < 3


@pytest.mark.parametrize("side", [4, 80])  # decoded one after the other, and in threads
def test_many_images_keep_their_order(side: int) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (700, 3), dtype=np.uint8)
    items = [(str(n), encoded(Image.new("RGB", (side, side), tuple(map(int, c))))) for n, c in enumerate(colours)]
    images = decode_images(iter(items), len(items), None)
    assert images.shape == (700, 3, side, side)
    assert images.flags.c_contiguous
    assert (images == colours[:, :, None, None]).all()
    items[650] = ("the bad one", b"")
    with pytest.raises(DataError, match="the bad one: the image cannot be decoded"):
        decode_images(iter(items), len(items), None)


def test_no_image_is_no_error() -> None:
    assert decode_images([], 0, None).shape == (0, 3, 0, 0)


def test_a_set_beyond_memory_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(DataError, match=r"10000000 decoded images of 3x2000x2000 bytes need 120000.0 GB.*data.limit"):
        allocate_images((10_000_000, 3, 2000, 2000))


def test_arrays_are_resized_like_files() -> None:
    planes = np.random.default_rng(1).integers(0, 256, (2, 3, 12, 12), dtype=np.uint8)
    assert resize_images(planes, None) is planes
    assert resize_images(planes, 12) is planes
    resized = resize_images(planes, 6)
    expected = [decoded(encoded(Image.fromarray(image.transpose(1, 2, 0))), image_size=6) for image in planes]
    assert np.abs(resized.astype(int) - np.stack(expected).astype(int)).max() <= 1
    assert resize_images(planes[:, :1], 24).shape == (2, 1, 24, 24)
