"""Ctrl-C on the command line: the first one interrupts, a further one ends the process; the exit code is 130."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGINT


def handle_ctrl_c() -> None:
    """Installs the handler; nothing where whoever started the process has Ctrl-C ignored or handled."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    interrupted, otherwise = False, sys.unraisablehook

    def handle(signal_number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            os._exit(EXIT_CODE)
        interrupted = True
        raise KeyboardInterrupt

    def unraisable(told: Any) -> None:
        # One that came in a destructor, or as a process was forked: Python would print it and go on.
        if isinstance(told.exc_value, KeyboardInterrupt):
            os._exit(EXIT_CODE)
        otherwise(told)

    signal.signal(signal.SIGINT, handle)
    sys.unraisablehook = unraisable
    # Registered first, this runs last. Python then takes its handlers down, and a signal that came while it unloads its
    # modules would end the process by itself and hide the exit code.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
