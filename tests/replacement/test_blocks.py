"""How blocks start, what they can be told, and what of that is refused."""

from __future__ import annotations

import pytest
import torch

from rlsearch.replacement.blocks import BLOCKS, Target
from rlsearch.replacement.mixings import ScalarMixing


def _targets(*shapes: tuple[int, ...]) -> list[Target]:
    torch.manual_seed(3)
    return [Target(*torch.randn(3, *shape)) for shape in shapes]


def test_the_blocks_are_these() -> None:
    needs = {name: kind.needs_sources for name, kind in BLOCKS.items()}
    assert needs == {"skip": False, "scalar": True, "channel": True, "lowrank": True}
    assert {name: kind.resolve({}) for name, kind in BLOCKS.items()} == {
        "skip": {},
        "scalar": {"init": "half", "boundary": "strict"},
        "channel": {"init": "half", "boundary": "strict"},
        "lowrank": {"init": "half", "boundary": "strict", "rank": 4},
    }


@pytest.mark.parametrize(("init", "a", "b"), [("half", 0.5, 0.5), ("previous", 1.0, 0.0)])
@pytest.mark.parametrize("block", ["scalar", "channel", "lowrank"])
def test_constant_starts(block: str, init: str, a: float, b: float) -> None:
    kind = BLOCKS[block]
    targets = _targets((6, 5, 3, 3), (6,))
    for mixing, target in zip(kind.make(targets, kind.resolve({"init": init})), targets, strict=True):
        made = mixing.compose(target.previous, target.succeeding, *mixing.terms())
        torch.testing.assert_close(made, a * target.previous + b * target.succeeding)


def test_scalar_is_one_pair_for_all_tensors() -> None:
    kind = BLOCKS["scalar"]
    first, second = kind.make(_targets((6, 5), (6,)), kind.resolve({}))
    assert first is second
    assert [term.shape for term in first.terms()] == [(), ()]


def test_channel_is_a_pair_of_vectors_for_each_tensor() -> None:
    kind = BLOCKS["channel"]
    first, second = kind.make(_targets((6, 5), (7,)), kind.resolve({}))
    assert [[term.shape for term in mixing.terms()] for mixing in (first, second)] == [[(6,), (6,)], [(7,), (7,)]]


def test_lowrank_learns_a_correction_of_matrices_only() -> None:
    kind = BLOCKS["lowrank"]
    bias, weight, other = kind.make(_targets((6,), (6, 5, 3, 3), (6, 5)), kind.resolve({"rank": 2}))
    assert isinstance(bias, ScalarMixing)
    assert [term.shape for term in weight.terms()] == [(), (), (6, 2), (45, 2)]
    assert [term.shape for term in other.terms()] == [(), (), (6, 2), (5, 2)]
    assert all(mixing.terms()[0] is bias.a for mixing in (weight, other))


def test_fit_of_scalar_is_the_least_squares_over_all_tensors() -> None:
    targets = _targets((6, 5, 3, 3), (6,))
    kind = BLOCKS["scalar"]
    mixing = kind.make(targets, kind.resolve({"init": "fit"}))[0]
    own, previous, succeeding = (torch.cat([target[place].flatten() for target in targets]) for place in range(3))
    expected = torch.linalg.lstsq(torch.stack([previous, succeeding], 1), own[:, None]).solution.flatten()
    torch.testing.assert_close(torch.stack(mixing.terms()).detach(), expected)


def test_fit_of_channel_is_the_least_squares_of_each_channel() -> None:
    (target,) = _targets((6, 5, 3, 3))
    kind = BLOCKS["channel"]
    (mixing,) = kind.make([target], kind.resolve({"init": "fit"}))
    sources = torch.stack([target.previous.flatten(1), target.succeeding.flatten(1)], 2)
    expected = torch.linalg.lstsq(sources, target.own.flatten(1)[:, :, None]).solution[:, :, 0]
    torch.testing.assert_close(torch.stack(mixing.terms(), 1).detach(), expected)


def test_fit_finds_what_the_tensors_were_made_of() -> None:
    previous, succeeding = torch.randn(2, 8, 8)
    kind = BLOCKS["scalar"]
    target = Target(0.3 * previous - 2 * succeeding, previous, succeeding)
    (mixing,) = kind.make([target], kind.resolve({"init": "fit"}))
    assert [round(term.item(), 5) for term in mixing.terms()] == [0.3, -2.0]


@pytest.mark.parametrize(("size", "expected"), [(1.0, 1.5), (0.0, 0.5)])
def test_fit_shares_between_parallel_sources_and_survives_zeros(size: float, expected: float) -> None:
    tensor = size * torch.randn(8, 8)
    kind = BLOCKS["scalar"]
    (mixing,) = kind.make([Target(3 * tensor, tensor, tensor)], kind.resolve({"init": "fit"}))
    torch.testing.assert_close(torch.stack(mixing.terms()).detach(), torch.tensor([expected, expected]))


def test_every_wrong_option_is_told_with_the_nearest_or_the_rule() -> None:
    problems = BLOCKS["lowrank"].option_problems({"init": "halve", "bounds": "keep", "rank": True, "boundary": "keep"})
    assert problems == [
        "option 'init' of block 'lowrank' must be one of half, previous, fit, got 'halve'",
        "unknown option 'bounds' of block 'lowrank'; did you mean 'boundary'?",
        "option 'rank' of block 'lowrank' must be a whole number of at least 1, got True",
    ]
    assert BLOCKS["skip"].option_problems({"init": "half"}) == ["unknown option 'init' of block 'skip' (it takes none)"]
    assert BLOCKS["lowrank"].option_problems({"rank": 0}) != []
    assert BLOCKS["lowrank"].option_problems({"rank": 2, "init": "fit"}) == []
