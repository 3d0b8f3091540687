"""Whether stored features pay off: a pure function of measured times. Reconstruction (METHODS, section 4: `auto`)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheTimes:
    """What the two ways to feed the learning part cost.

    Attributes:
        prefix_seconds: to run the dropped prefix over the training images once, one view an image.
        build_seconds: to fill the cache, or to move it on: every view of every image, once.
        read_seconds: to read one feature an image.
    """

    prefix_seconds: float
    build_seconds: float
    read_seconds: float


def pays_off(times: CacheTimes, remaining_epochs: int) -> bool:
    """Whether storing costs less than recomputing over what is left of the training.

    Args:
        times: as measured on the device that trains.
        remaining_epochs: epochs that will be trained at this cut, if it does not move again (>= 0).

    Raises:
        ValueError: a time is negative or not finite, or the epochs are fewer than none.
    """
    for name, value in vars(times).items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    if remaining_epochs < 0:
        raise ValueError(f"remaining_epochs must be at least 0, got {remaining_epochs}")
    recomputed = remaining_epochs * times.prefix_seconds
    stored = times.build_seconds + remaining_epochs * times.read_seconds
    return recomputed > stored
