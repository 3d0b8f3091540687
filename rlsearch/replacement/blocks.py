"""The blocks by name: what each is for, what it can be told, and what it makes.

A new block is a `rlsearch.replacement.pairs.Pair` or a `rlsearch.replacement.mixings.Mixing`, and one entry in
`BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsearch.errors import suggestion
from rlsearch.replacement.clock import Clock
from rlsearch.replacement.mixings import LowRankMixing, Mixing, Target, is_vector, matrix_shape
from rlsearch.replacement.pairs import AnglePair, ChannelPair, ConstantPair, CoupledPair, Pair, ScalarPair
from rlsearch.replacement.projection import ProjectMixing, num_map_terms
from rlsearch.replacement.sources import SOURCES
from rlsearch.replacement.starts import INITS, start_pair

MixingOf = Callable[[Target, Pair, bool, Clock | None, Mapping[str, Any]], Mixing]
"""From a tensor to be made, its pair, whether it is the one to own it, the clock and the options: its mixing."""


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
        pair: what its a and b are; None for a block that borrows nothing.
        mixing: how it makes one tensor.
        num_learned: how many numbers it learns for a tensor beside its pair, by the tensor's shape, the shapes of the
            sources that it uses, and the options.
        options: what it can be told, by name.
    """

    name: str
    summary: str
    pair: type[Pair] | None = None
    mixing: MixingOf | None = None
    num_learned: Callable[[Sequence[int], Sequence[Sequence[int]], Mapping[str, Any]], int] = lambda *_: 0
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def needs_sources(self) -> bool:
        """Whether it borrows from the preceding and the succeeding unit."""
        return self.pair is not None

    @property
    def maps_channels(self) -> bool:
        """Whether it takes sources of other numbers of channels than the unit has."""
        return self.mixing is _projected

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

    def make(self, targets: Sequence[Target], options: Mapping[str, Any]) -> tuple[list[Mixing], Clock | None]:
        """The mixing of each tensor of one unit, and what counts the unit's passes, if anything does."""
        assert self.pair is not None
        period = options.get("update_every", 1)
        clock = Clock(period) if period > 1 else None
        kinds = [self._pair_of(target, targets) for target in targets]
        groups: dict[object, list[Target]] = {}
        for target, kind in zip(targets, kinds, strict=True):
            groups.setdefault(_group(kind, target, options), []).append(target)
        pairs: dict[object, Pair] = {}
        made = []
        for target, kind in zip(targets, kinds, strict=True):
            group = _group(kind, target, options)
            owns = group not in pairs
            if owns:
                pairs[group] = start_pair(kind, groups[group], options["init"])
            make = self._mixing_of(target)
            made.append(make(target, pairs[group], owns, clock, options))
        made[0].add_module("clock", clock)
        return made, clock

    def _mixing_of(self, target: Target) -> MixingOf:
        if target.mapped and not self.maps_channels:
            return _bridged
        return self.mixing or _mixed

    def _pair_of(self, target: Target, targets: Sequence[Target]) -> type[Pair]:
        """A vector that goes with no weight has no channels of its own: two numbers a channel would be more than it."""
        assert self.pair is not None
        if not self.pair.per_channel or not is_vector(target.own.shape):
            return self.pair
        partners = [other for other in targets if other.layer == target.layer and not is_vector(other.own.shape)]
        return self.pair if any(len(other.own) == len(target.own) for other in partners) else ScalarPair


def _group(kind: type[Pair], target: Target, options: Mapping[str, Any]) -> object:
    """Which tensors of a unit share a pair."""
    if kind.per_channel:
        return target.layer, len(target.own)
    return (target.layer, target.name) if options.get("pair") == "tensor" else kind


def _mixed(target: Target, pair: Pair, owns: bool, clock: Clock | None, options: Mapping[str, Any]) -> Mixing:
    return Mixing(pair, owns, clock, options["neighbours"] == "attached")


def _corrected(target: Target, pair: Pair, owns: bool, clock: Clock | None, options: Mapping[str, Any]) -> Mixing:
    """A vector has no matrix that could be of low rank."""
    if is_vector(target.own.shape):
        return _mixed(target, pair, owns, clock, options)
    attached = options["neighbours"] == "attached"
    return LowRankMixing(pair, owns, clock, attached, target.own.shape, options["rank"])


