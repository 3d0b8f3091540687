"""Learn&Drop as a picture: which layer left at which epoch, and below it the memory of a step and the accuracy."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlsearch.files import write_atomic
from rlsearch.results.departures import Departures, departures, describe_departures
from rlsearch.results.describe import describe_value, unit_of
from rlsearch.results.figures import BLUE, GRID, INK, MUTED, ORANGE

LEFT = "#d5dae0"
"""The colour of a layer that has left; one that learns is blue."""

_WIDTH, _TITLE_INCHES, _CURVE_INCHES, _AXIS_INCHES = 9.0, 0.95, 0.95, 0.55
# A layer's row, and a row that bears a label: below the latter, labels of 8 points would touch.
_ROW_INCHES, _LABEL_INCHES, _MOST_INCHES = 0.26, 0.145, 8.0
# Cells smaller than this run together: a gap between them would be all that one sees.
_CELL_WITH_GAP_INCHES = 0.09
_LONGEST_NAME = 34
_MOST_MARKERS = 40


def write_dropping_png(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Writes the picture of one training, whole or not at all.

    Args:
        path: the file, a PNG.
        rows: one mapping an epoch, as ``EpochMetrics.to_dict()`` gives it, from the first epoch on.
        title: what was trained, in a few words.

    Raises:
        ValueError: there are no rows.
        OSError: the folder is missing, full or not writable; the old file is then as it was.
    """
    write_atomic(path, dropping_png(rows, title))


def dropping_png(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """The content of the picture; the arguments and errors are those of `write_dropping_png`."""
    if not rows:
        raise ValueError("a picture of a training needs at least one epoch")
    found = departures(rows)
    # Without Learn&Drop all layers learn to the end, and have no names here.
    shown = found or Departures(("all layers",), rows[-1]["epoch"], ())
    cells = min(_MOST_INCHES, max(2, len(shown.layers)) * _ROW_INCHES)
    height = _TITLE_INCHES + cells + 2 * _CURVE_INCHES + _AXIS_INCHES
    layout = ConstrainedLayoutEngine(rect=(0.008, 0, 0.977, 1 - _TITLE_INCHES / height), hspace=0.02, h_pad=0.05)
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout=layout)
    top, memory, accuracy = figure.subplots(3, 1, sharex=True, height_ratios=[cells, _CURVE_INCHES, _CURVE_INCHES])
    _cells(top, shown, cells)
    _memory(memory, rows)
    _accuracy(accuracy, rows)
    accuracy.set_xlabel("epoch", color=INK)
    accuracy.set_xlim(0.5, shown.epochs + 0.5)
    accuracy.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    sentence = dropping_sentence(found, rows[-1].get("forward_share"), rows[-1].get("mean_learnable_params"))
    _title(figure, title, sentence)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Title": title, "Description": sentence})
    return buffer.getvalue()


def learning_cells(found: Departures) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(layers, epochs): 1 where the layer learned in that epoch, 0 where it had left."""
    epochs = np.arange(1, found.epochs + 1)
    return (epochs[None, :] <= np.array(found.last_epochs)[:, None]).astype(np.int64)


def dropping_sentence(found: Departures | None, forward_share: float | None, learnable: float | None) -> str:
    """What Learn&Drop did in all, on one line.

    Args:
        found: what left when; None where nothing could.
        forward_share: of the whole training, as a trial reports it.
        learnable: parameters that learned on average.
    """
    parts = ["no Learn&Drop" if found is None else describe_departures(found)]
    if forward_share is not None:
        parts.append(f"forward compute {describe_value('forward_share', forward_share)} of end-to-end")
    if learnable is not None:
        parts.append(f"{describe_value('mean_learnable_params', learnable)} parameters learned on average")
    return "; ".join(parts)


def shown_rows(count: int, most: int) -> list[int]:
    """Which of ``count`` rows bear a label, if ``most`` have room: evenly spaced from the first, and the last."""
    step = max(1, math.ceil(count / max(1, most)))
    rows = list(range(0, count, step))
    if rows[-1] != count - 1:
        # The last one is the head, or stands for it; its neighbour gives way where the two would touch.
        rows = [row for row in rows if count - 1 - row >= step] + [count - 1]
    return rows


def _cells(axes: Axes, found: Departures, inches: float) -> None:
    """A cell a layer and epoch, in forward order from the top."""
    count = len(found.layers)
    gap = min(inches / count, _WIDTH * 0.8 / found.epochs) >= _CELL_WITH_GAP_INCHES
    axes.pcolormesh(
        np.arange(found.epochs + 1) + 0.5,
        np.arange(count + 1) - 0.5,
        learning_cells(found),
        cmap=ListedColormap([LEFT, BLUE]),
        vmin=0,
        vmax=1,
        edgecolors="white" if gap else "none",
        linewidth=1.2 if gap else 0,
    )
    rows = shown_rows(count, int(inches / _LABEL_INCHES))
    axes.set_yticks(rows, labels=[shortened(found.layers[row]) for row in rows], parse_math=False)
    axes.set_ylim(count - 0.5, -0.5)
    _plain(axes)


def _memory(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The bytes of a step in each epoch, as steps below the cells."""
    values = _column(rows, "step_memory")
    most = max((value for value in values.tolist() if math.isfinite(value)), default=1.0)
    unit = unit_of("memory", most)
    edges = np.arange(len(rows) + 1) + 0.5
    axes.stairs(values * unit.factor, edges, baseline=None, color=INK, linewidth=1.6, zorder=3)
    axes.set_ylim(0, 1.15 * most * unit.factor)
    _panel(axes, f"memory of\na step, {unit.sign}")


def _accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The accuracy after each epoch."""
    marker = "o" if len(rows) <= _MOST_MARKERS else ""
    values = 100 * _column(rows, "accuracy")
    axes.plot(np.arange(1, len(rows) + 1), values, color=ORANGE, linewidth=1.6, marker=marker, markersize=3.5)
    axes.margins(y=0.15)
    _panel(axes, "accuracy, %")


def _panel(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK, fontsize=8.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, min_n_ticks=2))
    axes.grid(color=GRID, linewidth=0.7)
    _plain(axes)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One value an epoch, NaN where there is none."""
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)


def _plain(axes: Axes) -> None:
    axes.tick_params(colors=MUTED, length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


def shortened(name: str) -> str:
    """Of a long name the end, which tells it from the others."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME + 1 :]}"


def _title(figure: Figure, title: str, sentence: str) -> None:
    height = figure.get_figheight()
    text: dict[str, Any] = {"va": "top", "parse_math": False}
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", color=INK, **text)
    figure.text(0.012, 1 - 0.38 / height, sentence, fontsize=9.5, color=MUTED, **text)
    figure.legend(
        handles=[Patch(color=BLUE, label="learned in this epoch"), Patch(color=LEFT, label="had left training")],
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.56 / height),
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1,
        handleheight=1,
    )
