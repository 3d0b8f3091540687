"""Sources whose channels are mapped by learned low-rank matrices before they are mixed: the block `project`.

Reconstruction, after the idea of learned width maps in "Learning to Grow Pretrained Models for Efficient Transformer
Training" (arXiv 2303.00980): W = a A P Bᵀ + b C N Dᵀ, where each of A, B, C, D is a fixed map E (the identity, or where
the numbers of channels differ a repetition or a selection of them) plus a learned U Vᵀ that starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlsearch.replacement.clock import Clock
from rlsearch.replacement.mixings import Gradients, Mixing, full_precision, is_vector, low_rank
from rlsearch.replacement.pairs import Pair


class ChannelMap(nn.Module):
    """Maps a source's tensor (out_s, in_s, …) to the shape (out, in, …).

    A vector, and a dimension of one channel on both sides, is carried by E alone: a learned map of it would be larger
    than what it makes.

    Args:
        source: the source's tensor.
        shape: of what is made; its dimensions from the third on are the source's.
        rank: of U Vᵀ.
    """

    def __init__(self, source: Tensor, shape: Sequence[int], rank: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for name, dim in _learned_dims(source.shape, shape):
            u, v = low_rank(source, shape[dim], source.shape[dim], rank)
            self.register_parameter(f"{name}_u", u)
            self.register_parameter(f"{name}_v", v)

    def terms(self) -> tuple[Tensor, ...]:
        """U and V of the output channels, then of the input channels, as far as they are learned."""
        return tuple(self.parameters())

    def forward(self, source: Tensor, terms: Sequence[Tensor]) -> Tensor:
        """The mapped source; ``terms`` stand for `terms`, so that it is a function of tensors."""
        learned = dict(_learned_dims(source.shape, self.shape))
        pairs = iter(zip(terms[::2], terms[1::2], strict=True))
        for name, dim in (("out", 0), ("in", 1)):
            if dim >= len(self.shape):
                continue
            fixed = _resized(source, dim, self.shape[dim])
            if name in learned:
                u, v = next(pairs)
                with full_precision(u):
                    # Through the narrow side: the product of the two would be as large as a whole map.
                    narrow = torch.tensordot(source, v, dims=([dim], [0]))
                    fixed = fixed + (narrow @ u.T).movedim(-1, dim)
            source = fixed
        return source


class ProjectMixing(Mixing):
    """a and b times sources whose channels are mapped.

    Args:
        pair, owns_pair, clock, attached: as in `Mixing`.
        sources: the tensors of the preceding and the succeeding source; None where one is not used.
        shape: of W.
        rank: of the learned maps.
        always: whether a source of W's shape is mapped too.
    """

    def __init__(
        self,
        pair: Pair,
        owns_pair: bool,
        clock: Clock | None,
        attached: bool,
        sources: tuple[Tensor | None, Tensor | None],
        shape: Sequence[int],
        rank: int,
        always: bool,
    ) -> None:
        super().__init__(pair, owns_pair, clock, attached)
        self.map_previous, self.map_succeeding = (
            ChannelMap(source, shape, rank) if source is not None and (always or source.shape != shape) else None
            for source in sources
        )

    def terms(self) -> tuple[Tensor, ...]:
        maps = [part.terms() for part in (self.map_previous, self.map_succeeding) if part is not None]
        return *super().terms(), *(term for terms in maps for term in terms)

    def compose(self, previous: Tensor | None, succeeding: Tensor | None, *terms: Tensor) -> Tensor:
        rest = list(terms)
        pair_terms = [rest.pop(0) for _ in super().terms()]
        mapped = []
        for source, part in ((previous, self.map_previous), (succeeding, self.map_succeeding)):
            own = [] if part is None else [rest.pop(0) for _ in part.terms()]
            # Not called as a module: hooks on modules, as a FLOP counter's, do not work within a backward pass.
            mapped.append(source if part is None or source is None else part.forward(source, own))
        return super().compose(mapped[0], mapped[1], *pair_terms)

    def compose_backward(
        self,
        grad: Tensor,
        needs: Sequence[bool],
        previous: Tensor | None,
        succeeding: Tensor | None,
        *terms: Tensor,
    ) -> Gradients:
        given = (previous, succeeding, *terms)
        with torch.enable_grad():
            inputs = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(given, needs, strict=True)
            ]
            made = self.compose(*inputs)  # type: ignore[arg-type]  # the terms, from the third on, are never None
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        # A coefficient of a source that is not there plays no part.
        with full_precision(grad):
            found = iter(torch.autograd.grad(made, wanted, grad, allow_unused=True, materialize_grads=True))
        return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs)


def carried(source: Tensor, shape: Sequence[int]) -> Tensor:
    """A source brought to a shape by the fixed maps E alone."""
    for dim in range(min(2, len(shape))):
        source = _resized(source, dim, shape[dim])
    return source


def num_map_terms(source: Sequence[int], shape: Sequence[int], rank: int) -> int:
    """How many numbers a `ChannelMap` learns."""
    return sum(rank * (shape[dim] + source[dim]) for _, dim in _learned_dims(source, shape))


def _learned_dims(source: Sequence[int], shape: Sequence[int]) -> list[tuple[str, int]]:
    if is_vector(shape):
        return []
    return [(name, dim) for name, dim in (("out", 0), ("in", 1)) if source[dim] > 1 or shape[dim] > 1]


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """E: the channels repeated in turn, or the first of them; input channels scaled so that the variance of the
    layer's output stays."""
    count = tensor.shape[dim]
    if count == size:
        return tensor
    chosen = tensor.index_select(dim, torch.arange(size, device=tensor.device) % count)
    return chosen * (count / size) ** 0.5 if dim == 1 else chosen
