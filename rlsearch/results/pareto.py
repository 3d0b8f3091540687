"""The Pareto arithmetic, on a loss matrix: one row a point, one column an objective, every objective minimised.

Direction is normalised once, by `to_losses`; after that nothing here asks what is better. A point dominates another
when it is nowhere worse and somewhere better. Equal points do not dominate each other, so all of them stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def to_losses(values: ArrayLike, directions: Sequence[str]) -> Floats:
    """The loss matrix of objective values: what is maximised changes its sign.

    Args:
        values: (n, m), finite.
        directions: m times ``maximize`` or ``minimize``.

    Raises:
        ValueError: another direction, another shape, or a value that is not finite.
    """
    for direction in directions:
        if direction not in ("maximize", "minimize"):
            raise ValueError(f"a direction must be maximize or minimize, got {direction!r}")
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.size == 0:
        matrix = matrix.reshape(0, len(directions))
    matrix = _checked(matrix, "values")
    if matrix.shape[1] != len(directions):
        raise ValueError(f"values must have one column a direction ({len(directions)}), got shape {matrix.shape}")
    # Adding zero turns -0.0 into 0.0, which would otherwise be printed.
    losses: Floats = matrix * np.where(np.array(directions) == "maximize", -1.0, 1.0) + 0.0
    return losses


def pareto_front(losses: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates; equal points all stay.

    Args:
        losses: (n, m) with m >= 1, finite, minimised.

    Returns:
        (n,) mask.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    mask: NDArray[np.bool_] = moocore.is_nondominated(_checked(losses), keep_weakly=True)
    return mask


def nondominated_ranks(losses: ArrayLike) -> NDArray[np.int64]:
    """The rank of each point: 0 on the front, 1 on the front of what is left without it, and so on.

    Args:
        losses: (n, m) with m >= 1, finite, minimised.

    Returns:
        (n,) ranks; equal points have equal ranks.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    matrix = _checked(losses)
    return np.asarray(moocore.pareto_rank(matrix), dtype=np.int64)


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """The volume that the points dominate, up to the reference.

    Args:
        losses: (n, m) with m >= 1, finite, minimised; a point that is not below the reference everywhere adds nothing.
        reference: (m,), finite: the worst corner.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    matrix = _checked(losses)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != (matrix.shape[1],) or not np.isfinite(corner).all():
        raise ValueError(f"the reference must be {matrix.shape[1]} finite numbers, got {reference!r}")
    return float(moocore.hypervolume(matrix, corner))


def distances_to_ideal(losses: ArrayLike) -> Floats:
    """How far each point is from the ideal one (the best of every objective), after scaling to what the points span.

    Each objective is scaled to [0, 1], its best value at 0 and its worst at 1. An objective in which all points are
    equal decides nothing and counts as 0. A single point is its own ideal.

    Args:
        losses: (n, m) with m >= 1, finite, minimised.

    Returns:
        (n,) Euclidean distances, in [0, sqrt(m)].

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    matrix = _checked(losses)
    if not len(matrix):
        return np.zeros(0)
    # Halves, so that a span beyond the greatest float stays finite.
    halves = matrix / 2 - matrix.min(axis=0) / 2
    span = halves.max(axis=0)
    scaled = np.divide(halves, span, out=np.zeros_like(halves), where=span > 0)
    return np.asarray(np.sqrt((scaled**2).sum(axis=1)))


def knee(losses: ArrayLike) -> int:
    """The index of the knee: of the points on the front, the one nearest to the ideal point; of equals, the first.

    The ideal point and the scaling are those of the front alone (`distances_to_ideal`), so that a dominated point
    cannot move the knee. The knee is our reconstruction of "the best policy": each objective weighs the same.

    Args:
        losses: (n, m) with n, m >= 1, finite, minimised.

    Raises:
        ValueError: no point at all, another shape, or a value that is not finite.
    """
    matrix = _checked(losses)
    if not len(matrix):
        raise ValueError("the knee of no points is not defined")
    members = np.flatnonzero(pareto_front(matrix))
    return int(members[np.argmin(distances_to_ideal(matrix[members]))])


def _checked(losses: ArrayLike, name: str = "losses") -> Floats:
    """The matrix, if it is one of finite numbers with at least one column."""
    matrix = np.ascontiguousarray(losses, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] < 1:
        raise ValueError(f"{name} must have the shape (points, objectives), got {np.shape(losses)}")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"{name} must be finite, got {matrix[row, column]} in row {row}, column {column}")
    return matrix
