"""Which parts of a model can be replaced: chains of like units, in the order in which the model really runs them.

Method: reconstruction. The papers replace "layers" of ResNets and ViTs, and only the self-attention in ViTs; here an
element of a chain is a unit, and so is each role inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.replacement.calls import Call, record_calls
from rlsearch.replacement.chains import NORMS as NORMS
from rlsearch.replacement.chains import find_chains, find_roles
from rlsearch.replacement.no_units import explain_no_units

BLOCK_ROLE = "block"


@dataclass(frozen=True)
class Unit:
    """A submodule that can be replaced.

    Attributes:
        name: its qualified name in the model, as ``layer1.3`` or ``layer1.3.conv2``.
        chain: the run of like elements that it belongs to, or is part of.
        role: ``block`` for a whole element of the chain; else its path below the element, as ``conv2`` or ``f.b``.
        sources: the names of the preceding and the succeeding unit of the same role and class in the chain, from which
            a replaced unit borrows; None for the first and the last of them.
        num_params: parameters in it, each storage once.
        input_shape: of its input without the batch; None if its input is not a single tensor. A tensor that is passed
            several times, as to a self-attention, is a single one.
        output_shape: of its output without the batch; None if that is neither a tensor nor a tuple of a tensor and
            None.
    """

    name: str
    chain: str
    role: str
    sources: tuple[str, str] | None
    num_params: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


def find_units(model: nn.Module, example_input: Tensor | None = None) -> list[Unit]:
    """The units of a model in true forward order: by when each starts to run, an element before its roles.

    A chain is a run of at least two children of one class in an ``nn.Sequential`` or ``nn.ModuleList``, in the order in
    which they run. Children without parameters and norm layers may stand between them. A plain container that holds a
    chain, and a subclass that holds a chain of blocks, is opened rather than taken for an element.

    The children of a chain's elements are its roles, if at least two elements have one of the same class under the same
    name; norm layers and children without parameters are none. If one child alone is a role and an ``nn.Sequential``,
    its children are looked at in its place; nothing else inside an element is opened.

    Args:
        model: it is neither changed nor really run.
        example_input: one input; only its shape and type matter, so that it may be on the ``meta`` device. By default a
            shape is guessed, as `rlsearch.model_graph.example_shape` does.

    Raises:
        ModelError: the model has no chain, cannot be run on the input, or no input can be guessed.
    """
    calls = record_calls(model, example_input)
    found: list[Unit] = []
    for chain, elements in find_chains(model, calls):
        found += _units(model, chain, BLOCK_ROLE, elements, calls)
        for role, names in find_roles(model, elements, calls):
            found += _units(model, chain, role, names, calls)
    if not found:
        raise ModelError(explain_no_units(model, calls))
    return sorted(found, key=lambda unit: calls[unit.name].order)


def _units(model: nn.Module, chain: str, role: str, names: list[str], calls: Mapping[str, Call]) -> Iterator[Unit]:
    """Units of one chain, role and class, given in forward order."""
    for index, name in enumerate(names):
        inner = 0 < index < len(names) - 1
        sources = (names[index - 1], names[index + 1]) if inner else None
        size = count_elements(model.get_submodule(name).parameters())
        yield Unit(name, chain, role, sources, size, calls[name].input_shape, calls[name].output_shape)


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Elements of the tensors, counting each part of a storage once (tied weights, views)."""
    views: dict[int, set[tuple[Any, ...]]] = {}
    sizes: dict[int, int] = {}
    totals: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage._cdata
        view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if view not in views.setdefault(key, set()):
            views[key].add(view)
            totals[key] = totals.get(key, 0) + tensor.numel()
            sizes[key] = storage.nbytes() // tensor.element_size()
    return sum(min(totals[key], sizes[key]) for key in totals)
