"""The optimizer, its schedule and the passes over the data: plain PyTorch, read from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlsearch.errors import ConfigError, DivergedError, Problem, suggestion
from rlsearch.training.distributed import Group

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "always", "never")

# In an optimizer's group: by how much its learning rate differs from the schedule's.
RATE_SCALE = "rate_scale"


@dataclass(frozen=True)
class TrainingSpec:
    """How a model is trained; what a user would write in a training script.

    Attributes:
        epochs: passes over the training images (>= 1).
        batch_size: images a step (>= 1), of all processes together where several train one model.
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        lr: the peak learning rate (> 0); linear warm-up, then a cosine to zero.
        momentum: of ``sgd``, in [0, 1).
        weight_decay: on weights of two and more dimensions only (>= 0).
        label_smoothing: in [0, 1).
        warmup_epochs: how long the learning rate rises (>= 0).
        mixing_lr: the learning rate of what weighs a replaced unit's sources (a and b), as a multiple of ``lr`` (> 0).
        precision: ``bf16`` autocasts, ``fp32`` does not, ``auto`` takes bf16 where the device computes in it.
        compile: whether steps run as CUDA graphs and compiled blocks: ``auto`` where measured times say that it pays
            off (see `rlsearch.training.faster_step`), ``always`` wherever it can be done, or ``never``.
    """

    epochs: int = 9
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_epochs: float = 1.0
    mixing_lr: float = 1.0
    precision: str = "auto"
    compile: str = "auto"

    def problems(self, key: str = "training") -> list[Problem]:
        """What is out of range, each with its key."""
        ranges = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "a finite number above 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "mixing_lr": (0 < self.mixing_lr < math.inf, "a finite number above 0"),
            "warmup_epochs": (0 <= self.warmup_epochs < math.inf, "a finite number of at least 0"),
        }
        found = [
            Problem(f"{key}.{name}", f"must be {rule}, got {getattr(self, name)}")
            for name, (fine, rule) in ranges.items()
            if not fine
        ]
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS), ("compile", COMPILE)):
            value = getattr(self, name)
            if value not in known:
                found.append(Problem(f"{key}.{name}", f"unknown value {value!r}{suggestion(value, known)}"))
        return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """``fp32`` or ``bf16`` for a device: ``auto`` takes bf16 where the device computes in it.

    Raises:
        ConfigError: bf16 is asked for, and the GPU lacks it.
    """
    if precision == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if precision == "bf16" and device.type == "cuda" and torch.cuda.is_available() and not _has_bf16(device):
        message = f"{torch.cuda.get_device_name(device)} does not compute in bf16; use auto or fp32"
        raise ConfigError([Problem("training.precision", message)], "training")
    return precision


def slow_precision(precision: str, device: torch.device) -> str | None:
    """What to warn of where a precision is only imitated by the device; else None."""
    if precision != "bf16" or device.type == "cuda" or _has_bf16(device):
        return None
    return "training.precision: this CPU only imitates bf16, and takes about ten times as long; use auto or fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for ``bf16``; nothing for ``fp32``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then half a cosine towards zero.

    Args:
        step: the step about to be taken, from 0.
        num_steps: of the whole training.
        warmup_steps: of the rise.
        peak: the greatest learning rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(spec: TrainingSpec, model: nn.Module, mixing: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The optimizer over the model's learnable parameters.

    Weights of two and more dimensions decay; biases, norms and ``mixing`` (what weighs the sources of replaced units)
    do not; the latter learn at a rate of their own. Reconstruction: the papers say neither.
    """
    apart = {id(parameter) for parameter in mixing}
    learnable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [p for p in learnable if id(p) not in apart]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": spec.weight_decay, RATE_SCALE: 1.0},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, RATE_SCALE: 1.0},
    ]
    if apart:
        of_blocks = [p for p in learnable if id(p) in apart]
        groups.append({"params": of_blocks, "weight_decay": 0.0, RATE_SCALE: spec.mixing_lr})
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, fused=True)
    # Nesterov momentum needs momentum; without any, it is plain gradient descent.
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.momentum > 0, fused=True)


