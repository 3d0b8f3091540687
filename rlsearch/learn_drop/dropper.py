"""Decides which layers leave training, and carries the cut out.

Dropping follows Learn&Drop (arXiv 2604.23403): a prefix of the network that has stopped learning is dropped, its
weights are kept, and the final model is whole. The rule of the cut is our reconstruction (see `scores`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.learn_drop.scores import relative_changes, settled_prefix, smoothed
from rlsearch.model_graph import Segment
from rlsearch.policy import LearnDrop

ParametersOf = Callable[[nn.Module], Sequence[Tensor]]


def own_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters by which a module's learning is measured, unless the caller knows better."""
    return list(module.parameters())


class Dropper:
    """Watches the layers of a model, and drops the longest prefix that has settled.

    Call `train_mode` before each epoch's steps, run the steps through `forward` (or `prefix` and `suffix`), and call
    `end_epoch` after them.

    Args:
        model: the model in training, replaced units included.
        segments: the model as `rlsearch.model_graph.split` gives it.
        settings: thresholds and patience.
        epochs: of the whole training; warm-up is a share of it.
        optimizer: loses the dropped parameters and their state.
        sources: for units of the segments the units, of the segments too, whose parameters they borrow, for themselves
            or for a part of them; they may only be dropped with these.
        parameters_of: the tensors by which a layer's learning is measured; for replaced units the synthesised ones.
    """

    def __init__(
        self,
        model: nn.Module,
        segments: Sequence[Segment],
        settings: LearnDrop,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        *,
        sources: Mapping[str, Collection[str]] | None = None,
        parameters_of: ParametersOf = own_parameters,
    ) -> None:
        self.settings = settings
        self.cut = 0
        self._model = model
        self._segments = list(segments)
        self._epochs = epochs
        self._optimizer = optimizer
        self._sources = dict(sources or {})
        self._parameters_of = parameters_of
        # The last segment never leaves, be it a head or a unit: without it nothing would learn.
        self._layers = self._segments[:-1]
        self._averages: list[float | None] = [None] * len(self._layers)
        self._settled_for = [0] * len(self._layers)
        self._snapshot = self._parameters()

    @property
    def dropped_units(self) -> int:
        """How many units have left training."""
        return sum(len(segment.units) for segment in self._segments[: self.cut])

    def train_mode(self) -> None:
        """Training mode for what learns, eval mode for what was dropped: its batch norm statistics stand still too."""
        self._model.train()
        for segment in self._segments[: self.cut]:
            segment.module.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits, the dropped prefix without gradient."""
        if self.cut == 0:
            logits: Tensor = self._model(images)
            return logits
        return self.suffix(self.prefix(images))

    @torch.no_grad()
    def prefix(self, images: Tensor, start: int = 0) -> Tensor:
        """The dropped segments' output; ``start`` goes on from the output of that many segments."""
        for segment in self._segments[start : self.cut]:
            images = segment.module(images)
        return images

    def suffix(self, features: Tensor) -> Tensor:
        """Logits from the dropped prefix's output."""
        for segment in self._segments[self.cut :]:
            features = segment.module(features)
        return features

    def end_epoch(self, epoch: int) -> bool:
        """Measures, decides, and drops.

        Args:
            epoch: epochs done, 1 after the first.

        Returns:
            whether the cut moved.
        """
        if epoch % self.settings.interval:
            return False
        self._measure()
        if epoch < self.settings.warmup * self._epochs or epoch >= self._epochs:
            return False
        cut = self._allowed_cut()
        if cut <= self.cut:
            return False
        self._drop(cut)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide as an uninterrupted one would."""
        return {
            "cut": self.cut,
            "averages": list(self._averages),
            "settled_for": list(self._settled_for),
            "snapshot": self._snapshot,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the cut and the measurements back; the optimizer must still hold all parameters in their first order."""
        self._drop(state["cut"])
        self._averages = list(state["averages"])
        self._settled_for = list(state["settled_for"])
        self._snapshot = state["snapshot"]

    def _parameters(self) -> list[list[Tensor]]:
        """A copy of what is measured, by layer; nothing for layers that have left.

        It is held in host memory, so that watching a model takes no memory where memory is what is being saved.
        """
        return [
            [tensor.detach().to("cpu", copy=True) for tensor in self._parameters_of(layer.module)]
            if index >= self.cut
            else []
            for index, layer in enumerate(self._layers)
        ]

    def _measure(self) -> None:
        active = range(self.cut, len(self._layers))
        changes = relative_changes(
            [list(self._parameters_of(self._layers[index].module)) for index in active],
            [self._snapshot[index] for index in active],
        )
        for index, change in zip(active, changes, strict=True):
            average = smoothed(self._averages[index], change)
            self._averages[index] = average
            self._settled_for[index] = self._settled_for[index] + 1 if average < self.settings.threshold else 0
        self._snapshot = self._parameters()

    def _allowed_cut(self) -> int:
        """The longest settled prefix that the cap and the replaced units allow."""
        weights = [max(1, len(layer.units)) for layer in self._layers]
        most = math.floor(self.settings.max_fraction * sum(weights) + 1e-9)
        active = self._settled_for[self.cut :]
        cut = self.cut + settled_prefix(active, self.settings.patience)
        while cut > self.cut and (sum(weights[:cut]) > most or not self._is_closed(cut)):
            cut -= 1
        return cut

    def _is_closed(self, cut: int) -> bool:
        """Whether every replaced unit in the prefix has its sources there too: what is frozen may not depend on
        parameters that go on learning."""
        inside = {unit for layer in self._layers[:cut] for unit in layer.units}
        return all(inside.issuperset(self._sources.get(unit, ())) for unit in inside)

    def _drop(self, cut: int) -> None:
        dropped = {id(p): p for segment in self._segments[:cut] for p in segment.module.parameters()}
        # A parameter that the active part holds too (tied weights) goes on learning.
        for segment in self._segments[cut:]:
            for parameter in segment.module.parameters():
                dropped.pop(id(parameter), None)
        for group in self._optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in dropped]
        for parameter in dropped.values():
            self._optimizer.state.pop(parameter, None)
            parameter.requires_grad_(False)
            parameter.grad = None
        for index in range(cut):
            self._snapshot[index] = []
        self.cut = cut
