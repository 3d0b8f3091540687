"""Files that a reader sees whole, the old content or the new one, and folders that lead nowhere else."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlsearch.errors import RunFolderError

# A full disk, a quota, a file that has outgrown its limit, a disk that can only be read.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    The content is flushed to the disk before it is renamed, and the rename itself is flushed too.

    Raises:
        OSError: the folder is missing, full or not writable; ``path`` is then as it was. A full disk names ``path``.
    """
    with naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_inside(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Whether everything in a run's folder is there, and not a way to somewhere else.

    A run may come from others. What is read, replaced and deleted under a name in it must lie in it, and no read may
    wait for ever: links, pipes, sockets and devices are refused.

    Args:
        folder: of the run.
        parts: look only at the entries of the folder itself and of these in it; None: at everything below.

    Raises:
        RunFolderError: something else than folders and ordinary files is there.
    """
    places = [folder, *(folder / part for part in parts or ())]
    while places:
        try:
            entries = list(os.scandir(places.pop()))
        except (FileNotFoundError, NotADirectoryError):  # it is optional, or a search that goes on has removed it
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                places += [Path(entry.path)] if parts is None else []
            elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                raise RunFolderError(
                    f"{entry.path}: is a link, or no ordinary file; a run's folder holds neither: put there what it "
                    "leads to, if you trust it"
                )


def is_storage_failure(error: BaseException) -> bool:
    """Whether it is the disk that failed (full, over a quota, read only), and no mistake of anybody's."""
    return isinstance(error, OSError) and error.errno in _STORAGE


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file a full disk has kept from being written: a write's own error names none."""
    try:
        yield
    except OSError as error:
        if not is_storage_failure(error):
            raise
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _umask() -> int:
    """This process's umask; mkstemp ignores it, and a file of a run should be as readable as any other."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def flush_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, where the system can do that (Windows cannot)."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
