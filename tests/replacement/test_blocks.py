"""How blocks start, what their tensors share, what they can be told, and what of that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlsearch.replacement import apply_policy
from rlsearch.replacement.blocks import BLOCKS
from rlsearch.replacement.mixings import Mixing, Target

SOURCED = ["constant", "scalar", "angle", "coupled", "channel", "lowrank", "project"]


def _targets(*shapes: tuple[int, ...]) -> list[Target]:
    """Tensors of one layer each, of random values; a vector belongs to the layer before it."""
    torch.manual_seed(3)
    layers = [sum(len(other) > 1 for other in shapes[: index + 1]) for index in range(len(shapes))]
    names = ["bias" if len(shape) == 1 else "weight" for shape in shapes]
    return [
        Target(f"layer{layer}", name, *torch.randn(3, *shape, dtype=torch.float64), mapped=False)
        for layer, name, shape in zip(layers, names, shapes, strict=True)
    ]


def _made(block: str, targets: Sequence[Target], **options: Any) -> list[Mixing]:
    kind = BLOCKS[block]
    return kind.make(targets, kind.resolve({"init": "half"} | options))[0]


def _compose(mixing: Mixing, target: Target) -> Tensor:
    return mixing.compose(target.previous, target.succeeding, *mixing.terms()).detach()


COMMON = {
    "init": "auto",
    "operator": "same",
    "neighbours": "attached",
    "norms": "own",
    "boundary": "strict",
    "boundary_rank": 4,
    "sources": "adjacent",
}


def test_the_blocks_are_these() -> None:
    assert {name: kind.needs_sources for name, kind in BLOCKS.items()} == {"skip": False} | dict.fromkeys(SOURCED, True)
    assert {name: kind.resolve({}) for name, kind in BLOCKS.items()} == {
        "skip": {},
        "constant": COMMON | {"pair": "unit", "neighbours": "detached"},
        **dict.fromkeys(("scalar", "angle", "coupled"), COMMON | {"pair": "unit", "update_every": 1}),
        "channel": COMMON | {"update_every": 1},
        **dict.fromkeys(("lowrank", "project"), COMMON | {"pair": "unit", "rank": 4}),
    }


STARTS = {"half": (0.5, 0.5), "rms": (0.5**0.5, 0.5**0.5), "previous": (1.0, 0.0)}


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("block", SOURCED)
def test_starts(block: str, init: str) -> None:
    targets = _targets((6, 5, 3, 3), (6,))
    a, b = STARTS[init]
    if block == "angle":
        a, b = (1.0, 0.0) if init == "previous" else STARTS["rms"]
    elif block == "coupled":
        a, b = (2.0, 0.0) if init == "previous" else (1.0, 1.0)
    for mixing, target in zip(_made(block, targets, init=init, rank=1), targets, strict=True):
        torch.testing.assert_close(_compose(mixing, target), a * target.previous + b * target.succeeding)


@pytest.mark.parametrize(("norm", "expected"), [(nn.BatchNorm1d, 0.5), (nn.LayerNorm, 0.5**0.5), (None, 0.5**0.5)])
def test_the_start_is_a_half_in_models_with_batch_norm(chain_net, policy_of, norm, expected: float) -> None:
    layers = [nn.Linear(4, 4) for _ in range(3)]
    model = nn.Sequential(chain_net(*layers), *([norm(4)] if norm else []))
    apply_policy(model, policy_of({"0.chain.1": "scalar"}), torch.empty(2, 4))
    torch.testing.assert_close(
        model[0].chain[1].weight, expected * layers[0].weight + expected * layers[2].weight, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("block", "count"), [("scalar", 2), ("constant", 2), ("angle", 1), ("coupled", 1)])
def test_a_pair_serves_the_unit_or_each_tensor(block: str, count: int) -> None:
    targets = _targets((6, 5), (6,), (4, 6))
    for pair, pairs in (("unit", 1), ("tensor", 3)):
        made = _made(block, targets, pair=pair)
        terms = {id(term): term for mixing in made for term in mixing.terms()}
        assert len(terms) == count * pairs
        assert all(term.shape == () for term in terms.values())
        registered = [*nn.ModuleList(made).parameters(), *nn.ModuleList(made).buffers()]
        assert {id(term) for term in registered} == set(terms)
        assert len(registered) == len(terms)


def test_channel_is_a_pair_of_vectors_a_layer_shared_by_weight_and_bias() -> None:
    made = _made("channel", _targets((6, 5), (6,), (7, 6), (7,)))
    assert [[tuple(term.shape) for term in mixing.terms()] for mixing in made] == [[(6,)] * 2] * 2 + [[(7,)] * 2] * 2
    assert made[0].terms()[0] is made[1].terms()[0]
    assert made[2].terms()[0] is made[3].terms()[0]


def test_vectors_without_a_weight_have_numbers() -> None:
    scale = Target("scale", "gamma", *torch.randn(3, 6), mapped=False)
    weight, of_scale = _made("channel", [*_targets((6, 5)), scale])
    assert [term.shape for term in of_scale.terms()] == [(), ()]
    assert [term.shape for term in weight.terms()] == [(6,), (6,)]


def test_corrections_are_of_matrices_only() -> None:
    bias, weight, other = (
        [tuple(term.shape) for term in mixing.terms()]
        for mixing in _made("lowrank", _targets((6,), (6, 5, 3, 3), (6, 5)), rank=2)
    )
    assert bias == [(), ()]
    assert weight == [(), (), (6, 2), (45, 2)]
    assert other == [(), (), (6, 2), (5, 2)]


def _error(block: str, targets: Sequence[Target]) -> float:
    made = _made(block, targets, init="fit", rank=1)
    return sum(
        (_compose(mixing, target) - target.own).square().sum().item()
        for mixing, target in zip(made, targets, strict=True)
    )


@pytest.mark.parametrize("block", SOURCED)
def test_fit_is_the_least_squares_that_the_block_can_reach(block: str) -> None:
    """No pair nearby comes closer to the unit's own tensors."""
    targets = _targets((6, 5, 3, 3), (6,))
    made = _made(block, targets, init="fit", rank=1)
    best = _error(block, targets)
    numbers = [term for term in made[0].terms() if term.dim() == 0 or block == "channel"]
    assert numbers
    for term in numbers:
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                term.add_(step)
                moved = sum(
                    (_compose(mixing, target) - target.own).square().sum().item()
                    for mixing, target in zip(made, targets, strict=True)
                )
                term.sub_(step)
            assert moved > best