@dataclass
class Pass:
    """Sums over one pass over the data; kept on the device until the end, so that no step waits for it."""

    loss: float
    num_images: int
    num_correct: int = 0

    @property
    def accuracy(self) -> float:
        """Share of images whose greatest logit is their label."""
        return self.num_correct / self.num_images


# Runs a batch of inputs and labels (B,) forward and backward: its mean loss, and gradients where the optimizer looks.
Step = Callable[[Tensor, Tensor], Tensor]


class PlainStep:
    """Forward, loss and backward, one operation after the other.

    Args:
        forward: from a batch of inputs to logits (B, classes).
        optimizer: over what still learns.
        label_smoothing: of the cross-entropy.
        precision: ``fp32`` or ``bf16``.
        device: where it all is.

    Attributes:
        optimizer: as given.
        precision: as given.
        device: as given.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        label_smoothing: float = 0.0,
        precision: str = "fp32",
        device: torch.device,
    ) -> None:
        self._forward = forward
        self.optimizer = optimizer
        self._label_smoothing = label_smoothing
        self.precision = precision
        self.device = device

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, detached."""
        # The gradients of the step before go first: their memory is free when activations need most.
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            logits = self._forward(inputs)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self._label_smoothing)
        loss.backward()
        return loss.detach()


@dataclass
class Progress:
    """An epoch under way, in this process.

    Attributes:
        steps: that were taken.
        num_images: of them; where a batch is taken whole by several processes, each counts its share.
        loss_sum: of the mean losses, each times its images; on the device until somebody asks.
        seconds: that they took, until it was last saved.
    """

    steps: int = 0
    num_images: float = 0.0
    loss_sum: Tensor | float = 0.0
    seconds: float = 0.0


def train_epoch(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    rates: Iterable[float],
    progress: Progress | None = None,
    group: Group | None = None,
    after_step: Callable[[], None] | None = None,
) -> Pass:
    """One pass over the training images, or what is left of it.

    Args:
        step: runs a batch forward and backward.
        batches: inputs and labels (B,) of each step that is left, on the device.
        optimizer: over what still learns.
        rates: the learning rate of each step that is left.
        progress: what was done of the epoch before; kept up to date.
        group: the processes that train together, where there are several: ``step`` runs what it has wrapped,
            ``batches`` are this process's parts, and what is returned is of all of them.
        after_step: called after every step, when the model, the optimizer and ``progress`` go together.

    Raises:
        DivergedError: the loss is no longer finite (looked at once, after the pass).
    """
    progress = progress or Progress()
    for (inputs, labels), rate in zip(batches, rates, strict=True):
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate * parameters[RATE_SCALE]
        images = len(labels) if group is None else group.now.images
        progress.loss_sum = progress.loss_sum + step(inputs, labels) * images
        optimizer.step()
        progress.num_images += images
        progress.steps += 1
        if after_step is not None:
            after_step()
    sums = [float(progress.loss_sum), progress.num_images]
    total_loss, num_images = sums if group is None else group.summed(*sums)
    mean = total_loss / num_images
    if not math.isfinite(mean):
        raise DivergedError(f"the training loss became {mean}; a lower learning rate or more warm-up may help")
    return Pass(mean, round(num_images))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: str,
    device: torch.device,
    group: Group | None = None,
) -> Pass:
    """Top-1 accuracy and mean cross-entropy over the batches, in eval mode; the mode is put back afterwards.

    With a ``group`` each process gives its part of the batches, and gets the result over all parts.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    num_images = 0
    for images, labels in batches:
        with autocast(precision, device):
            logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        num_images += len(labels)
    for module, training in modes:
        module.training = training
    sums = [loss.item(), num_images, correct.item()]
    total_loss, images_seen, num_correct = sums if group is None else group.summed(*sums)
    return Pass(total_loss / images_seen, round(images_seen), round(num_correct))
