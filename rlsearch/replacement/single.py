"""The operator ``single``: one convolution or linear map in place of a whole unit, its residual path kept.

Reconstruction: our reading of the "computing layer" of arXiv 2605.19533. Of the unit's layers the one is taken that
maps the unit's input to its output in one step and can be made from the sources; of several the one with the largest
kernel, and of equals the first. The norm beside it stays, before it in units that begin with a norm, else behind it; so
does the activation that ends the unit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlsearch.model_graph import fake_copy
from rlsearch.replacement.chains import num_layers
from rlsearch.replacement.signature import module_signature
from rlsearch.replacement.units import NORMS, Unit

# How a residual path may end: the values that a unit of zeros gives tell which it is.
_ENDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "ReLU": F.relu,
    "ReLU6": F.relu6,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Hardswish": F.hardswish,
    "LeakyReLU": F.leaky_relu,
    "ELU": F.elu,
}


class SingleParts(NamedTuple):
    """What is left of a unit.

    Attributes:
        layer: the name in the unit of the layer that stays.
        norm: the name of the norm beside it, or None.
        norm_first: whether the norm comes before the layer.
        residual: whether the unit has a residual path.
        activation: the name of the ``torch.nn`` activation that ends it, or nothing.
    """

    layer: str
    norm: str | None
    norm_first: bool
    residual: bool
    activation: str


class SingleUnit(nn.Module):
    """activation(x + norm(layer(x))), or with the norm first.

    Args:
        layer: the one layer.
        norm: beside it, or None.
        parts: how they go together.
        returns_pair: whether the unit gives a tuple of the output and None, as ``nn.MultiheadAttention`` does.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module | None, parts: SingleParts, returns_pair: bool) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.activation = getattr(nn, parts.activation)() if parts.activation else None
        self.norm_first = parts.norm_first
        self.residual = parts.residual
        self.returns_pair = returns_pair

    def forward(self, x: Tensor, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor, None]:
        """(N, …) to the same shape; further arguments, of an attention, play no part."""
        y = x if self.norm is None or not self.norm_first else self.norm(x)
        y = self.layer(y)
        y = y if self.norm is None or self.norm_first else self.norm(y)
        y = x + y if self.residual else y
        y = y if self.activation is None else self.activation(y)
        return (y, None) if self.returns_pair else y


def single_candidates(module: nn.Module, unit: Unit) -> list[SingleParts] | str:
    """What may be left of a unit under ``single``, the best first, or what stands against it."""
    if num_layers(module) < 2:
        return "it is a single layer already; use operator: same"
    if unit.input_shape is None or unit.output_shape is None:
        return "its input or its output is not a single tensor, so that one layer cannot stand in for it"
    # The unit is run to find them: once for all that are alike.
    key = (module_signature(module), unit.role == "block", unit.input_shape, unit.output_shape)
    if key not in _FOUND:
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.clear()
        _FOUND[key] = _find_candidates(module, unit, unit.input_shape)
    return _FOUND[key]


_FOUND: dict[Hashable, list[SingleParts] | str] = {}
_MOST_FOUND = 1000


def _find_candidates(module: nn.Module, unit: Unit, input_shape: tuple[int, ...]) -> list[SingleParts] | str:
    """As `single_candidates`, for a unit of one input."""
    layers = _one_step_layers(module, unit)
    if not layers:
        return (
            f"none of its layers takes its input {unit.input_shape} to its output {unit.output_shape} in one step, "
            "which operator: single needs; use operator: same"
        )
    ending = _residual_ending(module, input_shape)
    if ending is None and unit.role == "block":
        return "it has no residual path that could be seen, which operator: single would keep; use operator: same"
    candidates = [
        SingleParts(layer, *_norm_beside(module, layer), residual=ending is not None, activation=ending or "")
        for layer in layers
    ]
    runnable = [parts for parts in candidates if _runs(module, parts, unit)]
    return runnable or f"its norm {candidates[0].norm} cannot stand beside its layer {candidates[0].layer}"


