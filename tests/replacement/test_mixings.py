"""The mathematics of every block against what autograd makes of it, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsearch.replacement.blocks import BLOCKS, Target
from rlsearch.replacement.mixings import Mixing, ScalarMixing

COMPUTING = [kind for kind in BLOCKS.values() if kind.make is not None]
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def _terms(mixing: Mixing) -> list[Tensor]:
    """The mixing's terms at a random point: at their start some gradients are zero whatever the code does."""
    return [torch.randn_like(term, requires_grad=True) for term in mixing.terms()]


@pytest.mark.parametrize("kind", COMPUTING, ids=lambda kind: kind.name)
@given(shape=SHAPES, seed=st.integers(0, 2**31), channels_last=st.booleans())
@settings(max_examples=30, deadline=None)
def test_compose_backward_is_the_gradient_of_compose(kind, shape, seed, channels_last) -> None:
    torch.manual_seed(seed)
    previous, succeeding, own, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    if channels_last and len(shape) == 4:
        previous, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (previous, grad))
    (mixing,) = kind.make([Target(own, previous, succeeding)], kind.resolve({}))
    inputs = [previous.requires_grad_(), succeeding.requires_grad_(), *_terms(mixing)]
    expected = torch.autograd.grad(mixing.compose(*inputs), inputs, grad)
    found = mixing.compose_backward(grad, *(tensor.detach() for tensor in inputs))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_scalar_is_a_p_plus_b_n() -> None:
    previous, succeeding = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    made = ScalarMixing.compose(previous, succeeding, torch.tensor(3.0), torch.tensor(0.5))
    assert made.tolist() == [8.0, 16.0]


def test_channel_mixes_each_output_channel_by_itself() -> None:
    (mixing,) = BLOCKS["channel"].make([Target(*torch.randn(3, 2, 3, 1, 1))], BLOCKS["channel"].resolve({}))
    previous, succeeding = torch.ones(2, 3, 1, 1), 10 * torch.ones(2, 3, 1, 1)
    made = mixing.compose(previous, succeeding, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    assert made[:, :, 0, 0].tolist() == [[1.0] * 3, [12.0] * 3]


def test_lowrank_keeps_its_precision_under_autocast() -> None:
    kind = BLOCKS["lowrank"]
    (mixing,) = kind.make([Target(*torch.randn(3, 8, 8))], kind.resolve({}))
    inputs = [torch.randn(8, 8), torch.randn(8, 8), *(term.detach() for term in _terms(mixing))]
    grad = torch.randn(8, 8)
    plain = (mixing.compose(*inputs), *mixing.compose_backward(grad, *inputs))
    with torch.autocast("cpu", torch.bfloat16):
        cast = (mixing.compose(*inputs), *mixing.compose_backward(grad, *inputs))
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
