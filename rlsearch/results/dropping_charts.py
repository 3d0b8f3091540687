"""Learn&Drop in ``report.html``, as plotly figures; `dropping` draws the same as a PNG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rlsearch.results.charts import row_label, styled
from rlsearch.results.departures import Departures
from rlsearch.results.describe import unit_of
from rlsearch.results.dropping import LEFT, learning_cells, shown_rows
from rlsearch.results.figures import BLUE, INK, ORANGE
from rlsearch.results.selection import Selection
from rlsearch.results.tables import TrialRecord

_CURVES_PIXELS, _MOST_PIXELS = 210, 620


def dropping_chart(rows: Sequence[Mapping[str, Any]], found: Departures) -> go.Figure:
    """A cell a layer and epoch of one trial; below, the memory of a step and the accuracy by epoch."""
    pixels = min(_MOST_PIXELS, 18 * len(found.layers) + 20)
    heights = [pixels, _CURVES_PIXELS / 2, _CURVES_PIXELS / 2]
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.04, row_heights=heights)
    epochs = [row["epoch"] for row in rows]
    names = _names(found.layers)
    gap = 1 if pixels / len(names) >= 9 and len(epochs) <= 100 else 0
    figure.add_heatmap(
        x=epochs,
        y=names,
        z=learning_cells(found).tolist(),
        zmin=0,
        zmax=1,
        colorscale=[[0, LEFT], [1, BLUE]],
        showscale=False,
        xgap=gap,
        ygap=gap,
        hovertemplate="%{y}, epoch %{x}<extra></extra>",
        row=1,
        col=1,
    )
    _curve(figure, epochs, rows, "step_memory", INK, 2)
    _curve(figure, epochs, rows, "accuracy", ORANGE, 3)
    # Names at as many rows as have room for one.
    shown = [names[index] for index in shown_rows(len(names), pixels // 15)]
    figure.update_yaxes(type="category", tickvals=shown, ticksuffix=" ", autorange="reversed", row=1, col=1)
    figure.update_xaxes(range=[0.5, found.epochs + 0.5], tick0=0, dtick=_tick_step(found.epochs))
    figure.update_xaxes(title_text="epoch", row=3, col=1)
    styled(figure, pixels + _CURVES_PIXELS + 110)
    figure.update_xaxes(showgrid=False, row=1, col=1)
    return figure.update_yaxes(showgrid=False, row=1, col=1)


def departures_chart(told: Sequence[tuple[TrialRecord, Departures]], pick: Selection) -> go.Figure:
    """How many epochs each layer learned, one row a trial."""
    labels = [row_label(record, pick) for record, _ in told]
    names = _names(max((found.layers for _, found in told), key=len))
    most = max(found.epochs for _, found in told)
    figure = go.Figure()
    figure.add_heatmap(
        x=names,
        y=labels,
        z=[list(found.last_epochs) for _, found in told],
        zmin=0,
        zmax=most,
        colorscale=[[0, "#eef3f9"], [1, BLUE]],
        xgap=1 if len(names) <= 60 else 0,
        ygap=2,
        colorbar={
            "title": {"text": "epochs", "font": {"size": 12}},
            "tickvals": [0, most],
            "thickness": 10,
            "outlinewidth": 0,
        },
        hovertemplate="%{y}, %{x}: learned %{z} epochs<extra></extra>",
    )
    figure.update_xaxes(type="category", tickvals=[names[index] for index in shown_rows(len(names), 24)])
    figure.update_yaxes(type="category", ticksuffix=" ", autorange="reversed")
    styled(figure, 130 + 26 * len(labels))
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _curve(
    figure: go.Figure, epochs: Sequence[int], rows: Sequence[Mapping[str, Any]], column: str, color: str, row: int
) -> None:
    """One column by epoch; memory in steps, as it changes with a cut."""
    is_memory = column == "step_memory"
    values = [item.get(column) for item in rows]
    unit = unit_of("memory" if is_memory else column, max((value for value in values if value is not None), default=0))
    figure.add_scatter(
        x=epochs,
        y=[None if value is None else value * unit.factor for value in values],
        mode="lines+markers" if len(epochs) <= 40 else "lines",
        line={"color": color, "width": 2, "shape": "hvh" if is_memory else "linear"},
        showlegend=False,
        hovertemplate=f"epoch %{{x}}: %{{y:.2f}} {unit.sign}<extra></extra>",
        row=row,
        col=1,
    )
    label = "memory" if is_memory else column
    figure.update_yaxes(title_text=f"{label}, {unit.sign}", nticks=4, row=row, col=1)
    if is_memory:
        figure.update_yaxes(rangemode="tozero", row=row, col=1)


def _tick_step(epochs: int) -> int:
    """A round number of epochs between two ticks, of which some twenty fit."""
    scale = 1
    while True:
        for step in (scale, 2 * scale, 5 * scale):
            if 20 * step >= epochs:
                return step
        scale *= 10


def _names(layers: Sequence[str]) -> list[str]:
    return [html.escape(name) for name in layers]