def build_single(module: nn.Module, parts: SingleParts) -> SingleUnit:
    """The unit that is left; it shares its layer and norm with ``module``."""
    layer = module.get_submodule(parts.layer)
    norm = None if parts.norm is None else module.get_submodule(parts.norm)
    return SingleUnit(layer, norm, parts, isinstance(module, nn.MultiheadAttention)).train(module.training)


def _one_step_layers(module: nn.Module, unit: Unit) -> list[str]:
    """The names of the layers that could be the one to keep, the best first."""
    mode, fake = fake_copy(module)
    fitting: list[tuple[int, str]] = []
    for name, layer in fake.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and _output_shape(mode, layer, unit) == unit.output_shape:
            kernel = layer.weight.shape[2:].numel() if isinstance(layer, nn.Conv2d) else 1
            fitting.append((kernel, name))
    # Sorting is stable: of equals the first stays the first.
    return [name for _, name in sorted(fitting, key=lambda item: -item[0])]


def _output_shape(mode: FakeTensorMode, layer: nn.Module, unit: Unit) -> tuple[int, ...] | None:
    assert unit.input_shape is not None  # looked at before
    # Known without trying it, which torch would log as an error of its own.
    if isinstance(layer, nn.Linear) and unit.input_shape[-1] != layer.in_features:
        return None
    if isinstance(layer, nn.Conv2d) and (len(unit.input_shape) != 3 or unit.input_shape[0] != layer.in_channels):
        return None
    with mode, torch.no_grad():
        try:
            output = layer(torch.empty(2, *unit.input_shape, dtype=_dtype(layer)))
        except (RuntimeError, ValueError):  # other channels or dimensions than the unit's input has
            return None
    return tuple(output.shape[1:]) if isinstance(output, Tensor) else None


def _norm_beside(module: nn.Module, layer: str) -> tuple[str | None, bool]:
    """The name of the norm to keep, and whether it comes before the layer."""
    order = list(_leaves(module))
    norms = [name for name in order if isinstance(module.get_submodule(name), NORMS)]
    if not norms:
        return None, False
    if order[0] == norms[0]:
        return norms[0], True
    behind = [name for name in norms if order.index(name) > order.index(layer)]
    return (behind[0] if behind else None), False


def _leaves(module: nn.Module) -> Iterator[str]:
    """The names of the modules that hold parameters themselves, as registered: inside a unit that is their order."""
    for name, part in module.named_modules():
        if name and next(part.parameters(recurse=False), None) is not None:
            yield name


def _residual_ending(module: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    """Which activation ends the unit's residual path, or nothing if none does; None if there is no such path.

    A unit whose parameters are all zero gives back its input through the residual path alone.
    """
    memo: dict[int, object] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(zeros, requires_grad=False) if isinstance(tensor, nn.Parameter) else zeros
    empty = copy.deepcopy(module, memo).eval()
    x = torch.linspace(-4, 8, math.prod(input_shape)).view(1, *input_shape).to(_dtype(module))
    with torch.no_grad():
        # An activation may work in place.
        output = empty(*([x.clone()] * (3 if isinstance(module, nn.MultiheadAttention) else 1)))
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.shape != x.shape:
        return None
    return next((name for name, ending in _ENDINGS.items() if torch.allclose(ending(x), output, atol=1e-6)), None)


def _dtype(module: nn.Module) -> torch.dtype:
    """The type of a module's parameters."""
    found = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(found, torch.get_default_dtype())


def _runs(module: nn.Module, parts: SingleParts, unit: Unit) -> bool:
    """Whether the parts fit to each other."""
    mode, fake = fake_copy(module)
    single = build_single(fake, parts)
    return _output_shape(mode, _Output(single), unit) == unit.output_shape


class _Output(nn.Module):
    """Of a unit that may give a tuple, the first."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        output = self.unit(x)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first
