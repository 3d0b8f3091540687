"""Tables on disk: Parquet of a fixed schema, whole or not at all.

Every table carries the SHA-256 of its rows, so that a torn or flipped byte is noticed and never becomes a wrong front.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
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


def write_rows(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """Writes a table, whole or not at all.

    Raises:
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    table = pa.Table.from_pylist(rows, schema=schema)
    table = table.replace_schema_metadata({_DIGEST: _digest(table.to_pylist())})
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
        rows: list[dict[str, Any]] = table.to_pylist()
        if (table.schema.metadata or {}).get(_DIGEST) != _digest(rows):
            raise damaged(path, "its rows are not those that were written", remedy)
    except RunFolderError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise damaged(path, error, remedy) from None
    for row in rows:
        for name in schema.names:
            if schema.field(name).type == TIME and row[name] is not None:
                row[name] = row[name].astimezone(UTC)
    return rows


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


def _digest(rows: list[dict[str, Any]]) -> bytes:
    """The SHA-256 of a table's rows, whatever the file's encoding."""
    text = json.dumps(rows, sort_keys=True, default=datetime.isoformat)
    return hashlib.sha256(text.encode()).hexdigest().encode()
