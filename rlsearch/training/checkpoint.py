"""States of a trial and weights of a model on disk: whole or not at all, and never unpickled beyond plain tensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlsearch.errors import ModelError, UserError
from rlsearch.files import replacing

# What is raised where a file is cut short, altered, or no checkpoint at all; sizes in damaged headers bring the rest.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, OverflowError, MemoryError, KeyError),
    *(struct.error, zlib.error, UnpicklingError, zipfile.BadZipFile),
)
# Of the tensors, in the header of a file of weights.
_DIGEST = "rlsearch.sha256"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain types, to be read by `load_checkpoint`.

    The one that was there stays beside it, as ``NAME.previous.pt``: a file that a disk has damaged costs one step back.

    Raises:
        OSError: the folder is missing, full or not writable; what could be read before still can be.
    """
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            # torch only says that its counts do not agree; behind that stands what the write itself said.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, previous_of(path))


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_suffix(f".previous{path.suffix}")


def found_checkpoints(path: Path) -> list[Path]:
    """Those of `save_checkpoint` that are there, the last one first."""
    return [file for file in (path, previous_of(path)) if file.exists()]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; with ``weights_only``, so that no code in it can run.

    Raises:
        UserError: the file is missing, truncated, altered, or holds more than tensors and plain types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # Every part carries its CRC-32, which torch itself does not look at when it reads.
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"its part {part} is not as it was written")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no checkpoint here") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: is no readable checkpoint ({error}); start again without it") from None
    return state


def load_newest(path: Path) -> dict[str, Any] | None:
    """The last state of `save_checkpoint` that can be read; with a warning where that is the one before the last.

    Returns:
        None where there is none.

    Raises:
        UserError: there are some, and none can be read.
    """
    failure: UserError | None = None
    for file in found_checkpoints(path):
        try:
            state = load_checkpoint(file)
        except UserError as error:
            failure = failure or error
            continue
        if failure is not None:
            warnings.warn(f"{failure}; going on from the one before", stacklevel=2)
        return state
    if failure is not None:
        raise failure
    return None


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes the model's state, on the CPU and contiguous, as safetensors with a checksum of the tensors.

    Raises:
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_DIGEST: _digest(tensors)})
        except SafetensorError as error:
            # It keeps the system's number in its text alone.
            if (number := re.search(r"os error (\d+)", str(error))) is not None:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU; those that `save_weights` wrote are looked at, to the bit.

    Raises:
        ModelError: the file is missing, damaged, or no safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            digest = (file.metadata() or {}).get(_DIGEST)
    except FileNotFoundError:
        raise ModelError(f"{path}: there are no weights here") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error})") from None
    if digest is not None and digest != _digest(tensors):
        raise ModelError(f"{path}: is damaged (its weights are not those that were written); restore it from a copy")
    return tensors


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts weights from `save_weights` into ``model``; every tensor must be there and fit.

    Raises:
        ModelError: the file is missing or damaged, or is of another model.
    """
    tensors = read_weights(path)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: these weights are of another model: {error}") from None


def _digest(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
