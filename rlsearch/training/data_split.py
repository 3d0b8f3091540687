"""Which images go where: pure functions on label vectors, the same on every machine and with every NumPy."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Indices: TypeAlias = npt.NDArray[np.int64]


def balanced_subset(labels: Indices, limit: int) -> Indices:
    """The first images of every class, as equally many as the set allows, ``limit`` in all.

    Args:
        labels: (N,).
        limit: how many images to keep; all of them when it is N or more.

    Returns:
        Sorted positions, (min(limit, N),).
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas = np.zeros_like(counts)
    remaining = min(limit, len(labels))
    while remaining:  # every round serves all classes that still have images: at most one round a class
        open_classes = np.flatnonzero(counts > quotas)
        share = max(remaining // len(open_classes), 1)
        served = open_classes[:remaining]
        quotas[served] += np.minimum(counts[served] - quotas[served], share)
        remaining = min(limit, len(labels)) - int(quotas.sum())
    chosen = [np.flatnonzero(labels == label)[:quota] for label, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def stratified_split(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Splits off ``fraction`` of the images, of every class alike, and leaves at least one of each class.

    Args:
        labels: (N,).
        fraction: the share that is split off, in (0, 1).
        seed: decides which images of a class are split off.

    Returns:
        The positions of the rest and of the part that is split off, each sorted.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * fraction
    quotas = np.floor(exact).astype(np.int64)
    missing = round(len(labels) * fraction) - int(quotas.sum())
    quotas[np.argsort(-(exact - quotas), kind="stable")[:missing]] += 1
    quotas = np.minimum(quotas, counts - 1)
    # Raw bits: NumPy promises this stream for ever, and not that of Generator.permutation.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    shuffled = labels[order]
    parts = [order[shuffled == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    part = np.sort(np.concatenate(parts)).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(labels), dtype=np.int64), part, assume_unique=True)
    return rest, part
