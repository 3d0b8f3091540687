"""Ctrl-C and SIGTERM: the first one asks the search to stop, the second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether somebody asked the search to stop.

    Attributes:
        signal_number: of the first signal that arrived, or None.
    """

    signal_number: int | None = None

    @property
    def exit_code(self) -> int | None:
        """What a shell expects of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return None if self.signal_number is None else 128 + self.signal_number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a `StopRequest` while the block runs; afterwards they mean what they did before.

    The handler only takes a note: an exception thrown into the middle of a write could not be told from a failed one.
    A second signal ends the process there and then. The study is whole at any moment, so the run can still be resumed.
    Outside of the main thread Python cannot handle signals, and nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None:
            os._exit(128 + signal_number)
        request.signal_number = signal_number

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
