"""What the package logs while a command runs, as the user should see it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def shown_warnings() -> Iterator[None]:
    """The package's warnings go to the standard error, each once, whatever other packages do to logging's root."""
    logger = logging.getLogger("rlsearch")
    handler, propagates = _ToStandardError(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)
        except Exception:  # noqa: BLE001  # as every handler: what is logged must not end what logs it
            self.handleError(record)
