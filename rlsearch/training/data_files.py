"""A user's own images: Parquet shards and image folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rlsearch.errors import DataError
from rlsearch.training.encoded_images import FileImages, RawSplit, Shard, ShardImages

# The held-out images: what the user calls test, else what the user calls validation (ours is split off train).
_SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def read_parquet(split: str, folder: Path, image_size: int | None) -> RawSplit:
    """A folder with train-*.parquet and test-*.parquet (or val-*.parquet), and perhaps classes.json.

    Columns: ``image`` (binary: an encoded image) and ``label`` (whole numbers from 0). ``classes.json`` is a list of
    names, or of ``{"label": 0, "name": "..."}``; without it the training labels must run from 0 without a gap.

    Args:
        split: ``train`` or ``test``; the shards of the other one are not opened, except that a set without
            classes.json learns its number of classes from the labels of train.
        folder: where the shards lie.
        image_size: as in `decode_images`.

    Raises:
        DataError: what is missing or of the wrong form, with the shard and the row.
    """
    _check_folder(folder)
    shards = _read_labels(folder, split)
    classes = _read_classes(folder)
    if classes is None:
        train = shards if split == "train" else _read_labels(folder, "train")
        classes = _classes_from_labels(train, folder)
    for shard in shards:
        _check_range(shard, len(classes))
    labels = np.concatenate([shard.labels for shard in shards])
    return RawSplit.of(labels, classes, ShardImages(shards, image_size))


def read_image_folder(split: str, folder: Path, image_size: int | None) -> RawSplit:
    """One folder a class, below ``train/`` and ``test/`` (or ``val/``), or right below ``folder`` (then all is train).

    Args:
        split: ``train`` or ``test``.
        folder: the root.
        image_size: as in `decode_images`.

    Raises:
        DataError: no class folders, a class without images, or a test class that train does not have.
    """
    _check_folder(folder)
    train = folder / "train" if (folder / "train").is_dir() else folder
    classes = _class_names(train)
    root = train if split == "train" else _test_folder(folder, train)
    unknown = [name for name in _class_names(root) if name not in classes]
    if unknown:
        raise DataError(f"{root}: class folders {', '.join(unknown)} are not among those of {train}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
        if not found and (split == "train" or (root / name).is_dir()):
            raise DataError(f"{root / name}: no image in the folder of this class ({', '.join(_IMAGE_SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return RawSplit.of(np.array(labels, dtype=np.int64), classes, FileImages(files, image_size))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"data folder {folder} {what}; give the folder that holds the images")


def _read_labels(folder: Path, split: str) -> list[Shard]:
    """Every shard of a split with its labels, in name order."""
    for name in _SPLIT_NAMES[split]:
        paths = sorted(path for path in folder.iterdir() if re.fullmatch(rf"{name}([-_.].*)?\.parquet", path.name))
        if paths:
            shards = [_read_shard(path) for path in paths]
            if not any(len(shard.labels) for shard in shards):
                raise DataError(f"{folder}: the {name} shards hold no rows")
            return shards
    wanted = " or ".join(f"{name}-*.parquet" for name in _SPLIT_NAMES[split])
    found = sorted(path.name for path in folder.iterdir())[:10]
    raise DataError(f"{folder}: no {wanted}; found {', '.join(found) or 'nothing'}")


def _read_shard(path: Path) -> Shard:
    """The labels of a shard; its images stay unread."""
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, path)
            column = file.read(columns=["label"]).column("label")
            sizes = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DataError(f"{path}, row {row}: label is missing")
        labels: npt.NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet, it may be truncated: {error}") from None
    return Shard(path, labels, sizes)


def _check_schema(schema: Any, path: Path) -> None:
    wrong = []
    for name, accepted, words in (
        ("image", (pa.types.is_binary, pa.types.is_large_binary), "binary (an encoded image)"),
        ("label", (pa.types.is_integer,), "whole numbers"),
    ):
        if name not in schema.names:
            wrong.append(f"column {name!r} is missing, found: {', '.join(schema.names)}")
        elif not any(accepts(schema.field(name).type) for accepts in accepted):
            wrong.append(f"column {name!r} must be {words}, got {schema.field(name).type}")
    if wrong:
        raise DataError(f"{path}: {'; '.join(wrong)}")


def _read_classes(folder: Path) -> tuple[str, ...] | None:
    path = folder / "classes.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    entries = content if isinstance(content, list) else []
    names: list[Any] = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
    labels = [entry.get("label", index) if isinstance(entry, dict) else index for index, entry in enumerate(entries)]
    if not names or not all(isinstance(name, str) for name in names) or labels != list(range(len(names))):
        raise DataError(f'{path} must be a list of class names, or of {{"label": 0, "name": "..."}} in label order')
    return tuple(names)


def _classes_from_labels(shards: Sequence[Shard], folder: Path) -> tuple[str, ...]:
    present = np.unique(np.concatenate([shard.labels for shard in shards]))
    negative = next((shard for shard in shards if (shard.labels < 0).any()), None)
    if negative is not None:
        _check_range(negative, int(present[-1]) + 1)
    if present[-1] != len(present) - 1:
        gap = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise DataError(
            f"{folder}: labels of train must run from 0 without a gap, but no image has label {gap} and the largest "
            f"label is {present[-1]}; number them anew, or name all classes in classes.json"
        )
    return tuple(str(label) for label in present)


def _check_range(shard: Shard, num_classes: int) -> None:
    outside = np.flatnonzero((shard.labels < 0) | (shard.labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{shard.path}, row {row}: label {shard.labels[row]} is out of range, it must be in "
            f"[0, {num_classes - 1}] for {num_classes} classes"
        )


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders; put the images of each class into a folder of their own")
    return names


def _test_folder(folder: Path, train: Path) -> Path:
    for name in _SPLIT_NAMES["test"]:
        if train != folder and (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder}: there is no test split; put it into {folder / 'test'}, beside {folder / 'train'}")
