"""Ray for one search: started with an explicit address, quiet, and gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsearch.errors import ConfigError, Problem, SearchError, UserError
from rlsearch.search.cluster_access import environment, private_access, wants_token
from rlsearch.search.watchdog import note_shutdown, start_watchdog

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a search phones nobody
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own progress output; the other one is off by verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a search space are the user's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tomorrow's behaviour, without the note about it
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers run in this environment, whatever started the driver
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run's tables are written from the study
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `rlsearch.search.interrupts` has the signals
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # a resume never reads Tune's own state
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a lost worker is told by the run's own progress
    "TUNE_WARN_THRESHOLD_S": "60",  # proposing a policy may well take longer than Tune's half a second
}
_CONNECT_SECONDS = 10.0
# Ray wants at least 75 MiB; the images lie there once, with room for what Ray itself puts beside them.
_OBJECT_STORE_BYTES = 128 * 2**20
# A socket's path has at most 107 characters; our folder and Ray's in it take 20, and Ray's own names up to 64.
_LONGEST_FOLDER = 23
# What a CUDA context and the libraries' kernels take, beside the tensors that the prediction counts.
_CUDA_CONTEXT_BYTES = 2**30
_MEMORY_SLACK = 1.5
_MOST_TRIALS_A_GPU = 8


@dataclass(frozen=True)
class Slots:
    """How many trials run at once, and what each of them gets.

    Attributes:
        count: trials at once (>= 1).
        cpu: CPU cores of one process.
        gpu: the share of one GPU, or whole GPUs, of one process; 0 for training on the CPU.
        workers: how many processes train one trial together.
    """

    count: int
    cpu: float
    gpu: float
    workers: int = 1

    @property
    def num_threads(self) -> int:
        """Threads that a process may keep busy."""
        return max(1, int(self.cpu))

    @property
    def sharing(self) -> int:
        """How many trials may train on one device at once; the CPU is one device."""
        if not self.gpu:
            return self.count
        return min(self.count, max(1, _whole(1 / self.gpu)))


@contextlib.contextmanager
def ray_cluster(address: str = "local", shared_bytes: int = 0) -> Iterator[Path]:
    """Ray, from start to end: a cluster of this machine and user alone, or a connection to one that exists.

    Args:
        address: ``local``, or the address of a running cluster.
        shared_bytes: what will be put into the object store once.

    Yields:
        a folder for Tune's own files, removed afterwards with all processes of a local cluster, even if this process
        is killed.

    Raises:
        SearchError: Ray cannot be started, or the cluster cannot be reached.
    """
    import ray

    with environment(_ENVIRONMENT), _temporary_folder() as folder, contextlib.ExitStack() as access:
        started = not ray.is_initialized()
        if started:
            if address == "local":
                access.enter_context(private_access(folder))
            _start(address, folder, shared_bytes)
        try:
            yield folder
        finally:
            if started:
                ray.shutdown()
            note_shutdown(folder)


def check_address(address: str) -> None:
    """Whether an address names one cluster that can be reached.

    ``auto`` is refused: it joins whatever Ray it finds on the machine, a stranger's too. And Ray itself would try for
    minutes to reach a cluster that is not there.

    Raises:
        UserError: it does not, nothing answers there, or the cluster wants a token and none is to be sent.
    """
    if address == "local":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address: must be local or a cluster's HOST:PORT, as in 10.0.0.1:6379, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--address: nothing answers at {address} ({error}); start the cluster's head first, or leave it out to "
            "use this machine alone"
        ) from None
    if wants_token(address) and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise UserError(
            f"--address: the cluster at {address} wants a token: export RAY_AUTH_MODE=token, with the token in "
            "~/.ray/auth_token, or its file's path in RAY_AUTH_TOKEN_PATH"
        )


def plan_slots(
    cpu: float,
    gpu: float | None,
    predicted_bytes: int,
    resources: Mapping[str, float],
    gpu_bytes: int | None = None,
    most: int | None = None,
    workers: int = 1,
) -> Slots:
    """How many trials fit at once.

    Args:
        cpu: cores of one process.
        gpu: GPUs of one process; None for ``auto``: as many trials share a GPU as its memory and the cores allow, at
            most eight, for beyond that they only wait for each other. Processes that train one trial together share
            none: each has one whole GPU, where there is any.
        predicted_bytes: what the largest trial takes of a GPU's memory, as predicted.
        resources: the cluster's ``CPU`` and ``GPU``, as Ray counts them.
        gpu_bytes: the memory of one GPU, where it is known.
        most: never more trials than this.
        workers: how many processes train one trial together.

    Raises:
        ConfigError: one trial asks for more than there is.
    """
    cores, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    problems = []
    if cpu > cores:
        problems.append(Problem("resources.cpu", f"must be at most the {cores:g} cores there are, got {cpu:g}"))
    if gpu is not None and gpu > gpus:
        rule = f"must be at most the {gpus:g} GPUs there are, got {gpu:g}; auto takes what there is"
        problems.append(Problem("resources.gpu", rule))
    if gpu is None and workers > 1:
        gpu = 1.0 if gpus else 0.0
    if not problems and workers > 1:
        problems += _check_workers(workers, cpu, gpu or 0.0, cores, gpus)
    if problems:
        raise ConfigError(problems, "search space")
    by_cores = int(cores // (cpu * workers))
    if gpu is None:
        share = _trials_a_gpu(predicted_bytes, gpu_bytes, by_cores, gpus)
        gpu = 1 / share if gpus else 0.0
    count = by_cores
    if gpu:
        a_gpu = _whole(1 / gpu)
        processes = int(gpus) * a_gpu if gpu <= 1 else int(gpus // gpu)
        count = min(by_cores, processes // workers)
    return Slots(max(1, min(count, most or count)), cpu, gpu, workers)


def gpu_memory_bytes() -> int | None:
    """The memory of this machine's smallest GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return min(int(torch.cuda.get_device_properties(i).total_memory) for i in range(torch.cuda.device_count()))


