"""Encoded images to one uint8 array: decoded, cropped to one size, every broken image named."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from rlsearch.errors import DataError

Pixels: TypeAlias = npt.NDArray[np.uint8]

# Formats that Pillow reads by itself: others may start programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_EIGHT_BIT_MODES = ("RGB", "L", "P", "RGBA", "LA", "PA", "1", "CMYK", "YCbCr")
_BLOCK = 128
_LEAST_AREA = 0.08
# Under this many pixels an image decodes faster than threads can pass the interpreter lock between them.
_THREADING_PIXELS = 64 * 64


# Where an image comes from, in words for messages, and its encoded bytes or its file; None where a table has no bytes.
Source: TypeAlias = tuple[str, bytes | Path | None]


class BrokenImageError(DataError):
    """One image that cannot be decoded; the others of its set may be sound."""


def decode_images(
    items: Iterable[Source], count: int, image_size: int | None, broken: list[int] | None = None
) -> Pixels:
    """Decodes ``count`` images to RGB.

    Args:
        items: the encoded images.
        count: the number of items.
        image_size: the side of the square that each image is cropped to, after its shorter side was resized to it;
            None takes them as they are, and they must all have one size.
        broken: the positions of images that cannot be decoded are added here, and what stands in their place means
            nothing; None: they are an error.

    Returns:
        (count, 3, H, W).

    Raises:
        DataError: an image that cannot be decoded or has another size (named), or more images than memory.
    """
    iterator = iter(items)
    if not count:
        return np.empty((0, 3, image_size or 0, image_size or 0), dtype=np.uint8)
    name, example, num_broken = _first_image(iterator, image_size, broken)
    height, width = example.shape[1:]
    images = allocate_images((count, 3, height, width))
    images[num_broken] = example
    small = height * width < _THREADING_PIXELS
    num_workers = 1 if small else min(4, os.cpu_count() or 1)

    def decode_block(start_and_block: tuple[int, list[Source]]) -> None:
        start, block = start_and_block
        for position, (where, source) in enumerate(block, start):
            try:
                image = decode_image(where, source, image_size)
            except BrokenImageError:
                if broken is None:
                    raise
                broken.append(position)
                continue
            if image.shape != example.shape:
                raise other_size(where, image, name, example)
            images[position] = image

    with ThreadPoolExecutor(num_workers) as pool:
        blocks = _blocks(iterator, num_broken + 1)
        # A few blocks at a time, so that the encoded images of a large set are never in memory together.
        while group := list(islice(blocks, 4 * num_workers)):
            for _ in map(decode_block, group) if num_workers == 1 else pool.map(decode_block, group):
                pass
    return images


def other_size(where: str, image: Pixels, first: str, example: Pixels) -> DataError:
    """The error of an ``image`` (C, H, W) that cannot stand beside ``example``, which is the set's ``first``."""
    (height, width), (first_height, first_width) = image.shape[1:], example.shape[1:]
    return DataError(
        f"{where}: the image is {height}x{width} (height x width) but {first} is {first_height}x{first_width}; "
        "set data.image_size to bring all images to one size"
    )


def allocate_images(shape: tuple[int, int, int, int]) -> Pixels:
    """An empty uint8 array for decoded images.

    Raises:
        DataError: it would not fit into the machine's memory, where the whole decoded set is held.
    """
    needed = int(np.prod(shape, dtype=object))
    memory = host_memory()
    if memory is not None and needed > memory:
        count, channels, height, width = shape
        raise DataError(
            f"{count} decoded images of {channels}x{height}x{width} bytes need {needed / 1e9:.1f} GB, and this "
            f"machine has {memory / 1e9:.1f} GB: set data.image_size or data.limit lower, or, for parquet: and "
            "imagefolder:, data.stream to auto"
        )
    return np.empty(shape, dtype=np.uint8)


def resize_images(images: Pixels, image_size: int | None) -> Pixels:
    """Brings (N, C, H, W) to (N, C, image_size, image_size); None, or the size it has, changes nothing."""
    num_images, channels, height, width = images.shape
    if image_size is None or height == width == image_size:
        return images
    resized = allocate_images((num_images, channels, image_size, image_size))
    for position, image in enumerate(images):
        for channel, plane in enumerate(image):
            resized[position, channel] = np.asarray(_square(Image.fromarray(plane), image_size))
    return resized


