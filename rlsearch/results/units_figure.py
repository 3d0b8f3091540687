"""``units.png``: which layers bear replacing, as a picture; no browser and no display needed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from rlsearch.results.dropping import shortened
from rlsearch.results.figures import GRID, INK, MUTED, PLAIN_TEXT, run_title
from rlsearch.results.tables import Run
from rlsearch.results.unit_effects import UnitEffect, trained_in_full, unit_effects
from rlsearch.results.unit_words import (
    CLEAR_LABEL,
    TITLE,
    UNCLEAR_LABEL,
    Point,
    model_points,
    probe_epochs,
    probe_points,
    too_few,
    unit_labels,
    unit_stages,
)

# Told apart by lightness, so by every eye and in print too, and both light enough for a dark line upon them.
CLEAR_BLUE, LIGHT_BLUE = "#4487c7", "#c9d9eb"
_TITLE_INCHES, _AXIS_INCHES = 0.92, 0.75
# A row takes less room the more there are; below the height of a letter not each has its name beside it.
_ROW_INCHES = ((30, 0.24), (60, 0.17), (10**9, 0.11))
_LETTER_INCHES = 0.16


@PLAIN_TEXT
def units_png(run: Run) -> bytes | None:
    """The content of ``units.png``: a row a unit, in the model's order; None where nothing is known of any.

    Raises:
        RunFolderError: a table of epochs is damaged.
    """
    effects = unit_effects(run)
    by_model, alone = model_points(effects), probe_points(effects)
    panels = [points for points in (by_model, alone) if points]
    if not panels:
        return None
    row_inches = next(inches for most, inches in _ROW_INCHES if len(effects) <= most)
    height = max(len(effects) * row_inches, 1.2) + _TITLE_INCHES + _AXIS_INCHES
    layout = ConstrainedLayoutEngine(rect=(0.008, 0.01, 0.984, 0.99 - _TITLE_INCHES / height), wspace=0.04)
    figure = Figure(figsize=(8.6 if len(panels) > 1 else 7.2, height), dpi=150, layout=layout)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=(3, 2)[: len(panels)])
    for axes, points in zip(grid.flat, panels, strict=True):
        _panel(axes, points, len(effects), bars=points is by_model, size=4.5 if row_inches > 0.2 else 3)
    _rows(grid[0, 0], effects, row_inches)
    if by_model:
        _trials(grid[0, 0], effects, row_inches)
        _name_panel(grid[0, 0], f"model of {len(trained_in_full(run))} trials", "after the whole training")
    if alone:
        _name_panel(grid[0, -1], "one training each, replaced alone", f"after {probe_epochs(effects)}")
    _title(figure, run)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _panel(axes: Axes, points: Sequence[Point], num_rows: int, *, bars: bool, size: float) -> None:
    """One source: bars for the model, diamonds for the probes, each with its standard deviation."""
    for point in points:
        color, width = CLEAR_BLUE if point.is_clear else LIGHT_BLUE, point.sd or 0
        axes.plot([point.change - width, point.change + width], [point.row] * 2, color=INK, linewidth=1.0, zorder=4)
        if bars:
            axes.barh(point.row, point.change, height=0.68, color=color, zorder=3)
        else:
            axes.plot(point.change, point.row, "D", color=color, markeredgecolor=INK, markersize=size, zorder=5)
    axes.axvline(0, color=INK, linewidth=1.0, zorder=2)
    axes.set_ylim(num_rows - 0.4, -0.6)
    axes.margins(x=0.06)
    low, high = axes.get_xlim()
    if high - low < 0.2:  # all changes are as good as none: no magnifying glass for them
        axes.set_xlim(min(low, -0.1), max(high, 0.1))
    axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=0)
    axes.tick_params(colors=MUTED, length=0, labelsize=8.5)
    for side in axes.spines.values():
        side.set_visible(False)


def _name_panel(axes: Axes, title: str, when: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=9)
    axes.set_xlabel(f"points of accuracy, {when}", color=INK, fontsize=9)


def _rows(axes: Axes, effects: Sequence[UnitEffect], row_inches: float) -> None:
    """The names of the units, and a line where a stage begins."""
    shared, labels = unit_labels(effects)
    step = math.ceil(_LETTER_INCHES / row_inches)
    rows = range(0, len(effects), step)
    axes.set_yticks(
        list(rows), [shortened(labels[row]) for row in rows], fontsize=8.5 if row_inches > 0.2 else 7, color=INK
    )
    if shared:
        axes.set_ylabel(f"in {shortened(shared)}", color=MUTED, fontsize=8.5)
    for panel in axes.figure.axes:
        for row in unit_stages(labels):
            panel.axhline(row - 0.5, color="#aab4bf", linewidth=0.7, zorder=1)


def _trials(axes: Axes, effects: Sequence[UnitEffect], row_inches: float) -> None:
    """How many trials replaced each unit, beside its row, and in the row where they are too few."""
    size = 7.5 if row_inches > 0.2 else 5.5
    place = axes.get_yaxis_transform()
    is_roomy = row_inches >= _LETTER_INCHES
    if is_roomy:
        axes.text(1.03, 1.0, "trials", transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5, color=MUTED)
    for row, effect in enumerate(effects):
        if is_roomy:
            text = str(effect.trials)
            axes.text(1.03, row, text, transform=place, ha="right", va="center", fontsize=size, color=MUTED)
        if effect.change is None:
            text = too_few(effect)
            axes.text(0.01, row, text, transform=place, va="center", fontsize=size, style="italic", color=MUTED)


def _title(figure: Figure, run: Run) -> None:
    """The title, how to read the picture, and the legend, above the panels."""
    height = figure.get_figheight()
    head = f"{run_title(run)}: {TITLE[0].lower()}{TITLE[1:]}"
    figure.text(0.012, 1 - 0.1 / height, head, va="top", fontsize=12, fontweight="bold", color=INK)
    told = "How replacing one unit alone changes the accuracy (left: it costs); lines: one standard deviation"
    figure.text(0.012, 1 - 0.38 / height, told, va="top", fontsize=9.5, color=MUTED)
    handles = [Patch(color=CLEAR_BLUE, label=CLEAR_LABEL), Patch(color=LIGHT_BLUE, label=UNCLEAR_LABEL)]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.56 / height),
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
