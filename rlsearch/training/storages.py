"""What operations allocate, from when it is made to when its last reference goes; and how many operations they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# torch's allocator on CUDA gives out, and counts as allocated, whole blocks of so many bytes.
_BLOCK = 512


def block_bytes(num_bytes: int) -> int:
    """What the allocator counts for a tensor of so many bytes."""
    return -(-num_bytes // _BLOCK) * _BLOCK


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that lie in one storage, while it is there."""
    return int(tensor.untyped_storage()._cdata)


class Storages(TorchDispatchMode):
    """Notes every storage that comes and goes, and counts operations, of what runs under it on any kind of tensors.

    Operations are counted as by `torch.utils.flop_counter.FlopCounterMode`, with the same formulas, but not module by
    module, which takes that one as long again. torch has formulas for attention too, on the CPU as on CUDA. It counts
    the weight gradient of a convolution in groups as that of a dense one, which is more than is computed.

    What a kernel takes for itself while it runs is not seen here.

    Args:
        known: tensors that were there before: they are not noted.

    Attributes:
        flops: operations so far.
        events: for each storage that came or went its number and its bytes, negative where it went.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = 0
        self.events: list[tuple[int, int]] = []
        self._known = {storage_key(tensor) for tensor in known}
        self._numbers: dict[int, tuple[int, Any]] = {}

    def number(self, tensor: Tensor) -> int | None:
        """The number of a noted storage; None for one that was there before."""
        found = self._numbers.get(storage_key(tensor))
        return None if found is None else found[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Operations that are made of others do not come here: autograd has taken them apart.
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if isinstance(result, Tensor):
            self._note(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._note(item)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key in self._numbers or key in self._known:
            return
        number, num_bytes = len(self.events), block_bytes(storage.nbytes())

        def gone(_: object) -> None:
            # A later storage may lie at the same address.
            del self._numbers[key]
            self.events.append((number, -num_bytes))

        self._numbers[key] = number, weakref.ref(storage, gone)
        self.events.append((number, num_bytes))


def peak_bytes(events: Iterable[tuple[int, int]], start: int = 0) -> int:
    """The most that was alive at once, from ``start`` bytes on."""
    alive = peak = start
    for _, num_bytes in events:
        alive += num_bytes
        peak = max(peak, alive)
    return peak