def test_fit_of_scalar_is_the_least_squares_over_all_tensors() -> None:
    targets = _targets((6, 5, 3, 3), (6,))
    own, previous, succeeding = (
        torch.cat([getattr(target, place).flatten() for target in targets])
        for place in ("own", "previous", "succeeding")
    )
    expected = torch.linalg.lstsq(torch.stack([previous, succeeding], 1), own[:, None]).solution.flatten()
    for block in ("scalar", "constant"):
        terms = _made(block, targets, init="fit")[0].terms()
        torch.testing.assert_close(torch.stack(terms).detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "a", "b", "close"),
    [("scalar", 0.3, -2.0, 1e-6), ("angle", -0.6, 0.8, 1e-6), ("coupled", -0.5, 2.5, 1e-6), ("constant", 0, 3, 1e-6)],
)
def test_fit_finds_what_the_tensors_were_made_of(block: str, a: float, b: float, close: float) -> None:
    (target,) = _targets((8, 8))
    target = target._replace(own=a * target.previous + b * target.succeeding)
    (mixing,) = _made(block, [target], init="fit")
    torch.testing.assert_close(_compose(mixing, target), target.own, rtol=close, atol=close)


@pytest.mark.parametrize(("size", "expected"), [(1.0, 1.5), (0.0, 0.5)])
def test_fit_shares_between_parallel_sources_and_survives_zeros(size: float, expected: float) -> None:
    tensor = size * torch.randn(8, 8)
    (mixing,) = _made("scalar", [Target("", "weight", 3 * tensor, tensor, tensor, mapped=False)], init="fit")
    torch.testing.assert_close(torch.stack(mixing.terms()).detach(), torch.tensor([expected, expected]))


@pytest.mark.parametrize("block", SOURCED)
def test_fit_with_one_source_or_none_worth_anything_is_finite(block: str) -> None:
    (target,) = _targets((8, 8))
    nothing = torch.zeros_like(target.own)
    for sources in ((target.previous, None), (None, target.succeeding), (nothing, nothing), (nothing, target.own)):
        for init in ("fit", "half", "rms", "previous"):
            given = Target("", "weight", target.own, *sources, mapped=False)
            (mixing,) = _made(block, [given], init=init, rank=1)
            assert _compose(mixing, given).isfinite().all()


def test_every_wrong_option_is_told_with_the_nearest_or_the_rule() -> None:
    problems = BLOCKS["lowrank"].option_problems({"init": "halve", "bounds": "keep", "rank": True, "boundary": "keep"})
    assert problems == [
        "option 'init' of block 'lowrank' must be one of auto, half, rms, previous, fit, got 'halve'",
        "unknown option 'bounds' of block 'lowrank'; did you mean 'boundary'?",
        "option 'rank' of block 'lowrank' must be a whole number of at least 1, got True",
    ]
    assert BLOCKS["skip"].option_problems({"init": "half"}) == ["unknown option 'init' of block 'skip' (it takes none)"]
    assert BLOCKS["lowrank"].option_problems({"rank": 0}) != []
    assert BLOCKS["lowrank"].option_problems({"rank": 2, "init": "fit"}) == []
