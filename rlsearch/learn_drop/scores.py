"""How much a layer still learns, and which layers may go: pure functions of tensors and numbers.

Reconstruction of the scores of Learn&Drop (arXiv 2604.23403), whose formulas are not published in the abstract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-12


def relative_changes(current: Sequence[Sequence[Tensor]], previous: Sequence[Sequence[Tensor]]) -> list[float]:
    """For every layer, c = ||theta(t) - theta(t-1)|| / (||theta(t-1)|| + epsilon).

    Args:
        current: the parameters of each layer now; a layer without parameters has an empty list, and the change 0.
        previous: the same layers' parameters at the measurement before.

    Returns:
        one number a layer; the device is waited for once, not once a layer.
    """
    changes = [_change(now, before) for now, before in zip(current, previous, strict=True)]
    measured = [change for change in changes if change is not None]
    values = iter(torch.stack(measured).tolist() if measured else [])
    return [0.0 if change is None else next(values) for change in changes]


def rate_ratio(rate: float, greatest: float) -> float:
    """The learning rate of an interval as a share of the greatest so far: what a change has to be divided by, so that a
    schedule that lowers the rate does not look like learning that has ended.

    Args:
        rate: the mean over the interval's steps (>= 0).
        greatest: the greatest such mean so far, this one included; where it is 0, so is the ratio.
    """
    return rate / greatest if greatest > 0 else 0.0


def gradient_change(current: float, previous: float) -> float:
    """|G(t) - G(t-1)| / (G(t-1) + epsilon), with G the norm of the sum of a layer's gradients over an interval.

    Source: the freezing test of AutoFreeze (arXiv 2102.01386), as METHODS has it: reconstruction.
    """
    return abs(current - previous) / (previous + _EPSILON)


def scheduled_layers(progress: float, warmup: float, num_layers: int) -> int:
    """How many layers have left by a schedule that measures nothing: the first at ``warmup``, the others evenly after
    it, so that the layer behind them, which never leaves, would be due at the end (FreezeOut's linear schedule, arXiv
    1706.04983, without its learning rates).

    Args:
        progress: the share of the training that is done, in [0, 1].
        warmup: the share of it in which nothing leaves, in [0, 1].
        num_layers: how many there are.
    """
    if progress < warmup or num_layers == 0:
        return 0
    if warmup >= 1:
        return num_layers
    return min(num_layers, 1 + math.floor(num_layers * (progress - warmup) / (1 - warmup) + 1e-9))


def smoothed(average: float | None, value: float, decay: float = 0.5) -> float:
    """The exponential moving average after ``value``; the first value starts it."""
    return value if average is None else decay * average + (1 - decay) * value


def continuation(average: float, greatest: float) -> float:
    """How much of a layer's learning goes on: its smoothed score as a share of the greatest that it has had, in [0, 1].

    A layer whose score was never above 0 has nothing to learn: 0. What a layer changes in an epoch depends on learning
    rate, batch and set, by orders of magnitude; this share does not, so that one threshold serves all trainings.
    """
    return average / greatest if greatest > 0 else 0.0


def settled_prefix(settled_for: Sequence[int], patience: int) -> int:
    """The length of the longest prefix whose layers have all been settled for ``patience`` measurements."""
    for length, count in enumerate(settled_for):
        if count < patience:
            return length
    return len(settled_for)


def _change(current: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor | None:
    if not current:
        return None
    difference = [
        (now.detach().float() - before.to(now.device).float()).norm() for now, before in _pairs(current, previous)
    ]
    size = [before.float().norm().to(now.device) for now, before in _pairs(current, previous)]
    change: Tensor = torch.stack(difference).norm() / (torch.stack(size).norm() + _EPSILON)
    return change


def _pairs(current: Sequence[Tensor], previous: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(current, previous, strict=True))