def _first_image(items: Iterator[Source], image_size: int | None, broken: list[int] | None) -> tuple[str, Pixels, int]:
    """The first image that can be decoded: its name, its pixels, and how many come before it."""
    for position, (where, source) in enumerate(items):
        try:
            return where, decode_image(where, source, image_size), position
        except BrokenImageError as error:
            if broken is None:
                raise
            broken.append(position)
            last = error
    raise DataError(f"none of {position + 1} images can be decoded; the last one's error: {last}")


def _blocks(items: Iterator[Source], start: int) -> Iterator[tuple[int, list[Source]]]:
    """Lists of at most `_BLOCK` items with the position of their first, from ``start`` on."""
    while block := list(islice(items, _BLOCK)):
        yield start, block
        start += len(block)


def decode_image(
    where: str, source: bytes | Path | None, image_size: int | None, region: Sequence[float] | None = None
) -> Pixels:
    """One image as (3, H, W).

    Args:
        where: it comes from, for messages.
        source: its encoded bytes or its file.
        image_size: as in `decode_images`.
        region: four numbers in [0, 1) that choose the part of the image that is taken, as in `random_region`; None: its
            middle. Not without ``image_size``.

    Raises:
        BrokenImageError: it cannot be decoded, or is missing in its table.
        DataError: its file cannot be read, or it has more than 8 bits a channel.
    """
    content = _content(where, source)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise DataError(f"{where}: the image has mode {image.mode}, not 8 bits a channel; convert it first")
            box = None if image_size is None or region is None else random_region(image.size, region)
            full = image.size
            if image_size is not None:
                # JPEG can decode at a fraction of the size; twice the target keeps the resize smooth.
                part = (1.0, 1.0) if box is None else ((box[2] - box[0]) / full[0], (box[3] - box[1]) / full[1])
                image.draft("RGB", (math.ceil(2 * image_size / part[0]), math.ceil(2 * image_size / part[1])))
            rgb = _to_rgb(image)
        if box is not None and image_size is not None:
            # A float box may end a rounding error behind the image, which Pillow refuses.
            across, down = rgb.width / full[0], rgb.height / full[1]
            scaled = (box[0] * across, box[1] * down, min(box[2] * across, rgb.width), min(box[3] * down, rgb.height))
            rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR, box=scaled)
        elif image_size is not None:
            rgb = _square(rgb, image_size)
        return np.asarray(rgb).transpose(2, 0, 1)
    except DataError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes: struct.error, SyntaxError, ...
        raise _broken(where, error) from error


def size_on_disk(where: str, source: bytes | Path | None) -> tuple[int, int]:
    """Height and width of an image, which is not decoded; arguments and errors as in `decode_image`."""
    content = _content(where, source)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # as above
        raise _broken(where, error) from error


def _content(where: str, source: bytes | Path | None) -> bytes:
    if source is None:
        raise BrokenImageError(f"{where}: image is missing")
    try:
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: the image cannot be read ({error.strerror}); was it moved or removed?") from None


def _broken(where: str, error: Exception) -> BrokenImageError:
    return BrokenImageError(f"{where}: the image cannot be decoded ({type(error).__name__}: {error})")


def random_region(size: tuple[int, int], numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """A part of an image of 8 % to 100 % of its area and of proportions from 3:4 to 4:3 (as Inception was trained).

    Reconstruction: what does not fit is cut to the image's side; torchvision draws again.

    Args:
        size: width and height of the image.
        numbers: four in [0, 1): for area, proportions, column and row.

    Returns:
        Left, top, right and bottom, in pixels.
    """
    width, height = size
    area = width * height * (_LEAST_AREA + (1 - _LEAST_AREA) * numbers[0])
    proportions = math.exp(math.log(4 / 3) * (2 * numbers[1] - 1))
    wide, tall = min(math.sqrt(area * proportions), width), min(math.sqrt(area / proportions), height)
    left, top = numbers[2] * (width - wide), numbers[3] * (height - tall)
    return left, top, left + wide, top + tall


def host_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size`` and centre crop, in one step."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
