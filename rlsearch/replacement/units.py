"""Which parts of a model can be replaced: chains of like units, in the order in which the model really runs them.

Method: reconstruction. The papers replace "layers" of ResNets and ViTs; what a layer of a given model is, and which
layers precede and succeed it, is read here from one forward pass over tensors that allocate nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.model_graph import example_shape, fake_copy

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Unit:
    """A submodule that can be replaced.

    Attributes:
        name: its qualified name in the model, as ``layer1.3``.
        chain: the run of like units that it belongs to.
        role: ``block`` for a whole element of the chain.
        sources: the names of the preceding and the succeeding unit of the same role in the chain, from which a replaced
            unit borrows; None for the first and the last of a chain.
        num_params: parameters in it, each storage once.
        input_shape: of its input without the batch; None if its input is not a single tensor.
        output_shape: of its output without the batch; None if its output is not a single tensor.
    """

    name: str
    chain: str
    role: str
    sources: tuple[str, str] | None
    num_params: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class _Call:
    """The first time that a module ran: after how many others, and the shapes that went in and out."""

    order: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


def find_units(model: nn.Module, example_input: Tensor | None = None) -> list[Unit]:
    """The units of a model in true forward order.

    A chain is a run of at least two children of one class in an ``nn.Sequential`` or ``nn.ModuleList``, in the order in
    which they run. Children without parameters and norm layers may stand between them; nothing inside a unit is
    looked at. A plain container that holds a chain is opened rather than taken for a unit.

    Args:
        model: it is neither changed nor really run.
        example_input: one input; only its shape and type matter, so that it may be on the ``meta`` device. By default a
            shape is guessed, as `rlsearch.model_graph.example_shape` does.

    Raises:
        ModelError: the model has no chain, cannot be run on the input, or no input can be guessed.
    """
    calls = _record_calls(model, example_input)
    found: dict[str, Unit] = {}
    for chain, names in _chains("", model, calls):
        for index, name in enumerate(names):
            inner = 0 < index < len(names) - 1
            sources = (names[index - 1], names[index + 1]) if inner else None
            call = calls[name]
            size = count_elements(model.get_submodule(name).parameters())
            found[name] = Unit(name, chain, "block", sources, size, call.input_shape, call.output_shape)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no unit to replace: none of its nn.Sequential or nn.ModuleList holds two or "
            "more consecutive children of one class with parameters; put the blocks that repeat into an nn.Sequential"
        )
    return sorted(found.values(), key=lambda unit: calls[unit.name].order)


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


def _record_calls(model: nn.Module, example_input: Tensor | None) -> dict[str, _Call]:
    """The first call of every submodule that runs, by name."""
    if example_input is None:
        shape = example_shape(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    else:
        shape, dtype = tuple(example_input.shape), example_input.dtype
    mode, fake = fake_copy(model)
    fake.eval()
    started: dict[str, int] = {}
    calls: dict[str, _Call] = {}

    def watch(name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _args: Any) -> None:
            started.setdefault(name, len(started))

        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            given = args[0] if len(args) == 1 and not kwargs else None
            calls.setdefault(name, _Call(started[name], _shape(given), _shape(output)))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, with_kwargs=True)

    # A module that is registered in two places is watched, and so can be a unit, under its first name alone.
    for name, module in fake.named_modules():
        watch(name, module)
    try:
        with mode, torch.no_grad():
            fake(torch.empty(shape, dtype=dtype))
    except Exception as error:  # the model's own forward runs, which may fail in any way
        raise ModelError(f"{type(model).__name__} cannot be run on an input of shape {shape}: {error}") from error
    return calls


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else None


def _chains(name: str, module: nn.Module, calls: Mapping[str, _Call]) -> Iterator[tuple[str, list[str]]]:
    """The chains in ``module``, each with its name and the names of its units."""
    runs = _runs(name, module, calls)
    for run in runs:
        whole = name or "model"
        yield (whole if len(runs) == 1 else f"{whole}[{_last(run[0])}..{_last(run[-1])}]"), run
    units = {unit for run in runs for unit in run}
    for child_name, child in module.named_children():
        full = _join(name, child_name)
        if full not in units:
            yield from _chains(full, child, calls)


def _runs(name: str, module: nn.Module, calls: Mapping[str, _Call]) -> list[list[str]]:
    """Runs of at least two like children of a container, in forward order."""
    if not isinstance(module, _CONTAINERS):
        return []
    children = [(_join(name, child_name), child) for child_name, child in module.named_children()]
    called = sorted((item for item in children if item[0] in calls), key=lambda item: calls[item[0]].order)
    runs: list[list[str]] = []
    last: type[nn.Module] | None = None
    for full, child in called:
        if isinstance(child, NORMS) or next(child.parameters(), None) is None:
            continue
        if type(child) in _CONTAINERS and next(_chains(full, child, calls), None) is not None:
            last = None
            continue
        if type(child) is not last:
            runs.append([])
        runs[-1].append(full)
        last = type(child)
    return [run for run in runs if len(run) > 1]


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _last(name: str) -> str:
    return name.rpartition(".")[2]
