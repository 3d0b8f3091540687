"""The front as a picture: accuracy against every cost, as PNG, with no browser and no display needed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from rlsearch.errors import printable
from rlsearch.results.describe import LABELS, describe_savings, unit_of
from rlsearch.results.selection import Selection, baseline, candidates, front, record_of
from rlsearch.results.tables import Run, TrialRecord

_TITLE_INCHES = 1.0
# Names out of a file are no formulas: a dollar sign is one.
PLAIN_TEXT = rc_context({"text.parse_math": False})
INK, MUTED, GRID, BLUE, ORANGE = "#1f2933", "#616e7c", "#e4e7eb", "#1f5fa8", "#d9480f"


@dataclass(frozen=True)
class Group:
    """Trials that are drawn alike.

    Attributes:
        label: what the legend says.
        color: of the markers.
        marker: matplotlib's name of the marker.
        symbol: plotly's name of the same marker.
        size: the marker's diameter in points.
        records: the trials.
    """

    label: str
    color: str
    marker: str
    symbol: str
    size: float
    records: tuple[TrialRecord, ...]


def groups(run: Run, pick: Selection) -> list[Group]:
    """The trials by how they are drawn, what lies on top last: dominated, controls, front, baseline, pick.

    A control keeps its marker on the front and takes the front's colour; the pick lies over what it is besides.
    """
    on_front = {record.trial for record in front(run)}
    reference = baseline(run)
    measured = candidates(run)
    parts: dict[tuple[bool, bool], list[TrialRecord]] = {}
    for record in measured:
        if record.origin != "baseline":
            parts.setdefault((record.origin == "sampler", record.trial in on_front), []).append(record)
    found = [
        Group("dominated", "#c3cad3", "o", "circle", 5, tuple(parts.get((True, False), ()))),
        Group("control", "#9a6b1f", "^", "triangle-up", 8, tuple(parts.get((False, False), ()))),
        Group("on the front", BLUE, "o", "circle", 7, tuple(parts.get((True, True), ()))),
        Group("control on the front", BLUE, "^", "triangle-up", 8, tuple(parts.get((False, True), ()))),
        Group("end-to-end baseline", INK, "D", "diamond", 8, () if reference is None else (reference,)),
        Group(f"pick: trial {pick.trial}", ORANGE, "*", "star", 15, (record_of(run, pick.trial),)),
    ]
    return [group for group in found if group.records]


def axes_of(run: Run) -> tuple[str, list[str]]:
    """The objective on the upright axis, accuracy where it is one, and those to set it against."""
    names = list(run.objectives)
    upright = "accuracy" if "accuracy" in names else names[0]
    return upright, [name for name in names if name != upright]


def scale_of(run: Run, name: str) -> tuple[Callable[[float], float], str]:
    """How an axis shows a metric: a function into the axis's unit, and the axis's title.

    Costs are in per cent of the baseline, so that all panels read alike; accuracy, and everything where there is no
    baseline, in its own unit.
    """
    reference = baseline(run)
    base = None if reference is None else reference.metric(name)
    if base and name != "accuracy":
        return (lambda value: 100 * value / base), f"{LABELS[name]}, % of the baseline"
    unit = unit_of(name, max((record.metric(name) or 0 for record in run.records), default=0))
    return (lambda value: value * unit.factor), f"{LABELS[name]}{f', {unit.sign}' if unit.sign else ''}"


@PLAIN_TEXT
def front_png(run: Run, pick: Selection) -> bytes:
    """The content of ``front.png``: a panel a cost, each trial a point; with one objective, its values by trial.

    Args:
        run: a run with at least one complete trial.
        pick: the trial to mark.
    """
    upright, across = axes_of(run)
    panels: Sequence[str | None] = across or [None]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height = 3.6 * rows + _TITLE_INCHES
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _TITLE_INCHES / height), wspace=0.05)
    figure = Figure(figsize=(max(4.1 * columns, 6.5), height), dpi=150, layout=layout)
    drawn = groups(run, pick)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        _panel(axes, run, drawn, panels[index], upright)
        if index % columns == 0:
            axes.set_ylabel(scale_of(run, upright)[1], color=INK)
    _title(figure, run, pick, drawn)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def run_title(run: Run) -> str:
    """The model and the data of a run, as in ``resnet32 on digits``."""
    parts = [run.space.get(key) for key in ("model", "data")]
    names = [str(part["name"]) for part in parts if isinstance(part, dict) and "name" in part]
    # Of ``parquet:/somewhere/cifar10`` the last folder says it; the rest is this machine's own affair.
    return printable(" on ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in names) or run.folder.name)


def _panel(axes: Axes, run: Run, drawn: Sequence[Group], across: str | None, upright: str) -> None:
    """One cost against the upright objective; lines through the baseline part what is better from what is worse."""
    to_y, _ = scale_of(run, upright)
    to_x, title = (None, "trial") if across is None else scale_of(run, across)
    reference = baseline(run)

    def point(record: TrialRecord) -> tuple[float, float]:
        x = record.trial if across is None or to_x is None else to_x(record.metric(across) or 0)
        return x, to_y(record.metric(upright) or 0)

    if reference is not None:
        x, y = point(reference)
        axes.axhline(y, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if across is not None:
            axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for order, group in enumerate(drawn, start=2):
        xs, ys = zip(*map(point, group.records), strict=True)
        axes.scatter(
            xs,
            ys,
            s=group.size**2,
            c=group.color,
            marker=group.marker,
            edgecolors="white",
            linewidths=0.6,
            zorder=order,
        )
    axes.set_xlabel(title, color=INK)
    axes.grid(color=GRID, linewidth=0.7, zorder=0)
    axes.tick_params(colors=MUTED, length=0, labelsize=8.5)
    axes.margins(0.07)
    for side in axes.spines.values():
        side.set_visible(False)


def _title(figure: Figure, run: Run, pick: Selection, drawn: Sequence[Group]) -> None:
    """The title, what the pick changes, and the legend, above the panels."""
    height = figure.get_figheight()
    complete, members = len(candidates(run)), len(front(run))
    head = f"{run_title(run)}: {complete} complete trials, {members} on the front"
    figure.text(0.012, 1 - 0.1 / height, head, va="top", fontsize=12, fontweight="bold", color=INK)
    changes = f"trial {pick.trial}: {describe_savings(run, record_of(run, pick.trial))}"
    figure.text(0.012, 1 - 0.38 / height, changes, va="top", fontsize=9.5, color="#b03a08")
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=group.marker,
            color=group.color,
            markersize=min(group.size, 11),
            markeredgecolor="white",
            label=group.label,
        )
        for group in drawn
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.56 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.6,
    )
