"""Runs of like modules in a model's containers, and the roles that repeat inside them.

Method: reconstruction. The papers replace "layers" of ResNets and ViTs, and only the self-attention in ViTs; what a
layer of a given model is, and which layers precede and succeed it, is read here from one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from rlsearch.replacement.calls import Call

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_chains(model: nn.Module, calls: Mapping[str, Call]) -> list[tuple[str, list[str]]]:
    """The chains of a model: each chain's name, and the names of its elements in forward order."""
    return list(_chains("", model, calls))


def find_roles(model: nn.Module, elements: Sequence[str], calls: Mapping[str, Call]) -> list[tuple[str, list[str]]]:
    """The roles inside the elements of a chain: each role's name, and the names of its modules in forward order.

    A role is a path below an element (``conv1``, ``f.b``) at which at least two elements have a module of one class,
    with parameters and no norm layer. Where a single path remains and holds ``nn.Sequential``, that is opened.
    """
    roles = _alike(model, dict.fromkeys(elements, ""), calls)
    while len({path for path, _ in roles}) == 1 and all(issubclass(kind, nn.Sequential) for _, kind in roles):
        inner = _alike(model, {name: path for (path, _), names in roles.items() for name in names}, calls)
        if not inner:
            break
        roles = inner
    return [(path, sorted(names, key=lambda name: calls[name].order)) for (path, _), names in roles.items()]


def carries_parameters(module: nn.Module) -> bool:
    """Whether a module is of interest: it has parameters, and is no norm layer."""
    return not isinstance(module, NORMS) and next(module.parameters(), None) is not None


def num_layers(module: nn.Module) -> int:
    """Layers with parameters of their own, norms left out."""
    own = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    return sum(not isinstance(part, NORMS) for part in own)


def _alike(
    model: nn.Module, parents: Mapping[str, str], calls: Mapping[str, Call]
) -> dict[tuple[str, type[nn.Module]], list[str]]:
    """Children that run and have a like one below another parent, by path and class.

    Args:
        model: what the names are of.
        parents: the names of modules, each with its path below its element.
        calls: what ran.
    """
    found: dict[tuple[str, type[nn.Module]], list[str]] = {}
    for name, path in parents.items():
        for child_name, child in model.get_submodule(name).named_children():
            full = _join(name, child_name)
            if full in calls and carries_parameters(child):
                found.setdefault((_join(path, child_name), type(child)), []).append(full)
    return {key: names for key, names in found.items() if len(names) > 1}


def _chains(name: str, module: nn.Module, calls: Mapping[str, Call]) -> Iterator[tuple[str, list[str]]]:
    """The chains in ``module``, each with its name and the names of its elements."""
    runs = _runs(name, module, calls)
    for run in runs:
        whole = name or "model"
        yield (whole if len(runs) == 1 else f"{whole}[{_last(run[0])}..{_last(run[-1])}]"), run
    elements = {element for run in runs for element in run}
    for child_name, child in module.named_children():
        full = _join(name, child_name)
        if full not in elements:
            yield from _chains(full, child, calls)


def _runs(name: str, module: nn.Module, calls: Mapping[str, Call]) -> list[list[str]]:
    """Runs of at least two like children of a container, in forward order."""
    if not isinstance(module, CONTAINERS):
        return []
    children = [(_join(name, child_name), child) for child_name, child in module.named_children()]
    called = sorted((item for item in children if item[0] in calls), key=lambda item: calls[item[0]].order)
    runs: list[list[str]] = []
    last: type[nn.Module] | None = None
    for full, child in called:
        if not carries_parameters(child):
            continue
        if _is_opened(full, child, calls):
            last = None
            continue
        if type(child) is not last:
            runs.append([])
        runs[-1].append(full)
        last = type(child)
    return [run for run in runs if len(run) > 1]


def _is_opened(name: str, module: nn.Module, calls: Mapping[str, Call]) -> bool:
    """Whether a child is a stage, whose elements are looked at, rather than an element itself.

    Plain containers that hold a chain are stages. Their subclasses may be blocks as well as stages (RegNet's): they are
    stages if the elements of their chain are more than a layer with its norm.
    """
    if not isinstance(module, CONTAINERS):
        return False
    elements = [element for _, run in _chains(name, module, calls) for element in run]
    if type(module) in CONTAINERS:
        return bool(elements)
    return any(num_layers(module.get_submodule(element[len(name) + 1 :])) > 1 for element in elements)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _last(name: str) -> str:
    return name.rpartition(".")[2]
