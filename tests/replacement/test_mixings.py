"""The mathematics of every block against what autograd makes of it, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsearch.replacement.blocks import BLOCKS, BlockKind
from rlsearch.replacement.mixings import Mixing, Target

SOURCED = [kind for kind in BLOCKS.values() if kind.needs_sources]
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
SIDES = st.sampled_from([(True, True), (True, False), (False, True)])


def _mixing(kind: BlockKind, previous: Tensor | None, succeeding: Tensor | None, own: Tensor, **options: Any) -> Mixing:
    shapes = {source.shape for source in (previous, succeeding) if source is not None}
    target = Target("", "weight", own, previous, succeeding, mapped=shapes != {own.shape})
    (mixing,), _ = kind.make([target], kind.resolve({"init": "half"} | options))
    return mixing


def _random(terms: tuple[Tensor, ...]) -> list[Tensor]:
    """Terms at a random point: at their start some gradients are zero whatever the code does."""
    return [torch.randn_like(term).requires_grad_() for term in terms]


@pytest.mark.parametrize("kind", SOURCED, ids=lambda kind: kind.name)
@given(shape=SHAPES, used=SIDES, seed=st.integers(0, 2**31), channels_last=st.booleans(), lacking=st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_compose_backward_is_the_gradient_of_compose(kind, shape, used, seed, channels_last, lacking) -> None:
    torch.manual_seed(seed)
    previous, succeeding, own, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    if channels_last and len(shape) == 4:
        previous, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (previous, grad))
    sources = [source if uses else None for source, uses in zip((previous, succeeding), used, strict=True)]
    mixing = _mixing(kind, *sources, own)
    given = [*(None if source is None else source.requires_grad_() for source in sources), *_random(mixing.terms())]
    inputs = [tensor for tensor in given if tensor is not None]
    # Nothing learns the terms of a constant.
    learned = 2 if kind.name == "constant" else len(given)
    needs = [tensor is not None and index != lacking and index < learned for index, tensor in enumerate(given)]
    expected = iter(torch.autograd.grad(mixing.compose(*given), inputs, grad, allow_unused=True))
    found = mixing.compose_backward(grad, needs, *(None if tensor is None else tensor.detach() for tensor in given))
    assert len(found) == len(given)
    for one, tensor, needed in zip(found, given, needs, strict=True):
        other = None if tensor is None else next(expected)
        if not needed:
            continue
        assert one is not None or other is None
        if one is not None:
            other = torch.zeros_like(one) if other is None else other
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


FORMULAS = {
    "constant": ([3.0, 0.5], [8.0, 16.0]),
    "scalar": ([3.0, 0.5], [8.0, 16.0]),
    "angle": ([torch.pi / 2], [10.0, 20.0]),
    "coupled": ([1.5], [6.5, 13.0]),
}


@pytest.mark.parametrize("block", FORMULAS)
def test_formulas_of_numbers(block: str) -> None:
    previous, succeeding = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    terms, expected = FORMULAS[block]
    mixing = _mixing(BLOCKS[block], previous, succeeding, previous)
    made = mixing.compose(previous, succeeding, *map(torch.tensor, terms))
    torch.testing.assert_close(made, torch.tensor(expected))


def test_channel_mixes_each_output_channel_by_itself() -> None:
    previous, succeeding = torch.ones(2, 3, 1, 1), 10 * torch.ones(2, 3, 1, 1)
    mixing = _mixing(BLOCKS["channel"], previous, succeeding, previous)
    made = mixing.compose(previous, succeeding, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    assert made[:, :, 0, 0].tolist() == [[1.0] * 3, [12.0] * 3]


@pytest.mark.parametrize("block", ["lowrank", "project"])
def test_corrections_start_at_zero_and_learn_from_the_first_step(block: str) -> None:
    torch.manual_seed(0)
    previous, succeeding = torch.randn(2, 6, 5, 3, 3, dtype=torch.float64)
    mixing = _mixing(BLOCKS[block], previous, succeeding, previous, rank=1)
    made = mixing.compose(previous, succeeding, *mixing.terms())
    torch.testing.assert_close(made, 0.5 * previous + 0.5 * succeeding)
    gradients = torch.autograd.grad(made.square().sum(), mixing.terms())
    assert sum(bool(gradient.any()) for gradient in gradients) == len(gradients) - (1 if block == "lowrank" else 4)


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (9, 4, 3, 3), (6, 6, 3, 3)], ids=str)
def test_projecting_starts_with_the_channels_in_turn_and_keeps_the_variance_of_the_output(shape) -> None:
    torch.manual_seed(0)
    previous = torch.randn(6, 6, 3, 3, dtype=torch.float64)
    own = torch.zeros(shape, dtype=torch.float64)
    mixing = _mixing(BLOCKS["project"], previous, previous, own, rank=1, init="previous")
    made = mixing.compose(previous, previous, *mixing.terms())
    outputs, inputs = (torch.arange(count) % 6 for count in shape[:2])
    torch.testing.assert_close(made, previous[outputs][:, inputs] * (6 / shape[1]) ** 0.5)


@pytest.mark.parametrize("block", ["lowrank", "project"])
def test_corrections_keep_their_precision_under_autocast(block: str) -> None:
    previous, succeeding, grad = torch.randn(3, 8, 8)
    mixing = _mixing(BLOCKS[block], previous, succeeding, previous)
    inputs = [previous, succeeding, *(term.detach() for term in _random(mixing.terms()))]
    needs = [True] * len(inputs)
    plain = (mixing.compose(*inputs), *mixing.compose_backward(grad, needs, *inputs))
    with torch.autocast("cpu", torch.bfloat16):
        cast = (mixing.compose(*inputs), *mixing.compose_backward(grad, needs, *inputs))
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
