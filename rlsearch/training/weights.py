"""Where training starts: weights from a local file or from torchvision, fitted to a model. Nothing is unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError, suggestion

_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Where checkpoints of other programs keep the tensors.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# The auxiliary classifiers of torchvision's Inception v3 and GoogLeNet, which are built without them.
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def load_initial_weights(
    model: nn.Module, weights: str, torchvision_name: str | None, num_classes: int, *, download: bool = False
) -> None:
    """Loads ``weights`` into ``model`` in place; a classifier of another width keeps its random start.

    Args:
        model: the model to start.
        weights: a local file, or a name of torchvision's weights.
        torchvision_name: the model's name at torchvision, or None when it has no named weights.
        num_classes: tells the classifier: the last linear layer of that width, or the last convolution where a model
            has no such layer (SqueezeNet).
        download: whether named weights that are not on this machine yet may be fetched.

    Raises:
        ModelError: the weights are not there, cannot be read, or do not fit; ``model`` is then as it was.
    """
    if Path(weights).suffix in _FILE_SUFFIXES or "/" in weights or Path(weights).is_file():
        state = _read_file(Path(weights))
    else:
        state = _read_named(weights, torchvision_name, download)
    _load(model, state, _head_names(model, num_classes), weights)


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds nothing but data."""
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights file {path} holds more than tensors and plain values, or is corrupt; save it again with "
            f"torch.save(model.state_dict(), path) or as safetensors ({str(error).splitlines()[0]})"
        ) from None
    except Exception as error:  # damaged bytes make the readers raise almost anything: IndexError, EOFError, ...
        raise ModelError(f"weights file {path} cannot be read, it may be truncated: {error}") from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"weights file {path} must hold a state_dict (names with tensors)")
    return dict(content)


def _read_named(weights: str, model_name: str | None, download: bool) -> dict[str, Tensor]:
    """torchvision's weights, from this machine's cache or, when allowed, from the network."""
    if model_name is None:
        raise ModelError(
            f"weights {weights!r}: this model has no named weights; give a file ({', '.join(_FILE_SUFFIXES)})"
        )
    import torchvision

    known = torchvision.models.get_model_weights(model_name)
    if weights not in known.__members__:
        raise ModelError(
            f"unknown weights {weights!r} of model {model_name!r}{suggestion(weights, known.__members__)}; "
            "a local file is given by its path"
        )
    entry = known[weights]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    if not (file.is_file() or download):
        size = entry.meta.get("_file_size", 0)
        raise ModelError(
            f"weights {weights!r} of model {model_name!r} ({size:.0f} MB) are not on this machine ({file.name}); "
            "set download to true to fetch them, or give a local file"
        )
    try:
        state: dict[str, Tensor] = entry.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # no network, no space, or damaged bytes, which make torch raise almost anything
        raise ModelError(
            f"weights {weights!r} of model {model_name!r} cannot be fetched, or read from {file}: {error}; "
            "remove the file if it is damaged"
        ) from error
    return {name: tensor for name, tensor in state.items() if not name.startswith(_AUXILIARY)}


def _head_names(model: nn.Module, num_classes: int) -> set[str]:
    """The names of the classifier's tensors: of the last layer that is ``num_classes`` wide, linear if there is one."""
    modules = dict(model.named_modules())
    linear = [
        name for name, part in modules.items() if isinstance(part, nn.Linear) and part.out_features == num_classes
    ]
    convs = [name for name, part in modules.items() if isinstance(part, nn.Conv2d) and part.out_channels == num_classes]
    heads = linear or convs
    return {f"{heads[-1]}.weight", f"{heads[-1]}.bias"} if heads else set()


def _load(model: nn.Module, state: Mapping[str, Tensor], head: set[str], source: str) -> None:
    """Copies ``state`` into ``model`` after everything was checked."""
    expected = model.state_dict()
    wrong = [f"{name} is unknown to the model" for name in state if name not in expected]
    loadable = {}
    for name, tensor in expected.items():
        if name not in state:
            # Files from before torch 0.4.1 have no such counters, and torch starts them at 0.
            if not name.endswith("num_batches_tracked"):
                wrong.append(f"{name} is missing")
        elif state[name].shape == tensor.shape:
            loadable[name] = state[name]
            # As in the classifier of torchvision's IMAGENET1K_FEATURES: the training would diverge at its first step.
            if not torch.isfinite(state[name]).all():
                wrong.append(f"{name} holds values that are not finite")
        elif not (name in head and state[name].shape[1:] == tensor.shape[1:]):
            wrong.append(f"{name} has shape {tuple(state[name].shape)}, the model needs {tuple(tensor.shape)}")
    if wrong:
        shown = "\n".join(f"  - {line}" for line in wrong[:10])
        more = f"\n  - and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ModelError(f"weights {source!r} do not fit the model:\n{shown}{more}")
    if not loadable:
        raise ModelError(f"weights {source!r} hold nothing that the model has")
    model.load_state_dict(loadable, strict=False)