def _projected(target: Target, pair: Pair, owns: bool, clock: Clock | None, options: Mapping[str, Any]) -> Mixing:
    """Every source mapped."""
    return _mapped(target, pair, owns, clock, options, options["rank"], always=True)


def _bridged(target: Target, pair: Pair, owns: bool, clock: Clock | None, options: Mapping[str, Any]) -> Mixing:
    """Only the sources of another shape mapped, by ``boundary: project``."""
    return _mapped(target, pair, owns, clock, options, options["boundary_rank"], always=False)


def _mapped(
    target: Target, pair: Pair, owns: bool, clock: Clock | None, options: Mapping[str, Any], rank: int, always: bool
) -> Mixing:
    attached = options["neighbours"] == "attached"
    sources = (target.previous, target.succeeding)
    return ProjectMixing(pair, owns, clock, attached, sources, target.own.shape, rank, always)


def _num_corrected(shape: Sequence[int], _: Sequence[Sequence[int]], options: Mapping[str, Any]) -> int:
    return int(options["rank"]) * sum(matrix_shape(shape)) if not is_vector(shape) else 0


def _num_projected(shape: Sequence[int], sources: Sequence[Sequence[int]], options: Mapping[str, Any]) -> int:
    return sum(num_map_terms(source, shape, options["rank"]) for source in sources)


def _choice(default: str, choices: Sequence[str], meaning: str) -> Option:
    rule = f"one of {', '.join(choices)}"
    return Option(default, meaning, rule, lambda value: isinstance(value, str) and value in choices)


def _count(default: int, meaning: str) -> Option:
    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    return Option(default, meaning, "a whole number of at least 1", accepts)


_COMMON = {
    "init": _choice("auto", INITS, "where a and b start; auto: half in models with batch norm, else rms"),
    "operator": _choice("same", ("same", "single"), "same: the unit's structure; single: one of its layers for all"),
    "neighbours": _choice("attached", ("attached", "detached"), "whether the sources learn through this unit too"),
    "norms": _choice("own", ("own", "borrowed"), "whether norms keep their affine parameters or these are made too"),
    "boundary": _choice(
        "strict",
        ("strict", "keep", "one_sided", "project"),
        "a tensor of another shape than a source's is refused, stays learnable, takes the source that fits, or maps it",
    ),
    "boundary_rank": _count(4, "the rank of the maps of boundary: project"),
    "sources": _choice(
        "adjacent", SOURCES, "nearest: the nearest units that own their parameters, so that neighbours may be replaced"
    ),
}
_PAIR = {"pair": _choice("unit", ("unit", "tensor"), "whether a unit has one pair, or each of its tensors")}
_LAZY = {"update_every": _count(1, "learns in every so many training passes only; compiled models in all")}
_DETACHED = {"neighbours": _choice("detached", ("detached", "attached"), _COMMON["neighbours"].meaning)}

# The one place to add a block.
BLOCKS: dict[str, BlockKind] = {
    kind.name: kind
    for kind in (
        BlockKind("skip", "nothing: the input is the output (the control)"),
        BlockKind(
            "constant",
            "a P + b N with fixed a and b: nothing is learned",
            ConstantPair,
            options=_COMMON | _PAIR | _DETACHED,
        ),
        BlockKind("scalar", "a P + b N, two numbers a unit", ScalarPair, options=_COMMON | _PAIR | _LAZY),
        BlockKind("angle", "cos φ P + sin φ N, one number a unit", AnglePair, options=_COMMON | _PAIR | _LAZY),
        BlockKind("coupled", "s P + (2 - s) N, one number a unit", CoupledPair, options=_COMMON | _PAIR | _LAZY),
        BlockKind("channel", "a P + b N, two numbers an output channel", ChannelPair, options=_COMMON | _LAZY),
        BlockKind(
            "lowrank",
            "a P + b N + U Vᵀ, two numbers a unit and a low-rank correction of each weight",
            ScalarPair,
            _corrected,
            _num_corrected,
            _COMMON | _PAIR | {"rank": _count(4, "the rank of U Vᵀ")},
        ),
        BlockKind(
            "project",
            "a A P Bᵀ + b C N Dᵀ, two numbers a unit and low-rank maps of the sources' channels",
            ScalarPair,
            _projected,
            _num_projected,
            _COMMON | _PAIR | {"rank": _count(4, "the rank of the learned part of each map")},
        ),
    )
}
