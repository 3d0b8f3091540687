"""Parts of a test in a process of their own: forked, so that nothing is imported again; it may be killed, or have a
disk of its own that is full."""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import os
import pickle
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
PAGE = 4096
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000


def forked(body: Callable[[], object]) -> int:
    """Starts ``body`` in a process of its own; the process."""
    with warnings.catch_warnings():
        # Newer Pythons warn of threads, which a child does not have; none of ours holds a lock here.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        body()
        code = 0
    except BaseException:  # noqa: BLE001  # a child must never come back into the tests
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(body: Callable[[], Result]) -> Result:
    """What ``body`` returns, in a process of its own; fails where it raises, with its traceback."""
    reading, writing = os.pipe()

    def told() -> None:
        os.close(reading)
        try:
            answer: tuple[bool, Any] = True, body()
        except BaseException:  # noqa: BLE001  # whatever it is, the parent tells it
            answer = False, traceback.format_exc()
        with os.fdopen(writing, "wb") as file:
            pickle.dump(answer, file)

    process = forked(told)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        content = file.read()
    os.waitpid(process, 0)
    assert content, "the child ended without a word"
    is_well, result = pickle.loads(content)
    assert is_well, result
    return result  # type: ignore[no-any-return]


def killed_at(body: Callable[[], object], event: int, folder: Path) -> bool:
    """Runs ``body`` in a process of its own that kills itself (SIGKILL) before it does the n-th thing to a file.

    Args:
        body: what it does.
        event: the n, from 0.
        folder: what is done to the files in here counts.

    Returns:
        whether it came so far; else it ended well before.
    """

    def doomed() -> None:
        left = event

        def watch(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if name.startswith(("open", "os.", "shutil.")) and any(
                isinstance(argument, str | Path) and str(argument).startswith(str(folder)) for argument in arguments
            ):
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(watch)
        body()

    _, status = os.waitpid(forked(doomed), 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


class SmallDisk:
    """A disk of this process alone, which can be made as full as a test likes.

    A file system in memory, really full (ENOSPC). Where a process may not mount one, no file may grow beyond the pages
    that are left (EFBIG).
    """

    def __init__(self, folder: Path, pages: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._is_mounted = _mount(folder, pages * PAGE)
        self._ballast = folder / "ballast"

    def leave(self, pages: int) -> None:
        """Lets so many pages of 4,096 bytes be written."""
        self.free()
        if not self._is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (pages * PAGE, resource.RLIM_INFINITY))
            return
        there = os.statvfs(self.folder)
        self._ballast.write_bytes(bytes((there.f_bfree - pages) * there.f_bsize))

    def free(self) -> None:
        """Makes room again."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self._ballast.unlink(missing_ok=True)

    def failures(self, write: Callable[[], object], step: int = 1) -> Iterator[Exception]:
        """The errors of ``write`` with no page left, with one, with two, …, until it ends well; with room again."""
        for pages in itertools.count(0, step):
            self.leave(pages)
            try:
                write()
            except Exception as error:  # noqa: BLE001  # the test looks at what it is
                self.free()
                yield error
            else:
                self.free()
                return


def command_line(*arguments: object) -> tuple[object, str, str]:
    """How the program ends that is called so, and what it prints: exit code, output, errors."""
    from rlsearch.cli import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["rlsearch", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), err.getvalue()


def _mount(folder: Path, size: int) -> bool:
    """Mounts a file system for this process alone; whether that is allowed."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if not sys.platform.startswith("linux") or libc.unshare(_NEW_USER | _NEW_MOUNTS):
        return False
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
    try:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode())
