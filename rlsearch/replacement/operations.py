"""Convolutions and linear maps whose weight is made anew in every pass and kept in none, as autograd functions."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsearch.replacement.mixings import Mixing

Needs = tuple[bool, bool, bool]
"""Whether the gradients of x, weight and bias are asked for."""


class Operation(Protocol):
    """What a layer computes with its weight and bias."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def backward(
        self, grad: Tensor, x: Tensor | None, x_shape: torch.Size, weight: Tensor, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias; ``x`` may be None where the weight's is not asked for."""
        ...


class Convolution(NamedTuple):
    """A convolution's settings, and its forward and backward as functions of tensors, of one to three dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (N, C, …), weight (out, C / groups, …) and bias (out) to (N, out, …)."""
        nothing = (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, nothing, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor | None, x_shape: torch.Size, weight: Tensor, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        if x is None:
            # Its shape and layout alone are looked at. The gradient itself, where it fits, costs no memory.
            x = grad if grad.shape == x_shape else _of_layout(grad, x_shape)
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


class LinearMap(NamedTuple):
    """A linear map's forward and backward as functions of tensors."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (…, in), weight (out, in) and bias (out) to (…, out)."""
        return F.linear(x, weight, bias)

    def backward(
        self, grad: Tensor, x: Tensor | None, x_shape: torch.Size, weight: Tensor, needs: Needs
    ) -> tuple[Tensor | None, ...]:
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if needs[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] and x is not None else None,
            rows.sum(0) if needs[2] else None,
        )


class ComposedOperation(torch.autograd.Function):
    """An operation whose weight is made from sources: exact gradients; the weight is made again for the backward pass
    instead of being kept, and the input is kept only if something learns through the weight (reconstruction).

    Arguments: the operation; the `Mixing` that makes the weight; the type that the weight is used in; x; the bias or
    None; P or None; N or None; the mixing's terms.
    """

    # With a separate setup_context, calling it takes six times as long.
    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        mixing: Mixing,
        dtype: torch.dtype,
        x: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.operation, ctx.mixing, ctx.dtype, ctx.x_shape = operation, mixing, dtype, x.shape
        learns = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if learns else None, *tensors)
        return operation.forward(x, mixing.compose(*tensors).to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, needs_bias, *needs_tensors = ctx.needs_input_grad[3:]
        weight = ctx.mixing.compose(*tensors).to(ctx.dtype)
        needs = (needs_x, any(needs_tensors), needs_bias)
        grad_x, grad_weight, grad_bias = ctx.operation.backward(grad, x, ctx.x_shape, weight, needs)
        if grad_weight is None:
            return None, None, None, grad_x, grad_bias, *[None] * len(tensors)
        kept_dtype = next(tensor.dtype for tensor in tensors if tensor is not None)
        made = ctx.mixing.compose_backward(grad_weight.to(kept_dtype), needs_tensors, *tensors)
        return None, None, None, grad_x, grad_bias, *made


def _of_layout(tensor: Tensor, shape: torch.Size) -> Tensor:
    """An unfilled tensor of a shape, laid out in memory as ``tensor`` is."""
    made = tensor.new_empty(shape)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return made.to(memory_format=torch.channels_last)
    return made
