"""How much a layer still learns, and which layers may go: pure functions of tensors and numbers.

Reconstruction of the scores of Learn&Drop (arXiv 2604.23403), whose formulas are not published in the abstract.
"""

from __future__ import annotations

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


def smoothed(average: float | None, value: float, decay: float = 0.5) -> float:
    """The exponential moving average after ``value``; the first value starts it."""
    return value if average is None else decay * average + (1 - decay) * value


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
