"""The layers of a replaced unit: convolutions and linears whose weight is made anew in every pass and kept in none.

A composed layer refers to its source *layers*, not to their tensors, and does not register them: every tensor stands
once in ``parameters()`` and ``state_dict()``, a deep copy refers to the copied sources, and moving the model moves
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlsearch.replacement.mixings import Mixing, PairMixing

TENSOR_NAMES = ("weight", "bias")


class Skip(nn.Identity):
    """Stands for a unit that was replaced by nothing."""


class Convolution(NamedTuple):
    """A convolution's settings, and its forward and backward as functions of tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (N, C, H, W), weight (out, C / groups, h, w) and bias (out) to (N, out, H', W')."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, None for those that are not needed."""
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward.default(
            grad,
            x,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            needs,
        )
        return gradients


class Linear(NamedTuple):
    """A linear map's forward and backward as functions of tensors."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (…, in), weight (out, in) and bias (out) to (…, out)."""
        return F.linear(x, weight, bias)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, None for those that are not needed."""
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if needs[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class ComposedOperation(torch.autograd.Function):
    """An operation whose weight is made from sources: exact gradients, and the weight is made again for the backward
    pass instead of being kept (reconstruction).

    Arguments: the operation; the `Mixing` class that makes the weight; the type that the weight is used in; x; the
    bias or None; P; N; the mixing's terms.
    """

    # With a separate setup_context, calling it takes six times as long.
    @staticmethod
    def forward(
        ctx: Any,
        operation: Convolution | Linear,
        mixing: type[Mixing],
        dtype: torch.dtype,
        x: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.operation, ctx.mixing, ctx.dtype = operation, mixing, dtype
        ctx.save_for_backward(x, *tensors)
        return operation.forward(x, mixing.compose(*tensors).to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, needs_bias, *needs_tensors = ctx.needs_input_grad[3:]
        weight = ctx.mixing.compose(*tensors).to(ctx.dtype)
        needs = (needs_x, any(needs_tensors), needs_bias)
        grad_x, grad_weight, grad_bias = ctx.operation.backward(grad, x, weight, needs)
        if grad_weight is None:
            return None, None, None, grad_x, grad_bias, *[None] * len(tensors)
        made = ctx.mixing.compose_backward(grad_weight.to(tensors[0].dtype), *tensors)
        return None, None, None, grad_x, grad_bias, *made


class ComposedLayer(nn.Module):
    """A layer of which some tensors are made from those of its sources. The others are its own."""

    _sources: tuple[nn.Module, nn.Module]
    _mixings: dict[str, Mixing]

    def __getattr__(self, name: str) -> Any:
        # Code that reads a layer's weight or bias gets the made one, and gradients reach its sources.
        if name in TENSOR_NAMES and name in self.__dict__.get("_mixings", {}):
            return self._mixings[name].compose(*self._tensors(name))
        return super().__getattr__(name)

    @property
    def composed_names(self) -> tuple[str, ...]:
        """Which tensors are made: ``weight``, ``bias`` or both."""
        return tuple(self._mixings)

    @property
    def num_composed(self) -> int:
        """Elements of the made tensors."""
        return sum(getattr(self._sources[0], name).numel() for name in self._mixings)

    def _tensors(self, name: str) -> tuple[Tensor, ...]:
        """What ``compose`` takes for a tensor."""
        previous, succeeding = (cast(Tensor, getattr(source, name)) for source in self._sources)
        return previous, succeeding, *self._mixings[name].terms()

    def _run(self, operation: Convolution | Linear, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        dtype = None
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if "weight" not in self._mixings:
            return operation.forward(x, self.weight, bias)
        mixing, tensors = type(self._mixings["weight"]), self._tensors("weight")
        dtype = dtype or tensors[0].dtype
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            # A compiler decides by itself what it keeps for the backward pass and what it makes again.
            return operation.forward(x, mixing.compose(*tensors).to(dtype), bias)
        return cast(Tensor, ComposedOperation.apply(operation, mixing, dtype, x, bias, *tensors))


class ComposedConv2d(ComposedLayer, nn.Conv2d):
    """An ``nn.Conv2d`` with made tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``: (N, C, H, W) or (C, H, W)."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # The cases that the convolution itself cannot pad.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(self.stride)
        return self._run(Convolution(self.stride, padding, self.dilation, self.groups), x)


class ComposedLinear(ComposedLayer, nn.Linear):
    """An ``nn.Linear`` with made tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: (…, in) to (…, out)."""
        return self._run(Linear(), x)


# The layers whose tensors can be made. Subclasses may compute something else with their weight, so they are not in it.
COMPOSED: Mapping[type[nn.Module], type[ComposedLayer]] = {nn.Conv2d: ComposedConv2d, nn.Linear: ComposedLinear}


def become_composed(
    layer: nn.Module, sources: tuple[nn.Module, nn.Module], mixings: Mapping[str, Mixing], registered: set[nn.Module]
) -> None:
    """Turns a plain layer into its composed kind, in place, so that its settings and hooks stay; its own tensors of the
    names in ``mixings`` are given up.

    Args:
        layer: an ``nn.Conv2d`` or ``nn.Linear``, not a subclass.
        sources: the layers that it borrows from.
        mixings: by tensor name.
        registered: mixings that another layer of the unit has registered; this layer's own are added.
    """
    layer.__class__ = COMPOSED[type(layer)]
    composed = cast(ComposedLayer, layer)
    for name in mixings:
        del composed._parameters[name]
    composed._sources = sources
    composed._mixings = dict(mixings)
    for name, mixing in mixings.items():
        if mixing not in registered:
            composed.add_module(f"{name}_mixing", mixing)
            # A mixing may hold another that serves other tensors too.
            registered.update(mixing.modules())


def become_plain(layer: ComposedLayer) -> None:
    """Turns a composed layer into the plain one that computes the same, in place; its tensors become its own."""
    tensors = {name: getattr(layer, name) for name in TENSOR_NAMES}
    for name in layer.composed_names:
        tensors[name] = nn.Parameter(tensors[name].detach().clone())
        layer._modules.pop(f"{name}_mixing", None)
    layer.__class__ = next(plain for plain, kind in COMPOSED.items() if kind is type(layer))  # type: ignore[assignment]
    del layer._sources, layer._mixings
    # Both anew, because their order is that of the state_dict.
    layer._parameters.clear()
    for name, tensor in tensors.items():
        layer.register_parameter(name, tensor)


def composed_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters that a module computes with, without gradient: made ones in the place of what makes them.

    For a module that holds no replaced unit these are its ``parameters()``.
    """
    found: dict[Tensor, Tensor] = {}
    for part in module.modules():
        if isinstance(part, Mixing):
            continue
        if isinstance(part, ComposedLayer):
            made = [getattr(part, name).detach() for name in part.composed_names]
            found.update((tensor, tensor) for tensor in made)
        found.update((parameter, parameter.detach()) for parameter in part.parameters(recurse=False))
    return list(found.values())


def mixing_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The a and b of all blocks: they weigh sources, so that weight decay would pull the units towards zero."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, PairMixing)
        for parameter in module.parameters(recurse=False)
    ]
