"""States of a trial and weights of a model on disk: whole or not at all, and never unpickled beyond plain tensors."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlsearch.errors import ModelError, UserError
from rlsearch.files import replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain types, to be read by `load_checkpoint`."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; with ``weights_only``, so that no code in it can run.

    Raises:
        UserError: the file is missing, truncated, or holds more than tensors and plain types.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no checkpoint here") from None
    except (OSError, EOFError, RuntimeError, UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no readable checkpoint ({error}); start again without it") from None
    return state


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes the model's state, on the CPU and contiguous, as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts weights from `save_weights` into ``model``; every tensor must be there and fit.

    Raises:
        ModelError: the file is missing or damaged, or is of another model.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: there are no weights here") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error})") from None
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: these weights are of another model: {error}") from None
