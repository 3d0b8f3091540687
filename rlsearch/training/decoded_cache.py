"""Decoded images on disk: a set is decoded once a machine, and mapped into memory from then on.

An entry is one whole decoded split, under a name made from the bytes of its files and from all else that decides its
pixels: a changed file, image size or decoder makes a new entry, and a moved folder keeps its own. It is a ``.npy`` file
with a checksum behind it, which appears whole or not at all. Whatever is wrong with the cache (no room, no right to
write, damage), a warning is logged and images are decoded as if there were none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock
from PIL import features

from rlsearch.errors import DataError
from rlsearch.files import replacing, write_atomic
from rlsearch.training.data_decode import Pixels
from rlsearch.training.data_split import Indices
from rlsearch.training.encoded_images import EncodedImages, RawSplit

_LOG = logging.getLogger(__name__)

# To be raised with every change of the files' form, or of how encoded images become pixels.
_VERSION = 1
# A part of a split is worth decoding the whole for, if it is this share of it or the whole is so small.
_WORTH_WHOLE, _SMALL = 0.25, 2000
# Of what is free on the disk and what the cache has of it already.
_DISK_SHARE = 0.25
_BLOCK = 1024
# Of a digest, in characters.
_NAME = 32
# A file changed so shortly ago may change again within one tick of its clock.
_SETTLED_SECONDS = 2.0
_ABANDONED_SECONDS = 86400.0


def cache_folder() -> Path:
    """``$RLSEARCH_CACHE/decoded``, by default ``rlsearch/decoded`` in the user's folder for caches."""
    own = os.environ.get("RLSEARCH_CACHE")
    if own:
        return Path(own).expanduser() / "decoded"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlsearch" / "decoded"


def cached(raw: RawSplit, chosen: Indices) -> RawSplit:
    """``raw`` with its pixels read from the cache, where they are there or are worth being put there.

    A quarter of a split or more is worth decoding all of it, so that other limits and seeds find it too; less is
    decoded alone every time (and files are not read whole to look for it), unless the whole is known to be there.

    Args:
        raw: a split; one that needs no decoding comes back as it is.
        chosen: the positions that will be asked for.
    """
    images = raw.encoded
    if images is None or not len(chosen):
        return raw
    few = len(chosen) < _WORTH_WHOLE * len(raw.labels) and len(raw.labels) > _SMALL
    try:
        pixels = _stored(images, len(raw.labels), only_if_there=few)
    except DataError:
        # What cannot be decoded may lie outside of what was asked for; if not, the caller meets it again.
        return raw
    except (OSError, NotImplementedError) as error:
        _LOG.warning("decoded images are not kept in %s (%s); they are decoded again next time", cache_folder(), error)
        return raw
    return raw if pixels is None else replace(raw, pixels=partial(_taken, pixels))


def _taken(pixels: Pixels, indices: Indices, broken: list[int] | None) -> Pixels:
    return np.ascontiguousarray(pixels[indices])


