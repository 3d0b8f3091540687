"""How many parameters and bytes a model has, and how far a replaced unit changes that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rlsearch.replacement import learnable_params, total_params
from rlsearch.training.storages import block_bytes, storage_key


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model or a unit, or how far those of two differ.

    Attributes:
        learnable: parameters that take a gradient, each part of a storage once.
        total: parameters of the materialised model.
        learnable_tensors: how many tensors they are, each storage once.
        learnable_bytes: of them, each storage once, in whole blocks of the allocator.
        fixed_bytes: of all parameters and buffers, each storage once, in whole blocks of the allocator.
    """

    learnable: int = 0
    total: int = 0
    learnable_tensors: int = 0
    learnable_bytes: int = 0
    fixed_bytes: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> Sizes:
        """The sizes of a model, or of a unit by itself."""
        learnable = _storages(p for p in module.parameters() if p.requires_grad)
        fixed = _storages([*module.parameters(), *module.buffers()])
        return cls(
            learnable_params(module),
            total_params(module),
            len(learnable),
            sum(learnable.values()),
            sum(fixed.values()),
        )

    def __add__(self, other: Sizes) -> Sizes:
        return self._combine(other, 1)

    def __sub__(self, other: Sizes) -> Sizes:
        return self._combine(other, -1)

    def _combine(self, other: Sizes, sign: int) -> Sizes:
        return Sizes(*(mine + sign * getattr(other, name) for name, mine in vars(self).items()))


class SharedStorage:
    """Which parts of a model hold tensors that others hold too: their sizes do not add up.

    Args:
        model: looked at once, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders = Counter(_held(model))

    def has(self, part: nn.Module) -> bool:
        """Whether a tensor of ``part`` is held outside of it too."""
        return any(self._holders[storage] > count for storage, count in Counter(_held(part)).items())


def _held(module: nn.Module) -> Iterator[int]:
    """The storage of every parameter and buffer, once for each place that holds it."""
    for _, part in module.named_modules(remove_duplicate=False):
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            if tensor is not None:
                yield storage_key(tensor)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of the tensors' storages, by storage."""
    return {storage_key(tensor): block_bytes(tensor.untyped_storage().nbytes()) for tensor in tensors}
