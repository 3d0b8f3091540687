"""The blocks by name: what each is for, what it can be told, and how it starts.

A new block is one `rlsearch.replacement.mixings.Mixing` and one entry in `BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlsearch.errors import suggestion
from rlsearch.replacement.mixings import (
    ChannelMixing,
    LowRankMixing,
    Mixing,
    ScalarMixing,
    channel_sums,
    matrix_shape,
)


class Target(NamedTuple):
    """A tensor to be made: what the unit had there, and what its sources have there, all of one shape."""

    own: Tensor
    previous: Tensor
    succeeding: Tensor


@dataclass(frozen=True)
class Option:
    """An option of a block.

    Attributes:
        default: its value where the policy names none.
        meaning: one line for people.
        rule: what a value must be, in words.
        accepts: whether a value is that.
    """

    default: Any
    meaning: str
    rule: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class BlockKind:
    """A kind of block, as policies name it.

    Attributes:
        name: in policies and search spaces.
        summary: one line for people.
        needs_sources: whether it borrows from the preceding and the succeeding unit.
        options: what it can be told, by name.
        make: from the tensors of one unit that are to be made, and the options, the `Mixing` of each; None for a block
            that computes nothing.
        tensor_problem: what is against making a tensor of this shape with these options, or None.
    """

    name: str
    summary: str
    needs_sources: bool
    options: Mapping[str, Option] = field(default_factory=dict)
    make: Callable[[Sequence[Target], Mapping[str, Any]], list[Mixing]] | None = None
    tensor_problem: Callable[[Sequence[int], Mapping[str, Any]], str | None] = lambda _shape, _options: None

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options: those given, and the defaults of the others."""
        return {name: option.default for name, option in self.options.items()} | dict(options)

    def option_problems(self, options: Mapping[str, Any]) -> list[str]:
        """What is wrong with the options, each as ``option 'init' must be …``."""
        found = []
        for name, value in options.items():
            if name not in self.options:
                hint = suggestion(name, self.options) or " (it takes none)"
                found.append(f"unknown option {name!r} of block {self.name!r}{hint}")
            elif not self.options[name].accepts(value):
                found.append(f"option {name!r} of block {self.name!r} must be {self.options[name].rule}, got {value!r}")
        return found


def _choice(default: str, choices: Sequence[str], meaning: str) -> Option:
    rule = f"one of {', '.join(choices)}"
    return Option(default, meaning, rule, lambda value: isinstance(value, str) and value in choices)


_INIT = _choice(
    "half", ("half", "previous", "fit"), "where a and b start; fit: as near the unit's own weights as can be"
)
_BOUNDARY = _choice("strict", ("strict", "keep"), "keep: a tensor that does not fit its sources stays learnable")
_RANK = Option(
    4,
    "the rank of U Vᵀ",
    "a whole number of at least 1",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
)

_CONSTANT_STARTS = {"half": (0.5, 0.5), "previous": (1.0, 0.0)}

# Against the mean square of the sources: keeps the least squares solvable where the sources are parallel.
_RIDGE = 1e-9


def _scalar_pair(targets: Sequence[Target], options: Mapping[str, Any]) -> ScalarMixing:
    """One pair for all targets."""
    return ScalarMixing(*_start(targets, options["init"], lambda product: product.sum()))


def _make_scalar(targets: Sequence[Target], options: Mapping[str, Any]) -> list[Mixing]:
    return [_scalar_pair(targets, options)] * len(targets)


def _make_channel(targets: Sequence[Target], options: Mapping[str, Any]) -> list[Mixing]:
    return [ChannelMixing(*_start([target], options["init"], channel_sums)) for target in targets]


def _make_lowrank(targets: Sequence[Target], options: Mapping[str, Any]) -> list[Mixing]:
    """One pair for all targets, a correction for each that is a matrix; a bias is mixed as `ScalarMixing` does."""
    pair = _scalar_pair(targets, options)
    made: list[Mixing] = []
    for target in targets:
        if target.own.dim() < 2:
            made.append(pair)
        else:
            made.append(LowRankMixing(pair, not made, target.own.shape, options["rank"]))
    return made


def _rank_problem(shape: Sequence[int], options: Mapping[str, Any]) -> str | None:
    if len(shape) < 2:
        return None
    out, rest = matrix_shape(shape)
    learned = options["rank"] * (out + rest)
    if learned < out * rest:
        return None
    return f"rank {options['rank']} learns {learned} numbers in place of its {out * rest}; use a smaller rank"


# The one place to add a block.
BLOCKS: dict[str, BlockKind] = {
    kind.name: kind
    for kind in (
        BlockKind("skip", "nothing: the input is the output (the control)", needs_sources=False),
        BlockKind(
            "scalar",
            "a P + b N, two numbers a unit",
            needs_sources=True,
            options={"init": _INIT, "boundary": _BOUNDARY},
            make=_make_scalar,
        ),
        BlockKind(
            "channel",
            "a P + b N, two numbers an output channel",
            needs_sources=True,
            options={"init": _INIT, "boundary": _BOUNDARY},
            make=_make_channel,
        ),
        BlockKind(
            "lowrank",
            "a P + b N + U Vᵀ, two numbers a unit and a low-rank correction of each weight",
            needs_sources=True,
            options={"init": _INIT, "boundary": _BOUNDARY, "rank": _RANK},
            make=_make_lowrank,
            tensor_problem=_rank_problem,
        ),
    )
}


def _start(targets: Sequence[Target], init: str, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Where a and b start; ``reduce`` sums a tensor to the shape that each of them has."""
    reference = targets[0].previous
    if init != "fit":
        shape = reduce(reference.detach()).shape
        a, b = (reference.new_full(shape, value) for value in _CONSTANT_STARTS[init])
        return a, b
    a, b = _least_squares(targets, reduce)
    return a.to(reference.dtype), b.to(reference.dtype)


@torch.no_grad()
def _least_squares(targets: Sequence[Target], reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The a and b that make |own - a P - b N|² least over the targets, in float64; ½ and ½ where both sources are zero.

    Of parallel sources, which leave a and b open, both get the same share.
    """

    def product(first: int, second: int) -> Tensor:
        sums = [reduce(target[first].double() * target[second].double()) for target in targets]
        return torch.stack(sums).sum(0)

    own, previous, succeeding = range(3)
    ridge = _RIDGE * (product(previous, previous) + product(succeeding, succeeding))
    pp, nn_ = product(previous, previous) + ridge, product(succeeding, succeeding) + ridge
    pn, op, on = product(previous, succeeding), product(own, previous), product(own, succeeding)
    determinant = pp * nn_ - pn * pn
    solvable = determinant > 0
    divisor = torch.where(solvable, determinant, 1.0)
    a = torch.where(solvable, (nn_ * op - pn * on) / divisor, 0.5)
    b = torch.where(solvable, (pp * on - pn * op) / divisor, 0.5)
    return a, b
