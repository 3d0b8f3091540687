"""What is known of each unit's replacement, in words and in the numbers that pictures show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlsearch.results.noise import baseline_trainings
from rlsearch.results.tables import Run
from rlsearch.results.unit_effects import LEAST_TRIALS, UnitEffect, trained_in_full

CLEAR = 2
"""A change beyond so many standard deviations counts as told apart from none."""

TITLE = "Which layers bear replacing"
NOTHING_KNOWN = "Too few trials that replaced a layer were trained to the end to tell."
CLEAR_LABEL, UNCLEAR_LABEL = "beyond two standard deviations", "within two: may be nothing"


@dataclass(frozen=True)
class Point:
    """One unit in a panel.

    Attributes:
        row: of the unit, from the top.
        change: of the accuracy, in points.
        sd: its standard deviation, in points; None where it is not known.
    """

    row: int
    change: float
    sd: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the change is told apart from none."""
        return self.sd is not None and abs(self.change) > CLEAR * self.sd

    @property
    def words(self) -> str:
        """The change with its standard deviation."""
        shown = f"{self.change:+.2f}".replace("-", "−")
        return f"{shown} points" if self.sd is None else f"{shown} ± {self.sd:.2f} points"


def model_points(effects: Sequence[UnitEffect]) -> list[Point]:
    """The changes that the model of all trials tells."""
    return [
        Point(row, 100 * effect.change, 100 * effect.sd)
        for row, effect in enumerate(effects)
        if effect.change is not None and effect.sd is not None
    ]


def probe_points(effects: Sequence[UnitEffect]) -> list[Point]:
    """The changes that were measured with the unit replaced alone."""
    return [
        Point(row, 100 * effect.probe.change, None if effect.probe.sd is None else 100 * effect.probe.sd)
        for row, effect in enumerate(effects)
        if effect.probe is not None
    ]


def probe_epochs(effects: Sequence[UnitEffect]) -> str:
    """After which epochs the probes were measured, as in ``epoch 3``."""
    found = sorted({effect.probe.epoch for effect in effects if effect.probe is not None})
    return f"epoch {' or '.join(map(str, found))}"


def too_few(effect: UnitEffect) -> str:
    """Why the model says nothing of a unit."""
    if effect.trials < LEAST_TRIALS:
        times = ("no trial", "1 trial")[effect.trials] if effect.trials < 2 else f"{effect.trials} trials"
        return f"{times} replaced it: too few"
    return "too few trials in all"


def unit_labels(effects: Sequence[UnitEffect]) -> tuple[str, list[str]]:
    """The leading words that all names share, as in ``encoder.layers``, and the names without them."""
    names = [effect.unit for effect in effects]
    shared = ""
    for word in names[0].split(".")[:-1]:
        longer = f"{shared}{word}."
        # What is left must still be a name: no number alone.
        if len(names) < 2 or not all(name.startswith(longer) and name[len(longer) :][:1].isalpha() for name in names):
            break
        shared = longer
    return shared.removesuffix("."), [name.removeprefix(shared) for name in names]


def unit_stages(labels: Sequence[str]) -> list[int]:
    """The rows at which another stage begins (``layer2.0`` behind ``layer1.4``); none where names tell of none."""
    # The stage is what stands before the last number that is a word of its own, or else before the last number.
    stages = [re.sub(r"(.*)\.\d+(\..*)?$", r"\1", label) for label in labels]
    stages = [
        re.sub(r"\d+\D*$", "", label) if stage == label else stage for stage, label in zip(stages, labels, strict=True)
    ]
    starts = [row for row in range(1, len(stages)) if stages[row] != stages[row - 1]]
    return starts if len(starts) <= len(labels) / 3 else []


def effects_note(run: Run, effects: Sequence[UnitEffect]) -> str:
    """How to read the picture, and what it rests on."""
    parts = [
        "The change of the accuracy, in points, when that unit alone is replaced (left of 0: it costs); lines are one "
        f"standard deviation. Dark: {CLEAR_LABEL}; light: {UNCLEAR_LABEL}."
    ]
    if model_points(effects):
        parts.append(
            f"By the model: a linear model of the {len(trained_in_full(run))} trials that were trained to the end, in "
            "which the effects of replaced units add up, whichever blocks stood there; other settings that varied are "
            "accounted for. A reconstruction, not a measurement."
        )
    else:
        parts.append("Too few trials were trained to the end for a model of all of them.")
    probes = [effect.probe for effect in effects if effect.probe is not None]
    if probes:
        blocks = ", ".join(sorted({probe.block for probe in probes}))
        seeds = len(baseline_trainings(run))
        spread = f", by the spread of its {seeds} seeds" if any(probe.sd is not None for probe in probes) else ""
        parts.append(
            f"Replaced alone: one training each ({blocks}) up to {probe_epochs(effects)}, against the baseline "
            f"after as many{spread}."
        )
    return " ".join(parts)
