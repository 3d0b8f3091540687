"""When two modules cost the same: equal signatures mean equal structure, settings and shapes, whatever the values.

A large model holds dozens of equal blocks. What was found out about one of them (its cost, what can stand in for it)
holds for all that have its signature, and need not be found out again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

# Their keys are counted up with every hook that is ever made.
_HOOKS = "_hooks"
# Modules that drop at random, by the name of their class: between 0 and 1, how often takes no more work.
_RATES = {"Dropout": "p", "Dropout1d": "p", "Dropout2d": "p", "StochasticDepth": "p", "DropPath": "drop_prob"}


def module_signature(module: nn.Module) -> Hashable:
    """What decides how the module computes, except for the values of its tensors.

    In it are the class, the settings and the hooks of every submodule; the shape, layout, type and ``requires_grad`` of
    every tensor; and which tensors and submodules are one and the same. A setting that is not known to be equal to
    another (an object of some other class) is equal to itself alone, so that modules differ rather than seem equal.
    """
    return _Describer().module(module)


def graph_signature(module: fx.GraphModule) -> Hashable:
    """The same for a traced module: its graph, with the modules that it calls in the place of their names."""
    describer = _Describer()
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    described: list[Hashable] = []
    for node in module.graph.nodes:
        if node.op == "call_module":
            target: Hashable = describer.module(module.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            target = describer.value(functools.reduce(getattr, str(node.target).split("."), module))
        else:
            target = None if node.op in ("placeholder", "output") else describer.value(node.target)
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Place(position[n]))
        described.append((node.op, target, describer.value(given)))
    return tuple(described)


class _Place(int):
    """The position of a node in its graph."""


class _Same:
    """An object that is equal to itself alone. It is held, so that no later one can take its address."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Describer:
    """Numbers modules and storages in the order in which it meets them."""

    def __init__(self) -> None:
        self._modules: dict[int, int] = {}
        self._storages: dict[int, int] = {}

    def module(self, module: nn.Module) -> Hashable:
        if id(module) in self._modules:
            return "again", self._modules[id(module)]
        self._modules[id(module)] = len(self._modules)
        rate = _RATES.get(type(module).__name__)
        return type(module), tuple((name, self._attribute(name, value, rate)) for name, value in vars(module).items())

    def _attribute(self, name: str, value: Any, rate: str | None) -> Hashable:
        if isinstance(value, dict) and _HOOKS in name:
            return tuple(self.value(hook) for hook in value.values())
        if name == rate and isinstance(value, float) and 0 < value < 1:
            return "sometimes"
        return self.value(value)

    def value(self, value: Any) -> Hashable:
        """Anything that a module may have as an attribute, or a function as an argument."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            # True, 1 and 1.0 are equal, but not the same setting.
            return type(value), value
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return _Same(value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        return self._collection(value)

    def _collection(self, value: Any) -> Hashable:
        if isinstance(value, functools.partial):
            return "partial", self.value(value.func), self.value(value.args), self.value(value.keywords)
        if isinstance(value, types.MethodType):
            return "method", self.value(value.__func__), self.value(value.__self__)
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self.value(item) for item in value)
        if isinstance(value, slice):
            return "slice", self.value((value.start, value.stop, value.step))
        if isinstance(value, Mapping):
            return type(value), tuple((self.value(key), self.value(item)) for key, item in value.items())
        if isinstance(value, (set, frozenset)) and all(isinstance(item, str) for item in value):
            return type(value), tuple(sorted(value))
        return _Same(value)

    def _tensor(self, tensor: Tensor) -> Hashable:
        storage = self._storages.setdefault(tensor.untyped_storage()._cdata, len(self._storages))
        place = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return type(tensor), place, tensor.dtype, tensor.device.type, tensor.requires_grad