def _stored(images: EncodedImages, count: int, *, only_if_there: bool) -> Pixels | None:
    """The whole split, mapped; decoded first where it must be, or None where it may not."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # Which entry the files have, without reading them, as long as nobody has touched them.
    known = folder / f"{_digest_of_stats(images)}.key"
    name = _name_in(known)
    if name is None:
        if only_if_there:
            return None
        settled = _are_settled(images.files)
        name = _digest_of_contents(images)
        if settled:
            write_atomic(known, name.encode("ascii"))
    path = folder / f"{name}.npy"
    pixels = _mapped(path, count)
    if pixels is None and not only_if_there:
        # Another process that wants the same waits here, and then finds it. Should a lock ever be lost, both decode.
        with FileLock(path.with_suffix(".lock")):
            pixels = _mapped(path, count)
            if pixels is None:
                _write(path, images, count)
                pixels = _mapped(path, count)
    return pixels


def _digest_of_stats(images: EncodedImages) -> str:
    digest = hashlib.sha256(_decoder(images).encode())
    for file in images.files:
        stat = file.stat()
        digest.update(f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:_NAME]


def _digest_of_contents(images: EncodedImages) -> str:
    digest = hashlib.sha256(_decoder(images).encode())
    for file in images.files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:_NAME]


def _decoder(images: EncodedImages) -> str:
    """All that decides pixels beside the files: two libraries may round differently."""
    libraries = [features.version(name) for name in ("jpg", "webp", "zlib", "libtiff")]
    return repr((_VERSION, type(images).__name__, images.image_size, PIL.__version__, libraries))


def _are_settled(files: Sequence[Path]) -> bool:
    return max(file.stat().st_mtime for file in files) < time.time() - _SETTLED_SECONDS


def _mapped(path: Path, count: int) -> Pixels | None:
    """The images of an entry (count, 3, H, W), read-only; None where it is missing or damaged."""
    try:
        pixels: np.memmap[tuple[int, ...], np.dtype[np.uint8]] = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            header = file.read(pixels.offset)
            file.seek(pixels.nbytes, os.SEEK_CUR)
            checksum = file.read()
        expected = zlib.crc32(pixels.reshape(-1).data, zlib.crc32(header))
        if checksum == _checksum_bytes(expected) and len(pixels) == count:
            with contextlib.suppress(OSError):  # a shared cache may be there to be read alone
                os.utime(path)  # the oldest used leaves first
            return pixels
        reason = "its checksum is wrong"
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, SyntaxError) as error:
        reason = str(error)
    _LOG.warning("%s is damaged (%s); its images are decoded again", path, reason)
    return None


def _write(path: Path, images: EncodedImages, count: int) -> None:
    """Decodes all images, block by block, so that they are never in memory together.

    Raises:
        DataError: an image cannot be decoded.
        OSError: there is no room.
    """
    checksum, first_shape = 0, None
    header = io.BytesIO()
    with replacing(path) as temporary, temporary.open("wb") as file:
        for start in range(0, count, _BLOCK):
            block = images.pixels(np.arange(start, min(start + _BLOCK, count)))
            if first_shape is None:
                first_shape = block.shape[1:]
                _make_room(path.parent, count * block[0].nbytes)
                form = {"descr": "|u1", "fortran_order": False, "shape": (count, *first_shape)}
                np.lib.format.write_array_header_1_0(header, form)
                file.write(header.getvalue())
                checksum = zlib.crc32(header.getvalue())
            if block.shape[1:] != first_shape:
                raise DataError(f"the images are not all of one size: {first_shape} and {block.shape[1:]}")
            file.write(block.data)
            checksum = zlib.crc32(block.data, checksum)
        file.write(_checksum_bytes(checksum))


def _checksum_bytes(checksum: int) -> bytes:
    return checksum.to_bytes(4, "little")


def _make_room(folder: Path, needed: int) -> None:
    """Removes the entries that were used the longest ago until ``needed`` bytes fit into the cache's share of the disk.

    Raises:
        OSError: they never fit.
    """
    entries = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.npy"))
    used = sum(size for _, size, _ in entries)
    share = int(_DISK_SHARE * (shutil.disk_usage(folder).free + used))
    if needed > share:
        raise OSError(f"{needed / 1e9:.2f} GB are more than the cache's share of the disk, {share / 1e9:.2f} GB")
    for _, size, file in entries:
        if used + needed <= share:
            break
        file.unlink(missing_ok=True)
        file.with_suffix(".lock").unlink(missing_ok=True)
        used -= size
    _remove_abandoned(folder)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes were writing, and the keys and locks of entries that are gone."""
    for file in [*folder.glob(".*"), *folder.glob("*.key"), *folder.glob("*.lock")]:
        try:
            old = file.stat().st_mtime < time.time() - _ABANDONED_SECONDS
        except FileNotFoundError:  # another process has just finished writing it
            continue
        name = _name_in(file) if file.suffix == ".key" else file.stem
        if old and not (name and (folder / f"{name}.npy").exists()):
            file.unlink(missing_ok=True)


def _name_in(key: Path) -> str | None:
    """The name of the entry that a key leads to; None where there is none."""
    try:
        name = key.read_bytes()
    except FileNotFoundError:
        return None
    return name.decode() if re.fullmatch(rb"[0-9a-f]{%d}" % _NAME, name) else None
