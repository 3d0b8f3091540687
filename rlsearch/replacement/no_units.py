"""Why a model has no unit: what was looked at, in words that help to change the model or the choice of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from rlsearch.replacement.calls import Call
from rlsearch.replacement.chains import CONTAINERS, carries_parameters

_MAX_LINES = 8
_MAX_CHILDREN = 10


def explain_no_units(model: nn.Module, calls: Mapping[str, Call]) -> str:
    """The message for a model in which no chain was found."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, kind, content in _looked_at("", model, calls):
        places.setdefault((kind, content), []).append(name)
    lines = [
        f"  - {names[0]} ({kind}){f' and {len(names) - 1} more' if len(names) > 1 else ''}: {content}"
        for (kind, content), names in places.items()
    ]
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"  - and {len(lines) - _MAX_LINES} more"]
    return "\n".join(
        [
            f"{type(model).__name__} has no unit to replace: none of its nn.Sequential or nn.ModuleList holds two or "
            "more consecutive children of one class that run and have parameters, norm layers left out",
            *(["what was looked at:", *lines] if lines else []),
            "put the blocks that repeat one after the other into an nn.Sequential; where each block takes the outputs "
            "of all the blocks before it, as in a DenseNet, none has a like neighbour to borrow from: choose a model "
            "of repeated blocks, as resnet50 or vit_b_16",
        ]
    )


def _looked_at(name: str, module: nn.Module, calls: Mapping[str, Call]) -> Iterator[tuple[str, str, str]]:
    """Name, class and content of each container, and of other modules in which like children stand side by side."""
    children = dict(module.named_children())
    shown = name or "the model itself"
    if isinstance(module, CONTAINERS) and children:
        yield shown, type(module).__name__, _children(name, children, calls)
    else:
        kinds = Counter(type(child).__name__ for child in children.values() if carries_parameters(child))
        alike = [f"{count} {kind}" for kind, count in kinds.items() if count > 1]
        if alike:
            yield shown, type(module).__name__, f"{', '.join(alike)}, but this is no nn.Sequential or nn.ModuleList"
            if name:  # what such a module holds is a part of what would have to repeat
                return
    for child_name, child in children.items():
        yield from _looked_at(f"{name}.{child_name}" if name else child_name, child, calls)


def _children(name: str, children: Mapping[str, nn.Module], calls: Mapping[str, Call]) -> str:
    """The classes of the children, short."""
    kinds = []
    for child_name, child in list(children.items())[:_MAX_CHILDREN]:
        called = (f"{name}.{child_name}" if name else child_name) in calls
        kinds.append(type(child).__name__ + ("" if called else " (never called)"))
    more = f", ... ({len(children)} in all)" if len(children) > _MAX_CHILDREN else ""
    return ", ".join(kinds) + more
