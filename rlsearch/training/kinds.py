"""Which segments and replaced units of a model are alike, so that what was measured of one is known of all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import fx, nn

from rlsearch.replacement import BLOCKS, PlannedUnit, Unit
from rlsearch.replacement.fitting import MadeTensor
from rlsearch.replacement.layers import ComposedConv, ComposedLinear, composed_class
from rlsearch.replacement.signature import graph_signature, module_signature


class Kinds:
    """Keys that are equal for what is alike.

    Args:
        model: untouched, and so whenever it is asked about.
        units: of that model.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._model = model
        self._units = {unit.name: unit for unit in units}
        # Signatures are long: small numbers stand for them.
        self._numbers: dict[Hashable, int] = {}
        self._of_unit: dict[str, int] = {}

    def of_segment(self, module: nn.Module, setting: Hashable) -> Hashable:
        """Equal for segments of one structure in one setting."""
        signature = graph_signature(module) if isinstance(module, fx.GraphModule) else module_signature(module)
        return self._number((signature, setting))

    def of_step(self, step: PlannedUnit) -> Hashable:
        """Equal where equal modules are made of equal ones; where a and b start plays no part, and options that are
        decided (which sources, which tensors) do so by what was decided."""
        return step.block, step.fit.made, step.fit.single, self._settings(step), self._parts(step)

    def of_measurement(self, step: PlannedUnit) -> Hashable:
        """Equal where a step costs the same operations and activations, though not the same parameters.

        Weights alone that are a P + b N, and learned: however a and b are made, P, N and what a and b are made of are
        kept, which are parameters all of them. Where biases or norms are made, products of a few numbers are kept too.
        """
        learning = step.options.get("neighbours"), step.options.get("update_every", 1)
        borrowed = BLOCKS[step.block].mixing is not None
        if borrowed or step.block == "constant" or not all(self._is_rebuilt(step, tensor) for tensor in step.fit.made):
            return self.of_step(step), learning
        return "a P + b N", step.fit.made, step.fit.single, learning, self._parts(step)

    def _settings(self, step: PlannedUnit) -> Hashable:
        """The values of options that play a part in what is made."""
        is_mapped = any(tensor.mapped for tensor in step.fit.made)
        names = ["pair", "rank", *(["boundary_rank"] if is_mapped else [])]
        return tuple(step.options.get(name) for name in names)

    def _is_rebuilt(self, step: PlannedUnit, tensor: MadeTensor) -> bool:
        """Whether a made tensor is a weight that is made anew for the backward pass."""
        layer = self._model.get_submodule(f"{step.unit.name}.{tensor.layer}" if tensor.layer else step.unit.name)
        is_rebuilt = issubclass(composed_class(type(layer)), (ComposedConv, ComposedLinear))
        return is_rebuilt and tensor.name == "weight" and not tensor.mapped

    def _parts(self, step: PlannedUnit) -> tuple[int, ...]:
        """What a step replaces, and what it borrows from."""
        return tuple(self._unit(name) for name in (step.unit.name, *(step.sources or ())))

    def _unit(self, name: str) -> int:
        if name not in self._of_unit:
            unit = self._units[name]
            signature = module_signature(self._model.get_submodule(name))
            self._of_unit[name] = self._number((signature, unit.role, unit.input_shape, unit.output_shape))
        return self._of_unit[name]

    def _number(self, description: Hashable) -> int:
        return self._numbers.setdefault(description, len(self._numbers))
