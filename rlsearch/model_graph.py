"""How data flow through a model: copies that allocate nothing, and the model as a chain of segments.

A *segment* is a piece of the forward pass with one tensor in and one tensor out: the stem, a unit with whatever runs
before it, or the head. Costs are measured a segment at a time, and Learn&Drop cuts between two segments. Where a model
cannot be cut (a skip connection that spans several units, say), its pieces stay together in one segment.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlsearch.errors import ModelError

STEM = "stem"
HEAD = "head"

_GUESSED_SIZES = (32, 64, 224)


@dataclass(frozen=True)
class Segment:
    """A piece of the forward pass between two single tensors.

    Attributes:
        name: ``stem``, ``head``, or the name of the last unit in it.
        module: one tensor in, one tensor out; it shares its submodules with the model.
        units: the names of the units in it, in forward order; empty for stem and head.
    """

    name: str
    module: nn.Module
    units: tuple[str, ...]


def fake_copy(model: nn.Module) -> tuple[FakeTensorMode, nn.Module]:
    """A copy of ``model`` whose parameters and buffers are fake: shapes and types, no memory.

    Returns:
        the mode under which the copy is to be run, and the copy (on the fake CPU, whatever the model's device).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, object] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
        return mode, copy.deepcopy(model, memo)


def example_shape(model: nn.Module) -> tuple[int, ...]:
    """A shape of one input that the model accepts, (1, C, H, W), guessed from its first convolution.

    The size that the model declares (``image_size``, or timm's ``patch_embed.img_size``) is tried first.

    Raises:
        ModelError: the model has no convolution, or accepts none of the sizes that are tried.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ModelError(f"example_input: the model has no convolution to guess an input from; {input_hint(model)}")
    guessed = [(size, size) for size in _GUESSED_SIZES]
    declared = getattr(model, "image_size", getattr(getattr(model, "patch_embed", None), "img_size", None))
    if isinstance(declared, int):
        declared = (declared, declared)
    sizes = [declared, *guessed] if isinstance(declared, tuple) else guessed
    reasons = []
    mode, fake = fake_copy(model)
    fake.eval()
    for size in dict.fromkeys(sizes):
        shape = (1, first.in_channels, *size)
        try:
            with mode, torch.no_grad():
                fake(torch.empty(shape))
        except Exception as error:  # noqa: BLE001  # a user's model may fail in any way; all reasons are shown
            reasons.append(f"{shape}: {error}")
            continue
        return shape
    failed = "\n".join(reasons)
    raise ModelError(f"example_input: the model accepts no guessed input; {input_hint(model)}\n{failed}")


def input_hint(model: nn.Module) -> str:
    """What to pass as ``example_input``, told by the first layer that the model registers."""
    kinds = (nn.Embedding, nn.Conv2d, nn.Linear)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Embedding):
        return (
            f"the model starts with an nn.Embedding of {first.num_embeddings} ids: pass token ids, as "
            "example_input=torch.zeros(1, 16, dtype=torch.long)"
        )
    if isinstance(first, nn.Conv2d):
        return f"pass example_input=torch.zeros(1, {first.in_channels}, height, width) of a size that the model takes"
    if isinstance(first, nn.Linear):
        return f"pass example_input=torch.zeros(1, ..., {first.in_features}) of a shape that the model takes"
    return "pass example_input= (one batch of what the model takes)"


def outermost(unit_names: Collection[str]) -> dict[str, str]:
    """Each unit's name, and the name of the unit that holds it: itself, if it is no part of another."""
    known = set(unit_names)
    holders = {}
    for name in unit_names:
        steps = name.split(".")
        holders[name] = next(
            prefix for depth in range(1, len(steps) + 1) if (prefix := ".".join(steps[:depth])) in known
        )
    return holders


def split(model: nn.Module, unit_names: Sequence[str]) -> list[Segment]:
    """The model as segments in forward order: stem, one a unit, head.

    Args:
        model: a model of one input tensor and one output tensor; further arguments keep their defaults.
        unit_names: the units, in forward order, as `rlsearch.find_units` gives them; those that are parts of others
            stay in these.

    Raises:
        ModelError: the model's own forward cannot be traced symbolically (its units and other submodules are not
            looked into, so only data-dependent control flow between them is in the way).
    """
    unit_names = list(dict.fromkeys(outermost(unit_names).values()))
    graph = _trace(model, unit_names)
    boundaries = _boundaries(graph, unit_names)
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    start = next(node for node in nodes if node.op == "placeholder")
    output = next(node for node in nodes if node.op == "output")
    ends = [*boundaries, output.args[0]]
    segments: list[Segment] = []
    for end in ends:
        assert isinstance(end, fx.Node)  # _boundaries yields nodes, and _trace refuses other outputs
        part = {node: None for node in nodes if position[start] < position[node] <= position[end]}
        units = tuple(str(node.target) for node in part if node.op == "call_module" and node.target in set(unit_names))
        name = units[-1] if units else (STEM if not segments else HEAD)
        segments.append(Segment(name, _extract(model, graph, start, end, part), units))
        start = end
    return segments


class _Tracer(fx.Tracer):
    """Traces the flow between units; units and submodules that hold none stay whole."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One input; further arguments of the model's forward (masks, switches) are not passed, so that what is traced
        is what a training step runs."""
        name = next(iter(inspect.signature(self.root.forward).parameters), "images")
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]


