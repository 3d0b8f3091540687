"""Tables on disk: Parquet of a fixed schema, whole or not at all.

Every table carries the SHA-256 of its rows, so that a torn or flipped byte is noticed and never becomes a wrong front.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rlsearch.errors import RunFolderError
from rlsearch.files import replacing

Record = TypeVar("Record")

METRICS = (
    "accuracy",
    "params",
    "params_total",
    "memory",
    "memory_predicted",
    "train_flops",
    "forward_flops",
    "forward_share",
    "mean_learnable_params",
    "train_seconds",
    "samples_per_second",
)
"""The columns that may be objectives, and that ``--where`` and ``--select`` know."""

INTEGER, NUMBER, TEXT, TIME = pa.int64(), pa.float64(), pa.string(), pa.timestamp("us", tz="UTC")
METRIC_TYPES = {name: INTEGER if name.startswith(("params", "memory")) else NUMBER for name in METRICS}
_DIGEST = b"rlsearch.sha256"
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


def write_rows(
    path: Path, schema: pa.Schema, rows: list[dict[str, Any]], marks: Mapping[str, str] | None = None
) -> None:
    """Writes a table, whole or not at all.

    Args:
        path: the file.
        schema: its columns.
        rows: name to value.
        marks: what the file says beside its rows, by name; see `read_mark`.

    Raises:
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    table = pa.Table.from_pylist(rows, schema=schema)
    said: dict[Any, Any] = {_DIGEST: _digest(_columns(table)), **(marks or {})}
    table = table.replace_schema_metadata(said)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rows(path: Path, schema: pa.Schema, remedy: str) -> list[dict[str, Any]]:
    """The rows of a table, if they are the ones that were written.

    Args:
        path: the file.
        schema: its columns.
        remedy: what helps where it is missing or damaged, for messages.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    if not path.is_file():
        raise RunFolderError(f"{path}: is missing; {remedy}")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        if not table.schema.equals(schema):
            raise damaged(path, "its columns are not those of this version of rlsearch", remedy)
        columns = _columns(table)
        if (table.schema.metadata or {}).get(_DIGEST) != _digest(columns):
            raise damaged(path, "its rows are not those that were written", remedy)
    except RunFolderError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise damaged(path, error, remedy) from None
    for name in schema.names:
        if schema.field(name).type == TIME:
            columns[name] = [None if value is None else _EPOCH + value * _MICROSECOND for value in columns[name]]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def read_mark(path: Path, name: str, remedy: str) -> str | None:
    """What a table says beside its rows; None where it says nothing of that name.

    Args:
        path: as in `read_rows`, and so is ``remedy``.
        name: of the mark.
        remedy: what helps where the table is damaged.

    Raises:
        RunFolderError: the file is damaged.
    """
    try:
        value = (pq.read_schema(path).metadata or {}).get(name.encode())
        return None if value is None else value.decode()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error, remedy) from None


def read_records(path: Path, schema: pa.Schema, remedy: str, make: Callable[..., Record]) -> list[Record]:
    """The rows of a table as records, which check themselves.

    Args:
        path: as in `read_rows`, and so are ``schema`` and ``remedy``.
        schema: its columns.
        remedy: what helps where it is missing or damaged.
        make: a record's type, which takes the columns by name and raises ValueError for what it cannot be.

    Raises:
        RunFolderError: the file is missing, damaged, or of another form.
    """
    rows = read_rows(path, schema, remedy)
    try:
        return [make(**row) for row in rows]
    except ValueError as error:
        raise damaged(path, error, remedy) from None


def damaged(path: Path, why: object, remedy: str) -> RunFolderError:
    """The error for a table that is not whole."""
    return RunFolderError(f"{path}: is damaged ({' '.join(str(why).split())}); {remedy}")


def _columns(table: pa.Table) -> dict[str, list[Any]]:
    """The values by column, times as microseconds: many small objects of ten thousand rows would take a second."""
    plain = {
        name: table[name].cast(INTEGER) if table[name].type == TIME else table[name] for name in table.column_names
    }
    return {name: column.to_pylist() for name, column in plain.items()}


def _digest(columns: dict[str, list[Any]]) -> bytes:
    """The SHA-256 of a table's values, whatever the file's encoding."""
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        # Texts that hold JSON would be escaped once more, which takes longer than all the rest.
        is_text = all(isinstance(value, str) for value in values)
        digest.update(json.dumps([name, [len(value) for value in values] if is_text else values]).encode())
        digest.update("".join(values).encode() if is_text else b"")
    return digest.hexdigest().encode()
