"""What a and b are, by which a replaced unit weighs its two sources: learned, fixed, tied to each other, per channel.

A pair is given by its *terms* (what is learned, if anything) and two pure functions: from the terms to a and b, and
from the gradients of a and b to those of the terms. Reconstruction, except for `ScalarPair` (arXiv 2410.01239).
"""

from __future__ import annotations

from torch import Tensor, nn


class Pair(nn.Module):
    """A unit's a and b, the weights of the preceding and of the succeeding source."""

    per_channel = False

    def terms(self) -> tuple[Tensor, ...]:
        """The tensors that the functions below take."""
        raise NotImplementedError

    @staticmethod
    def coefficients(*terms: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, numbers or one number an output channel."""
        raise NotImplementedError

    @staticmethod
    def terms_gradient(grad_a: Tensor, grad_b: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        """From dL/da and dL/db the gradient of each term."""
        raise NotImplementedError


class ScalarPair(Pair):
    """a and b, two numbers (arXiv 2410.01239)."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)

    def terms(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    @staticmethod
    def coefficients(*terms: Tensor) -> tuple[Tensor, Tensor]:
        a, b = terms
        return a, b

    @staticmethod
    def terms_gradient(grad_a: Tensor, grad_b: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        return grad_a, grad_b


class ChannelPair(ScalarPair):
    """a and b of one number an output channel, the first dimension of what is made."""

    per_channel = True


class ConstantPair(Pair):
    """Fixed a and b. Buffers: they belong to the state, but nothing learns them."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def terms(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    @staticmethod
    def coefficients(*terms: Tensor) -> tuple[Tensor, Tensor]:
        a, b = terms
        return a, b


class AnglePair(Pair):
    """a = cos φ, b = sin φ: one number, as much as two are worth where a batch norm follows."""

    def __init__(self, phi: Tensor) -> None:
        super().__init__()
        self.phi = nn.Parameter(phi)

    def terms(self) -> tuple[Tensor, ...]:
        return (self.phi,)

    @staticmethod
    def coefficients(*terms: Tensor) -> tuple[Tensor, Tensor]:
        (phi,) = terms
        return phi.cos(), phi.sin()

    @staticmethod
    def terms_gradient(grad_a: Tensor, grad_b: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        (phi,) = terms
        return (grad_b * phi.cos() - grad_a * phi.sin(),)


class CoupledPair(Pair):
    """a = s, b = 2 - s: one number, which moves weight from one source to the other."""

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(s)

    def terms(self) -> tuple[Tensor, ...]:
        return (self.s,)

    @staticmethod
    def coefficients(*terms: Tensor) -> tuple[Tensor, Tensor]:
        (s,) = terms
        return s, 2 - s

    @staticmethod
    def terms_gradient(grad_a: Tensor, grad_b: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        return (grad_a - grad_b,)