def _trace(model: nn.Module, unit_names: Sequence[str]) -> fx.Graph:
    opened = {name.rsplit(".", depth)[0] for name in unit_names for depth in range(1, name.count(".") + 1)}
    tracer = _Tracer(opened)
    try:
        traced = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:  # tracing runs the user's own forward, which may fail in any way
        raise ModelError(f"the forward pass of {type(model).__name__} cannot be traced: {error}") from error
    finally:
        # The functions that it traced with hold it in cycles: a model must go when its last user does.
        tracer.__dict__.clear()
    graph = traced.graph
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    output = next(node for node in graph.nodes if node.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        raise ModelError(f"{type(model).__name__} must take one tensor and give one tensor")
    return graph


def why_not_cut(model: nn.Module, unit_names: Sequence[str]) -> str:
    """In words, why the forward pass cannot be cut after the first unit: what else is still needed there.

    Raises:
        ModelError: as `split`.
    """
    unit_names = list(dict.fromkeys(outermost(unit_names).values()))
    graph = _trace(model, unit_names)
    flow = _Flow(graph)
    units = [node for node in graph.nodes if node.op == "call_module" and node.target in set(unit_names)]
    if not units:
        named = ", ".join(unit_names)
        return f"its own forward calls none of its units, so that it cannot be cut at their ends ({named})"
    first = units[0]
    others = [node for node in flow.alive_after(first) if node is not first]
    if not others:
        return f"{first.target} ends it, and nothing behind it would go on learning"
    user = max(others[0].users, key=flow.position.__getitem__)
    return f"behind {first.target} the value of {_said(others[0])} is still needed, by {_said(user)}"


def _said(node: fx.Node) -> str:
    """A value in words: the module that gives it, or the operation and what that is given, as ``cat(stem, body.0)``."""
    if node.op == "output":
        return "the model's output"
    if node.op == "placeholder":
        return f"the input {node.target}"
    if node.op not in ("call_function", "call_method"):
        return str(node.target)
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    given = [str(other.target) if other.op == "call_module" else other.name for other in node.all_input_nodes]
    return f"{operation}({', '.join(given)})"


class _Flow:
    """Which values are alive where in a traced forward pass."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self._nodes)}
        self._last_use = {
            node: max((self.position[user] for user in node.users), default=self.position[node]) for node in self._nodes
        }

    def alive_after(self, node: fx.Node) -> list[fx.Node]:
        """The values computed up to ``node`` that are used behind it, parameters and constants left out."""
        index = self.position[node]
        return [other for other in self._nodes[: index + 1] if self._last_use[other] > index and other.op != "get_attr"]


def _boundaries(graph: fx.Graph, unit_names: Sequence[str]) -> list[fx.Node]:
    """The nodes after which the forward pass can be cut: where one value alone is alive.

    After the stem (if it has work to do) and after each unit.
    """
    names = set(unit_names)
    flow = _Flow(graph)
    found = []
    units = [node for node in graph.nodes if node.op == "call_module" and node.target in names]
    if units:
        # The stem ends where the first unit's input is made.
        source = units[0].args[0]
        if isinstance(source, fx.Node) and source.op != "placeholder" and flow.alive_after(source) == [source]:
            found.append(source)
    found += [node for node in units if flow.alive_after(node) == [node]]
    output = next(node for node in graph.nodes if node.op == "output")
    return [node for node in found if node is not output.args[0]]


def _extract(
    model: nn.Module, graph: fx.Graph, start: fx.Node, end: fx.Node, part: Collection[fx.Node]
) -> fx.GraphModule:
    """The nodes of ``part`` as a module from ``start``'s value to ``end``'s."""
    piece = fx.Graph()
    copies = {start: piece.placeholder("features")}
    for node in graph.nodes:
        # Constants and parameters are read again in every segment that uses them.
        needed = any(user in part for user in node.users) if node.op == "get_attr" else node in part
        if needed:
            copies[node] = piece.node_copy(node, lambda n: copies[n])
    piece.output(copies[end])
    return fx.GraphModule(model, piece)
