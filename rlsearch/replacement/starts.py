"""Where a and b start, by the option ``init``: reconstruction, since the papers do not say.

``half``: ½ and ½. ``rms``: 1/√2 each, which keeps the variance of what is made where no norm rescales it. ``previous``:
1 and 0. ``fit``: as near the unit's own tensors as the kind of pair can come, by least squares over what it serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlsearch.replacement.mixings import Target, channel_sums
from rlsearch.replacement.pairs import AnglePair, ChannelPair, ConstantPair, CoupledPair, Pair, ScalarPair
from rlsearch.replacement.projection import carried

INITS = ("auto", "half", "rms", "previous", "fit")

_STARTS = {"half": (0.5, 0.5), "rms": (0.5**0.5, 0.5**0.5), "previous": (1.0, 0.0)}
# Against the mean square of the sources: keeps the least squares solvable where the sources are parallel.
_RIDGE = 1e-9
# Steps of the search for the best angle before it is refined.
_ANGLES = 4096


class _Products(NamedTuple):
    """Sums of products over the targets: of the unit's own tensors o, and of the sources' p and n."""

    pp: Tensor
    nn: Tensor
    pn: Tensor
    op: Tensor
    on: Tensor


def start_pair(kind: type[Pair], targets: Sequence[Target], init: str) -> Pair:
    """The pair that serves ``targets``, as it starts; ``init`` is one of `INITS` but ``auto``."""
    targets = [_carried(target) for target in targets]
    like = next(tensor for tensor in (targets[0].previous, targets[0].succeeding) if tensor is not None)
    if issubclass(kind, CoupledPair):
        return kind(_typed(_coupled_start(targets, init), like))
    if issubclass(kind, AnglePair):
        return kind(_typed(_angle_start(targets, init), like))
    reduce = channel_sums if kind.per_channel else torch.sum
    if init == "fit":
        a, b = _least_squares(_products(targets, reduce))
    else:
        shape = reduce(targets[0].own.detach()).shape
        a, b = (torch.full(shape, value, dtype=torch.float64, device=like.device) for value in _STARTS[init])
    assert issubclass(kind, (ScalarPair, ChannelPair, ConstantPair))
    return kind(_typed(a, like), _typed(b, like))


def _carried(target: Target) -> Target:
    """A target whose sources have its shape, as they are carried over before anything is learned."""
    previous, succeeding = (
        None if source is None else carried(source.detach(), target.own.shape)
        for source in (target.previous, target.succeeding)
    )
    return target._replace(previous=previous, succeeding=succeeding)


def _typed(value: Tensor, like: Tensor) -> Tensor:
    return value.to(device=like.device, dtype=like.dtype)


def _coupled_start(targets: Sequence[Target], init: str) -> Tensor:
    """s of (s, 2 - s): of the others' ratio, since only the ratio of the two is its own to choose."""
    if init != "fit":
        a, b = _STARTS[init]
        return torch.tensor(2 * a / (a + b), dtype=torch.float64)
    of = _products(targets, torch.sum)
    return _ratio(of.op - of.on - 2 * of.pn + 2 * of.nn, of.pp - 2 * of.pn + of.nn, 1.0)


def _angle_start(targets: Sequence[Target], init: str) -> Tensor:
    """φ of (cos φ, sin φ)."""
    if init != "fit":
        a, b = _STARTS[init]
        return torch.tensor(math.atan2(b, a), dtype=torch.float64)
    of = _products(targets, torch.sum)

    def error(phi: Tensor) -> Tensor:
        a, b = phi.cos(), phi.sin()
        return a * a * of.pp + b * b * of.nn + 2 * a * b * of.pn - 2 * a * of.op - 2 * b * of.on

    width = 2 * math.pi / _ANGLES
    best = torch.zeros((), dtype=torch.float64, device=of.pp.device)
    steps = torch.arange(-_ANGLES // 2, _ANGLES // 2, dtype=torch.float64, device=of.pp.device)
    # Each round looks around the best of the one before, a thousand times finer.
    for _ in range(4):
        phis = best + steps * width
        best = phis.index_select(0, error(phis).argmin().view(1)).squeeze(0)
        width /= 1000
    return best


def _products(targets: Sequence[Target], reduce: Callable[[Tensor], Tensor]) -> _Products:
    """In float64; a source that is not used counts as zero."""
    own, previous, succeeding = (
        [_double(getattr(target, place), target.own) for target in targets]
        for place in ("own", "previous", "succeeding")
    )

    def product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        return torch.stack([reduce(x * y) for x, y in zip(first, second, strict=True)]).sum(0)

    return _Products(
        product(previous, previous),
        product(succeeding, succeeding),
        product(previous, succeeding),
        product(own, previous),
        product(own, succeeding),
    )


def _double(tensor: Tensor | None, own: Tensor) -> Tensor:
    return torch.zeros_like(own, dtype=torch.float64) if tensor is None else tensor.detach().double()


def _least_squares(of: _Products) -> tuple[Tensor, Tensor]:
    """The a and b that make |own - a P - b N|² least; ½ and ½ where both sources are zero.

    Of parallel sources, which leave a and b open, both get the same share.
    """
    ridge = _RIDGE * (of.pp + of.nn)
    pp, nn = of.pp + ridge, of.nn + ridge
    determinant = pp * nn - of.pn * of.pn
    return (
        _ratio(nn * of.op - of.pn * of.on, determinant, 0.5),
        _ratio(pp * of.on - of.pn * of.op, determinant, 0.5),
    )


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    solvable = denominator > 0
    return torch.where(solvable, numerator / torch.where(solvable, denominator, 1.0), otherwise)