def memory_fraction(gpu: float, gpu_bytes: int) -> float:
    """The share of a GPU's memory that torch may give out to a trial with a share of the GPU: without what its CUDA
    context takes, which torch does not count, so that as many trials as there are shares fit side by side."""
    return max(gpu - _CUDA_CONTEXT_BYTES / gpu_bytes, gpu / 2)


def machine_cpus() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_workers(workers: int, cpu: float, gpu: float, cores: float, gpus: float) -> list[Problem]:
    """Whether the processes of one trial have room beside each other."""
    found = []
    for each, there, what, less in (
        (cpu, cores, "cores", "a lower resources.cpu"),
        (gpu, gpus, "GPUs", "resources.gpu to 0 for the CPU"),
    ):
        if workers * each > there:
            rule = f"{workers} of them with {each:g} {what} each need {workers * each:g}, and there are {there:g}"
            found.append(Problem("resources.workers", f"{rule}; ask for fewer workers, or set {less}"))
    return found


def _whole(number: float) -> int:
    """The whole part, where rounding may have left a number just below it: 1/3 is less than a third."""
    return int(number + 1e-9)


def _trials_a_gpu(predicted_bytes: int, gpu_bytes: int | None, by_cores: int, gpus: float) -> int:
    if not gpus:
        return 1
    share = min(_MOST_TRIALS_A_GPU, max(1, int(by_cores // gpus)))
    if gpu_bytes is None:
        return 1
    one = _MEMORY_SLACK * predicted_bytes + _CUDA_CONTEXT_BYTES
    return max(1, min(share, int(gpu_bytes // one)))


def _start(address: str, folder: Path, shared_bytes: int) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    options: dict[str, object] = {"address": address}
    if address == "local":
        options |= {
            "num_cpus": machine_cpus(),
            "include_dashboard": False,
            "_temp_dir": str(folder / "r"),  # Ray lets every user of the machine write to it; none gets past the folder
            "object_store_memory": _OBJECT_STORE_BYTES + 2 * shared_bytes,
        }
    try:
        with _own_signals():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, AuthenticationError) as error:
        raise SearchError(f"Ray could not be started at {address!r}: {error}") from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Takes back what the block, Ray's start, does to SIGTERM: the process would end with 15 or 1, and not with 143."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # nothing but Ray's two handlers of the signal raises it there
        raise SystemExit(128 + signal.SIGTERM) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder with a short path, and the watchdog that removes it."""
    parent = tempfile.gettempdir()
    if len(parent) > _LONGEST_FOLDER and os.path.isdir("/tmp"):
        parent = "/tmp"
    # Made after the watchdog has begun: a driver that is killed between the two would leave it.
    folder = Path(parent, f"rlsearch-{secrets.token_hex(4)}")
    watchdog = start_watchdog(folder)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        assert watchdog.stdin is not None  # it was started with a pipe
        watchdog.stdin.close()
        watchdog.wait()
