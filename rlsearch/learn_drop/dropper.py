"""Decides which layers leave training, and carries the cut out.

Dropping follows Learn&Drop (arXiv 2604.23403): a prefix of the network that has stopped learning is dropped, its
weights are kept, and the final model is whole. The rule of the cut is our reconstruction (see `scores`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError, UserError
from rlsearch.learn_drop.checks import check_optimizer, check_settings, unit_names
from rlsearch.learn_drop.measures import measure_for
from rlsearch.learn_drop.recorder import PassPlan, Recorder
from rlsearch.learn_drop.scores import continuation, scheduled_layers, settled_prefix, smoothed
from rlsearch.model_graph import outermost, split, why_not_cut
from rlsearch.policy import LearnDrop
from rlsearch.replacement import SurgeryReport, composed_parameters

_LOG = logging.getLogger(__name__)


class Dropper:
    """Watches the layers of a model in training, and drops the longest prefix that has stopped learning.

    Call `train_mode` before each epoch's steps, run the steps through the dropper instead of the model, and call
    `end_epoch` after them:

        dropper = Dropper(model, optimizer, epochs)
        for epoch in range(epochs):
            dropper.train_mode()
            for images, labels in loader:
                loss = F.cross_entropy(dropper(images), labels)
                ...
            dropper.end_epoch()

    The model stays whole throughout: evaluate and save it as ever. With ``features`` ``stored`` or ``auto`` loop over
    `batches` instead of the loader.

    Args:
        model: the model in training, on its device; replaced units included.
        optimizer: of its parameters; it loses those that are dropped, and their state.
        epochs: of the whole training; warm-up is a share of it.
        settings: thresholds and patience.
        report: what `rlsearch.apply_policy` gave, where the model has replaced units: these may only be dropped with
            the units that they borrow from.
        example_input: a batch of what the model takes, for finding its units; needed where it cannot be guessed.
        units: the names of the model's units in forward order, where they are at hand.
        agree: in a training of several processes, from what this process would cut to what all of them do: equal
            parameters give equal scores only up to rounding. It is called by every process at every decision.

    Raises:
        ConfigError: settings out of range, or ``epochs`` below 1.
        ModelError: the model has no units, its forward pass cannot be traced, nothing of it can be cut off, the
            optimizer is of another model, or layers cannot be taken out of it, or it cannot give the score.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        settings: LearnDrop | None = None,
        *,
        report: SurgeryReport | None = None,
        example_input: Tensor | None = None,
        units: Sequence[str] | None = None,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.settings = settings or LearnDrop()
        check_settings(self.settings, epochs)
        check_optimizer(optimizer, model)
        self.cut = 0
        self.epochs_done = 0
        self._model = model
        self._epochs = epochs
        self._agree = agree
        self._optimizer = optimizer
        names = unit_names(model, units, report, example_input)
        self._segments = split(model, names)
        if len(self._segments) < 2:
            raise ModelError(f"learn_drop: nothing of {type(model).__name__} can leave: {why_not_cut(model, names)}")
        self._sources = _borrowed(names, report)
        # The last segment never leaves, be it a head or a unit: without it nothing would learn.
        self._layers = self._segments[:-1]
        self._weights = [max(1, len(layer.units)) for layer in self._layers]
        self._averages: list[float | None] = [None] * len(self._layers)
        self._greatest = [0.0] * len(self._layers)
        self._settled_for = [0] * len(self._layers)
        self._shared: list[nn.Module] = []
        self._recorder = Recorder(self.settings.features)
        self._measure = measure_for(
            self.settings.score, [layer.module for layer in self._layers], optimizer, composed_parameters
        )

    @property
    def dropped_units(self) -> int:
        """How many units have left training."""
        return sum(len(segment.units) for segment in self._segments[: self.cut])

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers in forward order: the stem, units (or what of them cannot be cut apart), the head."""
        return tuple(segment.name for segment in self._segments)

    @property
    def scores(self) -> dict[str, float | None]:
        """What the threshold is compared with, of the layers that may still leave: their smoothed scores as shares of
        the greatest that each has had; None where there is none yet."""
        return {
            layer.name: None if average is None else continuation(average, greatest)
            for layer, average, greatest in list(zip(self._layers, self._averages, self._greatest, strict=True))[
                self.cut :
            ]
        }

    def train_mode(self) -> None:
        """Training mode for what learns, eval mode for what was dropped: its batch norm statistics stand still too."""
        self._model.train()
        self._rest()

    def __call__(self, images: Tensor) -> Tensor:
        """Images to logits, the dropped prefix without gradient; or what `batches` gave to logits, whatever it is.

        Raises:
            DataError: these are stored features, and not as `batches` gave them.
        """
        if self.cut == 0:
            logits: Tensor = self._model(images)
            return logits
        return self.suffix(self._recorder.features(images, self.cut, self.prefix))

    def batches(
        self, loader: Iterable[Any], views: int = 2, scratch: Path | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of an epoch's steps, on the model's device: what to loop over instead of ``loader``.

        Until something is dropped, and always with ``recompute``, these are the loader's batches. After a cut the next
        ``views`` passes go through the loader as ever, while what the dropped prefix gives is kept: one random view of
        each image a pass. From then on the inputs are stored features, one view whole an epoch, in an order that
        torch's default generator draws; a last batch of one image is left out. When the cut moves, what is stored moves
        with it. ``auto`` stores where times measured in the first such pass say that it pays off.

        Give it the training loader, once an epoch, call the dropper once with the inputs of each batch, and change
        images (normalise, mix, mirror) in the data set or the loader alone: whatever else is done to inputs between
        here and the dropper would be done to stored features too. Where the loop does otherwise, or where memory or
        disk run out, a warning is logged, and training goes on from the images.

        After a resume (`load_state_dict`) features are recorded anew: in a loop of one's own only ``recompute`` gives
        the same bits as without the interruption.

        Args:
            loader: of pairs (inputs, targets) of tensors with one row an image; it needs a length.
            views: how many passes are recorded (>= 1).
            scratch: a folder for features that fit into no memory; None: they are not written to files.

        Raises:
            ConfigError: ``views`` below 1, or no such folder.
            DataError: with ``stored`` a loader without a length; batches that are no such pairs; another loader in the
                same epoch.
        """
        self._rest()
        plan = PassPlan(
            views=views,
            folder=None if scratch is None else Path(scratch),
            device=next((parameter.device for parameter in self._model.parameters()), torch.device("cpu")),
            epoch=self.epochs_done,
            epochs_left=self._epochs - self.epochs_done,
            cut=self.cut,
            is_fixed=self._prefix_is_fixed(),
        )
        return self._recorder.batches(loader, plan, self.prefix)

    @property
    def features_in(self) -> str | None:
        """Where recorded features lie (``device``, ``pinned``, ``file``); None where there are none."""
        return self._recorder.tier

    def close(self) -> None:
        """Gives the memory and the files of recorded features back, and ends a pass over them; the prefix runs at every
        step from then on."""
        self._recorder.close()

    @torch.no_grad()
    def prefix(self, images: Tensor, start: int = 0) -> Tensor:
        """The dropped segments' output; ``start`` goes on from the output of that many segments."""
        learning = [module for module in self._shared if module.training]
        for module in learning:
            module.training = False
        for segment in self._segments[start : self.cut]:
            images = segment.module(images)
        for module in learning:
            module.training = True
        return images

    def suffix(self, features: Tensor) -> Tensor:
        """Logits from the dropped prefix's output."""
        for segment in self._segments[self.cut :]:
            features = segment.module(features)
        return features

    def end_epoch(self) -> bool:
        """Counts an epoch as done; measures, decides, and drops, where this is the end of an interval.

        Returns:
            whether the cut moved.
        """
        self.epochs_done += 1
        if self.epochs_done % self.settings.interval:
            return False
        self._score()
        # A quotient, because a product of the two may lie just above the whole number that is meant (0.07 * 100).
        if self.epochs_done / self._epochs < self.settings.warmup or self.epochs_done >= self._epochs:
            return False
        cut = self._allowed(self._wanted_cut())
        if self._agree is not None:
            cut = self._agree(cut)
        if cut <= self.cut:
            return False
        _LOG.info("epoch %d: %s left training", self.epochs_done, ", ".join(self.layers[self.cut : cut]))
        self._drop(cut)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide as an uninterrupted one would."""
        return {
            "score": self.settings.score,
            "layers": list(self.layers),
            "cut": self.cut,
            "epochs_done": self.epochs_done,
            "averages": list(self._averages),
            "greatest": list(self._greatest),
            "settled_for": list(self._settled_for),
            "measure": self._measure.state_dict() if self._measure else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the cut and the measurements back; the optimizer must still hold all parameters in their first order.
        Its own state is loaded afterwards: it is of what was still learning. Features are recorded anew.

        Raises:
            UserError: the state is of other layers or another score, or of a time when less had left.
        """
        for part, ours in (("layers", list(self.layers)), ("score", self.settings.score)):
            if state[part] != ours:
                raise UserError(f"learn_drop: the state has other {part} ({state[part]}) than this dropper ({ours})")
        if state["cut"] < self.cut:
            raise UserError("learn_drop: more has left already than in the state; load it into a new Dropper")
        self._recorder.reset()
        self._drop(state["cut"])
        self.epochs_done = state["epochs_done"]
        self._averages = list(state["averages"])
        self._greatest = list(state["greatest"])
        self._settled_for = list(state["settled_for"])
        if self._measure:
            self._measure.load_state_dict(state["measure"])

    def _rest(self) -> None:
        """Eval mode for what was dropped; what the active part runs too keeps its mode."""
        modes = [module.training for module in self._shared]
        for segment in self._segments[: self.cut]:
            segment.module.eval()
        for module, training in zip(self._shared, modes, strict=True):
            module.training = training

    def _prefix_is_fixed(self) -> bool:
        """Whether the prefix gives the same for the same images for ever: it shares nothing with what learns on."""
        learning = any(p.requires_grad for segment in self._segments[: self.cut] for p in segment.module.parameters())
        moving = any(True for module in self._shared for _ in module.buffers(recurse=False))
        return not (learning or moving)

    def _score(self) -> None:
        if self._measure is None:
            return
        for index, score in enumerate(self._measure.scores(self.cut), start=self.cut):
            if score is None:
                continue
            if not math.isfinite(score):
                # The training has run off; nothing has settled there, and an average would never be a number again.
                self._settled_for[index] = 0
                continue
            average = smoothed(self._averages[index], score)
            self._averages[index] = average
            self._greatest[index] = max(self._greatest[index], average)
            has_settled = continuation(average, self._greatest[index]) < self.settings.threshold
            self._settled_for[index] = self._settled_for[index] + 1 if has_settled else 0

    def _wanted_cut(self) -> int:
        """How many layers have learned, or are due to leave."""
        if self._measure is None:
            return scheduled_layers(self.epochs_done / self._epochs, self.settings.warmup, len(self._layers))
        return self.cut + settled_prefix(self._settled_for[self.cut :], self.settings.patience)

    def _allowed(self, wanted: int) -> int:
        """As many of them as the cap and the replaced units allow; the reason for fewer is logged."""
        most = math.floor(self.settings.max_fraction * sum(self._weights) + 1e-9)
        cut = wanted
        while cut > self.cut and sum(self._weights[:cut]) > most:
            cut -= 1
        while cut > self.cut and (needed := self._missing_source(cut)):
            _LOG.info("epoch %d: the cut moves back before %s: %s", self.epochs_done, self.layers[cut - 1], needed)
            cut -= 1
        return cut

    def _missing_source(self, cut: int) -> str:
        """Why the layers before ``cut`` may not leave together, if so: what is frozen may not depend on parameters that
        go on learning."""
        inside = {unit for layer in self._layers[:cut] for unit in layer.units}
        for unit in sorted(inside):
            for source in sorted(self._sources.get(unit, set()) - inside):
                return f"{unit} borrows from {source}, which still learns"
        return ""

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
        if self._measure:
            self._measure.forget(cut)
        # What runs on both sides of the cut (one dropout for all of a model, say) changes its mode with the side.
        active = {module for segment in self._segments[cut:] for module in segment.module.modules()}
        inside = dict.fromkeys(module for segment in self._segments[:cut] for module in segment.module.modules())
        self._shared = [module for module in inside if module in active]
        self.cut = cut


def _borrowed(names: Iterable[str], report: SurgeryReport | None) -> dict[str, set[str]]:
    """For whole units the whole units whose parameters they, or parts of them, borrow."""
    holders = outermost(list(names))
    sources: dict[str, set[str]] = {}
    for item in report.replaced if report else ():
        if unknown := {item.unit, *(item.sources or ())} - set(holders):
            raise ModelError(f"learn_drop: units: {', '.join(sorted(unknown))} of the report are not among them")
        sources.setdefault(holders[item.unit], set()).update(holders[source] for source in item.sources or ())
    return sources
