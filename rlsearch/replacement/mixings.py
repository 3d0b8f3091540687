"""The mathematics of the blocks: how a replaced unit's tensor is made from those of its sources.

A block makes every tensor W of a unit from the tensors P and N of the same name in the preceding and the succeeding
unit; one of the two may be missing, and then counts as zero. Its mathematics are two pure functions, ``compose`` (W
from P, N and the terms) and ``compose_backward`` (from dL/dW the gradients of each); the layers in
`rlsearch.replacement.layers` run them without keeping W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlsearch.replacement.clock import Clock
from rlsearch.replacement.pairs import Pair

Gradients = tuple[Tensor | None, ...]


class Target(NamedTuple):
    """A tensor to be made.

    Attributes:
        layer: the name in the unit of the layer that it belongs to.
        name: its name in that layer.
        own: what the unit had there.
        previous: what the preceding source has there; None where it is not used.
        succeeding: the same of the succeeding source.
        mapped: whether a source that is used has another shape, so that its channels must be mapped.
    """

    layer: str
    name: str
    own: Tensor
    previous: Tensor | None
    succeeding: Tensor | None
    mapped: bool


class Mixing(nn.Module):
    """W = a P + b N (arXiv 2410.01239), for all kinds of a and b.

    Args:
        pair: a and b; one pair may serve several tensors of a unit.
        owns_pair: whether the pair is registered here; so it is once in the unit.
        clock: of the unit, if it learns in some passes only; registered in one of its mixings.
        attached: whether gradients flow into the sources.
    """

    def __init__(self, pair: Pair, owns_pair: bool, clock: Clock | None, attached: bool) -> None:
        super().__init__()
        if owns_pair:
            self.pair = pair
        # In a tuple, a module is referred to without being registered.
        self._shared = (pair, clock)
        self.attached = attached

    @property
    def learns(self) -> bool:
        """Whether anything gets a gradient through W in this pass."""
        clock = self._shared[1]
        return clock is None or clock.learns

    def terms(self) -> tuple[Tensor, ...]:
        """The tensors besides P and N that W is made of, in the order in which the functions below take them."""
        return self._shared[0].terms()

    def compose(self, previous: Tensor | None, succeeding: Tensor | None, *terms: Tensor) -> Tensor:
        """W, from P and N of its shape."""
        dims = _some(previous, succeeding).dim()
        a, b = self._coefficients(dims, terms)
        if previous is None:
            return b * _some(succeeding)
        if succeeding is None:
            return a * previous
        return torch.addcmul(a * previous, b, succeeding)

    def compose_backward(
        self,
        grad: Tensor,
        needs: Sequence[bool],
        previous: Tensor | None,
        succeeding: Tensor | None,
        *terms: Tensor,
    ) -> Gradients:
        """From dL/dW the gradients of P, N and each term; None for those that ``needs`` does not name."""
        a, b = self._coefficients(grad.dim(), terms)
        of_sources = (a * grad if needs[0] else None, b * grad if needs[1] else None)
        if not any(needs[2:]):
            return *of_sources, *[None] * len(terms)
        pair = self._shared[0]
        reduce = channel_sums if pair.per_channel else torch.sum
        grad_a, grad_b = (
            torch.zeros_like(terms[0]) if source is None else reduce(grad * source) for source in (previous, succeeding)
        )
        return *of_sources, *pair.terms_gradient(grad_a, grad_b, *terms)

    def _coefficients(self, dims: int, terms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """a and b, shaped to multiply a tensor of so many dimensions along its first."""
        pair = self._shared[0]
        a, b = pair.coefficients(*terms)
        if not pair.per_channel:
            return a, b
        shape = (-1, *[1] * (dims - 1))
        return a.view(shape), b.view(shape)


class LowRankMixing(Mixing):
    """W = a P + b N + U Vᵀ, with U (out, rank), V (rest, rank) and W flattened to (out, rest) (reconstruction).

    V starts at zero, so that the block starts as without it.

    Args:
        pair, owns_pair, clock, attached: as in `Mixing`.
        shape: of W; no vector.
        rank: of U Vᵀ.
    """

    def __init__(
        self, pair: Pair, owns_pair: bool, clock: Clock | None, attached: bool, shape: Sequence[int], rank: int
    ) -> None:
        super().__init__(pair, owns_pair, clock, attached)
        out, rest = matrix_shape(shape)
        self.u, self.v = low_rank(pair.terms()[0], out, rest, rank)

    def terms(self) -> tuple[Tensor, ...]:
        return *super().terms(), self.u, self.v

    def compose(self, previous: Tensor | None, succeeding: Tensor | None, *terms: Tensor) -> Tensor:
        *pair_terms, u, v = terms
        with full_precision(u):
            correction = (u @ v.T).view(_some(previous, succeeding).shape)
        return super().compose(previous, succeeding, *pair_terms) + correction

    def compose_backward(
        self,
        grad: Tensor,
        needs: Sequence[bool],
        previous: Tensor | None,
        succeeding: Tensor | None,
        *terms: Tensor,
    ) -> Gradients:
        *pair_terms, u, v = terms
        matrix = grad.reshape(u.shape[0], v.shape[0])
        with full_precision(u):
            grad_u = matrix @ v if needs[-2] else None
            grad_v = matrix.T @ u if needs[-1] else None
        return *super().compose_backward(grad, needs[:-2], previous, succeeding, *pair_terms), grad_u, grad_v


def low_rank(like: Tensor, out: int, rest: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """U (out, rank) and V (rest, rank) of a product U Vᵀ that starts at zero and learns from the first step on."""
    # U of variance 1/rank: U Vᵀ is then of the size of V's elements, whatever the rank.
    u = nn.Parameter(like.new_empty(out, rank).normal_(std=rank**-0.5))
    return u, nn.Parameter(like.new_zeros(rest, rank))


def channel_sums(product: Tensor) -> Tensor:
    """Sums over all dimensions but the first."""
    return product.sum(dim=tuple(range(1, product.dim()))) if product.dim() > 1 else product


def is_vector(shape: Sequence[int]) -> bool:
    """Whether all elements lie along one dimension (a bias, a scale per channel): then nothing of it is a matrix."""
    return math.prod(shape) == max(shape, default=1)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(out, rest) of a weight (out, in, …)."""
    return shape[0], math.prod(shape[1:])


def full_precision(tensor: Tensor) -> torch.autocast:
    """Matrix products of weights keep their precision under autocast: only what meets the activations is rounded."""
    return torch.autocast(tensor.device.type, enabled=False)


def _some(*tensors: Tensor | None) -> Tensor:
    """The first that is there; one of a tensor's sources always is."""
    return next(tensor for tensor in tensors if tensor is not None)
