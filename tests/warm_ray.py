"""A Ray of the tests' own whose drivers and workers are forked from a process that has imported everything.

Every driver of a search, and every worker of Ray, would else spend seconds on importing torch and Ray: a test that ends
thirty drivers one after the other would wait for nothing else. They stay real: a driver is a process with a connection
of its own to Ray, a worker runs Ray's own ``default_worker.py``, and each can be killed alone.

Ray starts this file in place of its ``setup_worker.py``; it then hands its command over to the process that forks. It
must therefore import the standard library alone, and quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ADDRESS = "RLSEARCH_TESTS_FORKS"
_PATIENCE_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>: this process ends when the one that started it does


class Forked:
    """A process that was forked: its id, its end.

    Attributes:
        pid: its process id, that of its session and process group too.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._exit_code: int | None = None
        self.pid = int(connection.recv(20).decode())

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code, a signal's number below 0; None where it has not ended in time."""
        if self._exit_code is None:
            self._connection.settimeout(seconds)
            try:
                told = self._connection.recv(20).decode()
            except (TimeoutError, BlockingIOError):
                return None
            self._exit_code = os.waitstatus_to_exitcode(int(told))
            self._connection.close()
        return self._exit_code

    def kill(self) -> None:
        """Ends it as the kernel would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process that forks, as others reach it.

    Args:
        socket_path: where it listens.
    """

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path

    def start(self, function: str, *arguments: Any, output: Path | None = None) -> Forked:
        """Calls ``module:function`` with plain arguments in a process and a session of its own.

        Args:
            function: what is called; its return value is not used.
            arguments: of the call, as JSON holds them.
            output: the file that takes what the process prints; None for this process's own outputs.
        """
        order = {"function": function, "arguments": arguments, "session": True}
        if output is None:
            return self._send(order, [1, 2])
        with output.open("ab") as file:
            return self._send(order, [file.fileno(), file.fileno()])

    def become_worker(self, command: Sequence[str]) -> int:
        """Runs a Ray worker, and is as long as it lives."""
        own = ("--language=", "--serialized-runtime-env-context=")  # what `setup_worker.py` itself takes
        command = [argument for argument in command if not argument.startswith(own)]
        order = {"command": command, "environment": dict(os.environ), "folder": os.getcwd()}
        worker = self._send(order, [1, 2])
        signal.signal(signal.SIGTERM, lambda *_: os.kill(worker.pid, signal.SIGTERM))
        return worker.wait() or 0

    def _send(self, order: dict[str, Any], outputs: list[int]) -> Forked:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._path)
        socket.send_fds(connection, [json.dumps(order).encode()], outputs)
        return Forked(connection)


@contextlib.contextmanager
def warm_ray(num_cpus: int, modules: Sequence[str], warm_up: str, *arguments: Any) -> Iterator[tuple[str, Forks]]:
    """A Ray, and the process that forks its drivers and workers.

    Args:
        num_cpus: what Ray counts.
        modules: what drivers and workers import.
        warm_up: a ``module:function``; what a call of it imports is imported before anything is forked.
        arguments: of the call.

    Yields:
        the address for a driver to connect to, and what starts drivers.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray.experimental.internal_kv import _internal_kv_reset

    from rlsearch.search.cluster import _ENVIRONMENT
    from rlsearch.search.watchdog import note_shutdown, start_watchdog

    with tempfile.TemporaryDirectory(prefix="rl-warm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        path, folder = f"{name}/forks", Path(name) / "ray"
        folder.mkdir()
        token = Path(name) / "token"  # in a folder that only this user can read
        token.write_text(os.urandom(32).hex())
        environment = os.environ | _ENVIRONMENT
        environment |= {
            _ADDRESS: path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # Arrow would start a thread
            "OMP_NUM_THREADS": "1",  # and NumPy's linear algebra some more
        }
        command = [sys.executable, __file__, "--serve", path, json.dumps([list(modules), warm_up, arguments])]
        with subprocess.Popen(command, env=environment) as server, _environment(environment):
            node, watchdog = None, start_watchdog(folder)  # it ends Ray where these tests are killed
            assert watchdog.stdin is not None  # it was started with a pipe
            try:
                _await(path, server)
                node = Node(
                    RayParams(
                        num_cpus=num_cpus,
                        num_gpus=0,
                        include_dashboard=False,
                        object_store_memory=150 * 2**20,
                        temp_dir=str(folder),
                        setup_worker_path=__file__,
                    ),
                    head=True,
                    shutdown_at_exit=False,
                    spawn_reaper=False,
                )
                yield node.gcs_address, Forks(path)
            finally:
                if node is not None:
                    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
                    # Or Tune, as this process ends, would ask that node for a minute and then end it with 1.
                    _internal_kv_reset()
                    note_shutdown(folder)
                server.kill()
                watchdog.stdin.close()
                watchdog.wait()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The environment of Ray's servers, taken back afterwards; the Ray of this process looks at it both times."""
    from ray._raylet import AuthenticationTokenLoader, Config

    def refresh() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    before = dict(os.environ)
    os.environ.update(values)
    refresh()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        refresh()


def _await(path: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not os.path.exists(path):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the process that forks did not start")
        time.sleep(0.05)


def _serve(path: str, modules: Sequence[str], warm_up: str, arguments: Sequence[Any]) -> None:
    """Forks a process for everyone who connects, and tells its process id and, later, its end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ray reads these once, when it is imported: a worker for whatever job, which ends when this process does.
    os.environ |= {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": str(os.getpid())}
    for module in [*modules, *_imported_by(warm_up, arguments)]:
        with contextlib.suppress(ImportError):  # a few cannot be imported by themselves
            importlib.import_module(module)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        raise RuntimeError(f"a thread was started, which no fork would have: {threads}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".new")
    listener.listen(64)
    waiting: dict[int, socket.socket] = {}

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                connection = waiting.pop(ended[0])
                with contextlib.suppress(OSError):  # whoever asked may have ended
                    connection.send(str(ended[1]).encode())
                connection.close()

    signal.signal(signal.SIGCHLD, reap)
    os.rename(path + ".new", path)
    while True:
        connection, _ = listener.accept()
        content, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until its connection is noted
        pid = os.fork()
        if pid == 0:
            listener.close()
            for other in [*waiting.values(), connection]:
                other.close()
            _live(json.loads(content), outputs)
        waiting[pid] = connection
        with contextlib.suppress(OSError):
            connection.send(str(pid).encode())
        for output in outputs:
            os.close(output)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _imported_by(warm_up: str, arguments: Sequence[Any]) -> list[str]:
    """What a call imports; a child makes it, for it may start threads, which no fork would have."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            before = set(sys.modules)
            _function(warm_up)(*arguments)
            with open(writer, "w") as file:
                file.write("\n".join(sorted(set(sys.modules) - before)))
        except BaseException:  # noqa: BLE001  # it is the last frame of this process
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        found = file.read().split()
    os.wait()
    return found


def _live(order: dict[str, Any], outputs: Sequence[int]) -> None:
    """What a forked process does; it does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for place, output in enumerate(outputs, start=1):
            os.dup2(output, place)
            os.close(output)
        if "function" in order:
            os.setsid()
            del os.environ["RAY_JOB_ID"], os.environ["RAY_RAYLET_PID"]
            _function(order["function"])(*order["arguments"])
        else:
            os.environ.clear()
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
            sys.argv = order["command"]
            runpy.run_path(order["command"][0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # it is the last frame of this process
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2], *json.loads(sys.argv[3]))
    else:
        sys.exit(Forks(os.environ[_ADDRESS]).become_worker(sys.argv[1:]))
