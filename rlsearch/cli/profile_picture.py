"""The picture of ``rlsearch profile``: where a model's cost lies, and what is left of it as layers leave training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from rlsearch.files import write_atomic
from rlsearch.results.figures import BLUE, GRID, INK, MUTED, ORANGE
from rlsearch.training.cost import CutCost

# A row of the bars, and what lies around them.
_WIDTH, _ROW, _TITLE, _AXIS, _CURVES = 11.0, 0.19, 0.55, 0.75, 3.1
_PALE = "#a9c3e3"
_MEGA = 1e6


def write_picture(path: Path, content: Mapping[str, Any], cuts: Sequence[CutCost]) -> None:
    """Draws a profile as PNG, whole or not at all.

    Args:
        path: of the file.
        content: from `rlsearch.cli.profile_content.profile_content`.
        cuts: from `rlsearch.training.cost.CostModel.at_cuts`.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    profile_figure(content, cuts).savefig(buffer, format="png", facecolor="white")
    write_atomic(path, buffer.getvalue())


def profile_figure(content: Mapping[str, Any], cuts: Sequence[CutCost]) -> Figure:
    """Bars of every layer's operations, parameters and memory; below them, where layers can leave one by one, a step's
    memory and operations by how many have left."""
    layers = content["layers"]
    heights = [_ROW * len(layers) + _AXIS, *([_CURVES] if len(cuts) > 1 else [])]
    total = _TITLE + sum(heights)
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _TITLE / total), h_pad=0.08, w_pad=0.06, hspace=0.03)
    figure = Figure(figsize=(_WIDTH, total), dpi=130, layout=layout)
    figure.text(0.008, 1 - 0.1 / total, _title(content), va="top", fontsize=11, color=INK)
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    first = figure.add_subplot(grid[0, :2])
    others = [figure.add_subplot(grid[0, 2 * column : 2 * column + 2], sharey=first) for column in (1, 2)]
    _draw_bars([first, *others], layers)
    if len(heights) > 1:
        _draw_curves([figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])], cuts)
    return figure


def _title(content: Mapping[str, Any]) -> str:
    cost, size = content["cost"], "×".join(map(str, content["input_shape"]))
    return (
        f"{content['model']}: {cost['params']:,} parameters, {cost['step_flops'] / _MEGA:,.0f} MFLOP a step of an "
        f"image of {size}, {cost['memory'] / _MEGA:,.0f} MB at the peak of a step of {content['batch_size']} "
        f"({content['optimizer']})"
    )


def _draw_bars(panels: Sequence[Axes], layers: Sequence[Mapping[str, Any]]) -> None:
    """A row a layer, the first on top, in three panels."""
    rows = range(len(layers))
    flops, params, memory = panels
    forward = [layer["forward_flops"] / _MEGA for layer in layers]
    backward = [(layer["step_flops"] - layer["forward_flops"]) / _MEGA for layer in layers]
    flops.barh(rows, forward, color=BLUE, label="forward")
    flops.barh(rows, backward, left=forward, color=_PALE, label="backward")
    params.barh(rows, [layer["params"] / 1e3 for layer in layers], color=BLUE)
    saved = [layer["saved"] / _MEGA for layer in layers]
    memory.barh(rows, saved, color=ORANGE, label="saved for backward")
    held = [layer["held"] / _MEGA for layer in layers]
    memory.barh(rows, held, left=saved, color="#f3c3ab", label="parameters, optimizer")
    flops.set_yticks(rows, [layer["name"] for layer in layers], fontsize=7.5)
    flops.set_ylim(len(layers) - 0.4, -0.6)
    titles = ("MFLOP a step of an image", "learnable parameters, thousands", "MB")
    for axes, title in zip(panels, titles, strict=True):
        _style(axes, title)
        axes.grid(axis="x", color=GRID, linewidth=0.7)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    for axes in (flops, memory):
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, frameon=False, fontsize=8, labelcolor=INK)


def _draw_curves(panels: Sequence[Axes], cuts: Sequence[CutCost]) -> None:
    """Memory and operations of a step behind every cut."""
    for axes, title, name in zip(
        panels, ("memory of a step, MB", "MFLOP a step of an image"), ("memory", "step_flops"), strict=True
    ):
        for attribute, color, label in ((name, BLUE, "recomputed"), (f"{name}_stored", ORANGE, "stored")):
            values = [getattr(cut, attribute) / _MEGA for cut in cuts]
            axes.plot(values, color=color, marker="o", markersize=3, label=label)
        _style(axes, "Learn&Drop: layers that have left, the stem first")
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_plain)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.7)
        legend = axes.legend(frameon=False, fontsize=8, labelcolor=INK, title="what they give is", title_fontsize=8)
        legend.get_title().set_color(INK)


def _style(axes: Axes, title: str) -> None:
    axes.set_xlabel(title, color=INK, fontsize=9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, labelsize=8)
    axes.xaxis.set_major_formatter(_plain)
    for side in axes.spines.values():
        side.set_visible(False)


def _plain(value: float, _: float) -> str:
    """Tick labels: thousands apart."""
    return f"{value:,g}"
