"""Which layers left training when, as the table of a trial's epochs tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsearch.results.selection import policy_of
from rlsearch.results.tables import Run, TrialRecord, epochs_path, read_epochs


@dataclass(frozen=True)
class Cut:
    """One move of the cut.

    Attributes:
        epoch: after whose steps it moved.
        left: the layers that left with it, in forward order.
        memory_before: bytes of a training step in that epoch; None where none were kept.
        memory_after: the same in the epoch after it.
    """

    epoch: int
    left: tuple[str, ...]
    memory_before: int | None
    memory_after: int | None


@dataclass(frozen=True)
class Departures:
    """The layers of a training with Learn&Drop, and when they left.

    Attributes:
        layers: all of them, in forward order.
        epochs: how many were trained.
        cuts: the moves of the cut, in their order.
    """

    layers: tuple[str, ...]
    epochs: int
    cuts: tuple[Cut, ...]

    @property
    def num_left(self) -> int:
        """How many layers have left."""
        return sum(len(cut.left) for cut in self.cuts)

    @property
    def last_epochs(self) -> tuple[int, ...]:
        """The last epoch in which each layer learned."""
        left = [cut.epoch for cut in self.cuts for _ in cut.left]
        return (*left, *[self.epochs] * (len(self.layers) - len(left)))


def departures(rows: Sequence[Mapping[str, Any]]) -> Departures | None:
    """What the epochs of a trial tell, as ``EpochMetrics.to_dict()`` gives them; None where there is no Learn&Drop."""
    learning = next((row["learning"] for row in reversed(rows) if row.get("learning")), None)
    if learning is None:
        return None
    afterwards = [row.get("step_memory") for row in rows[1:]]
    cuts = [
        Cut(row["epoch"], tuple(row["left"]), row.get("step_memory"), after)
        for row, after in zip(rows, [*afterwards, None], strict=True)
        if row.get("left")
    ]
    layers = (*(name for cut in cuts for name in cut.left), *learning)
    return Departures(layers, rows[-1]["epoch"], tuple(cuts))


def departures_of(run: Run, record: TrialRecord) -> Departures | None:
    """What left when in a trial of a run; None where it has no Learn&Drop, or where its epochs were not kept.

    Raises:
        RunFolderError: the table of its epochs is damaged.
    """
    return departures(epochs_of(run, record)) if policy_of(record).learn_drop is not None else None


def epochs_of(run: Run, record: TrialRecord) -> list[dict[str, Any]]:
    """The epochs of a trial, one mapping each; none where they were not kept.

    Raises:
        RunFolderError: their table is damaged.
    """
    path = epochs_path(run.folder, record.trial)
    return read_epochs(path) if path.exists() else []


def describe_departures(found: Departures) -> str:
    """In words, as in ``9 of 16 layers left, after epochs 5 to 12``."""
    when = f", {when_left(found)}" if found.cuts else ""
    return f"{found.num_left or 'none'} of {len(found.layers)} layers left{when}"


def when_left(found: Departures) -> str:
    """The first and the last epoch after which layers left, as in ``after epochs 5 to 12``; empty where none did."""
    epochs = [cut.epoch for cut in found.cuts]
    if len(epochs) < 2:
        return f"after epoch {epochs[0]}" if epochs else ""
    return f"after epochs {epochs[0]} to {epochs[-1]}"
