"""What a trial reports after every epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EpochMetrics:
    """The state of a trial after one epoch. Sums run from the start of the trial.

    Attributes:
        epoch: how many epochs are done (1 after the first).
        epochs: how many the trial will do.
        accuracy: top-1 on the validation split, in [0, 1].
        validation_loss: mean cross-entropy on the validation split.
        train_loss: mean loss over the epoch's training images, label smoothing included.
        lr: the learning rate of the epoch's last step.
        params: learnable parameters after surgery, by unique storage; dropping does not change it.
        params_total: parameters of the materialised model.
        learnable_params: parameters that still learn, after this epoch's cut.
        mean_learnable_params: parameters that learned, averaged over the images trained on so far.
        memory: bytes; on CUDA the peak allocated in a training step of the first epoch, after warm-up; elsewhere
            ``memory_predicted``. Where several processes train one model, of the one that needs most.
        memory_predicted: bytes at the peak of a step, before anything is dropped, from fake tensors: parameters,
            gradients, optimizer state, activations and temporary tensors, of one process with its part of a batch; the
            same number on every machine.
        step_memory: bytes of a training step in this epoch, before its cut: on CUDA the peak allocated after warm-up,
            elsewhere predicted; features that are stored in the device's memory are among them.
        train_flops: floating-point operations spent on training so far, as the layers really ran.
        forward_flops: the part of ``train_flops`` spent in forward passes.
        forward_share: ``forward_flops`` as a share of what the untouched model, nothing replaced and nothing dropped,
            would have spent on the same images; below 1 it saved some. Filling a cache of features counts as spent.
        train_seconds: seconds of training so far, without set-up and evaluation; honest only for a trial alone on its
            device.
        samples_per_second: training images per second, over the trial so far.
        dropped_units: how many units have left training.
        learning: the names of the layers (the stem, units, the head) that learn after this epoch's cut, in forward
            order; told in the first epoch and wherever the cut has moved, else empty, as it is without Learn&Drop.
        left: the names of those that left with this epoch's cut, in forward order.
        device: what it ran on, as torch names it.
        packed: how many trials of a search may have trained on that device at once; 1 for a trial alone on it, whose
            times alone can be compared with others'.
    """

    epoch: int
    epochs: int
    accuracy: float
    validation_loss: float
    train_loss: float
    lr: float
    params: int
    params_total: int
    learnable_params: int
    mean_learnable_params: float
    memory: int
    memory_predicted: int
    step_memory: int
    train_flops: float
    forward_flops: float
    forward_share: float
    train_seconds: float
    samples_per_second: float
    dropped_units: int
    learning: tuple[str, ...]
    left: tuple[str, ...]
    device: str
    packed: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for tables and reports."""
        # Lists, as a table or JSON gives them back.
        return asdict(self) | {"learning": list(self.learning), "left": list(self.left)}
