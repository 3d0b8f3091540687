"""The mathematics of the blocks: how a replaced unit's tensor is made from those of its sources.

A block makes every tensor W of a unit from the tensors P and N of the same name in the preceding and the succeeding
unit. Its mathematics are two pure functions, ``compose`` (W from P, N and what the block learns) and
``compose_backward`` (from dL/dW the gradients of each); the layers in `rlsearch.replacement.layers` run them without
keeping W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Mixing(nn.Module):
    """What a block learns, and the mathematics by which it makes tensors. One can serve several tensors of a unit."""

    def terms(self) -> tuple[Tensor, ...]:
        """The learned tensors, in the order in which the functions below take them."""
        raise NotImplementedError

    @staticmethod
    def compose(previous: Tensor, succeeding: Tensor, *terms: Tensor) -> Tensor:
        """W, of the sources' shape."""
        raise NotImplementedError

    @staticmethod
    def compose_backward(grad: Tensor, previous: Tensor, succeeding: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        """From dL/dW the gradients of ``previous``, ``succeeding`` and each term."""
        raise NotImplementedError


class PairMixing(Mixing):
    """Learns a and b, the weights of the preceding and the succeeding source.

    Args:
        a: the start of a.
        b: the start of b, of the same shape.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)

    def terms(self) -> tuple[Tensor, ...]:
        return self.a, self.b


class ScalarMixing(PairMixing):
    """W = a P + b N with two numbers (arXiv 2410.01239)."""

    @staticmethod
    def compose(previous: Tensor, succeeding: Tensor, *terms: Tensor) -> Tensor:
        a, b = terms
        return torch.addcmul(a * previous, b, succeeding)

    @staticmethod
    def compose_backward(grad: Tensor, previous: Tensor, succeeding: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        a, b = terms
        return a * grad, b * grad, (grad * previous).sum(), (grad * succeeding).sum()


class ChannelMixing(PairMixing):
    """W = a P + b N with a and b for each output channel, the first dimension of W (reconstruction)."""

    @staticmethod
    def compose(previous: Tensor, succeeding: Tensor, *terms: Tensor) -> Tensor:
        a, b = (_along_channels(term, previous) for term in terms)
        return torch.addcmul(a * previous, b, succeeding)

    @staticmethod
    def compose_backward(grad: Tensor, previous: Tensor, succeeding: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        a, b = (_along_channels(term, grad) for term in terms)
        return a * grad, b * grad, channel_sums(grad * previous), channel_sums(grad * succeeding)


class LowRankMixing(Mixing):
    """W = a P + b N + U Vᵀ, with U (out, rank), V (rest, rank) and W flattened to (out, rest) (reconstruction).

    V starts at zero, so that the block starts as `ScalarMixing` does.

    Args:
        pair: a and b; one pair may serve several tensors.
        owns_pair: whether the pair's parameters are registered here; so they are once in the unit.
        shape: of W; two dimensions or more.
        rank: of U Vᵀ.
    """

    def __init__(self, pair: ScalarMixing, owns_pair: bool, shape: Sequence[int], rank: int) -> None:
        super().__init__()
        if owns_pair:
            self.pair = pair
        # In a tuple, a module is referred to without being registered.
        self._pair = (pair,)
        out, rest = matrix_shape(shape)
        # U of variance 1/rank: U Vᵀ is then of the size of V's elements, whatever the rank.
        self.u = nn.Parameter(pair.a.new_empty(out, rank).normal_(std=rank**-0.5))
        self.v = nn.Parameter(pair.a.new_zeros(rest, rank))

    def terms(self) -> tuple[Tensor, ...]:
        return *self._pair[0].terms(), self.u, self.v

    @staticmethod
    def compose(previous: Tensor, succeeding: Tensor, *terms: Tensor) -> Tensor:
        a, b, u, v = terms
        with _full_precision(u):
            correction = (u @ v.T).view(previous.shape)
        return ScalarMixing.compose(previous, succeeding, a, b) + correction

    @staticmethod
    def compose_backward(grad: Tensor, previous: Tensor, succeeding: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        a, b, u, v = terms
        matrix = grad.reshape(u.shape[0], v.shape[0])
        with _full_precision(u):
            grad_u, grad_v = matrix @ v, matrix.T @ u
        return *ScalarMixing.compose_backward(grad, previous, succeeding, a, b), grad_u, grad_v


def _along_channels(term: Tensor, tensor: Tensor) -> Tensor:
    """A term of one number a channel, shaped to multiply ``tensor`` along its first dimension."""
    return term.view(-1, *[1] * (tensor.dim() - 1))


def channel_sums(product: Tensor) -> Tensor:
    """Sums over all dimensions but the first."""
    return product.sum(dim=tuple(range(1, product.dim()))) if product.dim() > 1 else product


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(out, rest) of a weight (out, in, …)."""
    return shape[0], math.prod(shape[1:])


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Matrix products of weights keep their precision under autocast: only what meets the activations is rounded."""
    return torch.autocast(tensor.device.type, enabled=False)
