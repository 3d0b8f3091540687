"""Ctrl-C at every moment of a process's life, with real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

CODE = """
import atexit, signal, sys, time
# As in a terminal: a test run in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlsearch.cli.ctrl_c import handle_ctrl_c
handle_ctrl_c()
class Late:
    def __del__(self, sleep=time.sleep):
        print("unloading", flush=True); sleep(0.5)
sys.modules["late"] = Late()
class Collected:
    def __del__(self):
        print("collecting", flush=True); time.sleep(20)
if "exit" in sys.argv:
    atexit.register(lambda: (print("leaving", flush=True), time.sleep(20)))
try:
    if "collect" in sys.argv:
        Collected()
    print("running", flush=True)
    time.sleep(20 if "unload" not in sys.argv else 0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(20 if "twice" in sys.argv else 0)
sys.exit(130)
"""


@pytest.mark.parametrize(
    ("case", "moments"),
    [
        ("once", ["running"]),
        ("twice", ["running", "interrupted"]),
        ("exit", ["running", "leaving"]),
        ("unload", ["unloading"]),
        ("collect", ["collecting"]),
    ],
)
def test_it_ends_at_once_and_with_130_whenever_it_comes(case: str, moments: list[str]) -> None:
    started = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CODE, case], **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for moment in moments:
            assert any(line.strip() == moment for line in process.stdout)
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
        assert process.stderr.read() == ""
    assert time.monotonic() - started < 15
