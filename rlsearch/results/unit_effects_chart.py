"""The chart of ``report.html`` that shows which layers bear replacing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rlsearch.results.charts import styled
from rlsearch.results.figures import INK, MUTED
from rlsearch.results.unit_effects import UnitEffect
from rlsearch.results.unit_words import (
    Point,
    model_points,
    probe_epochs,
    probe_points,
    too_few,
    unit_labels,
    unit_stages,
)
from rlsearch.results.units_figure import CLEAR_BLUE, LIGHT_BLUE

_ROOMY, _ROW_PIXELS, _TIGHT_PIXELS = 60, 20, 12


def unit_effects_chart(effects: Sequence[UnitEffect]) -> go.Figure | None:
    """A row a unit: bars by the model, beside them diamonds for the probes; None where nothing is known of any."""
    by_model, alone = model_points(effects), probe_points(effects)
    panels = [points for points in (by_model, alone) if points]
    if not panels:
        return None
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03, column_widths=[3, 2][: len(panels)]
    )
    for column, points in enumerate(panels, start=1):
        is_model = points is by_model
        shown = {
            "x": [point.change for point in points],
            "y": [point.row for point in points],
            "error_x": {
                "array": [point.sd or 0 for point in points],
                "color": INK,
                "thickness": 1.2,
                "width": 0,
            },
            "text": [_hover(effects[point.row], point, is_model) for point in points],
            "hovertemplate": "%{text}<extra></extra>",
            "showlegend": False,
        }
        colors = [CLEAR_BLUE if point.is_clear else LIGHT_BLUE for point in points]
        if is_model:
            figure.add_bar(**shown, textposition="none", orientation="h", marker_color=colors, row=1, col=column)
        else:
            marker: dict[str, Any] = {
                "symbol": "diamond",
                "size": 9,
                "color": colors,
                "line": {"color": INK, "width": 1},
            }
            figure.add_scatter(**shown, mode="markers", marker=marker, row=1, col=column)
        when = "the whole training" if is_model else probe_epochs(effects)
        figure.update_xaxes(title_text=f"{'model' if is_model else 'alone'}: points after {when}", row=1, col=column)
    _rows(figure, effects)
    is_roomy = len(effects) <= _ROOMY
    styled(figure, 100 + (_ROW_PIXELS if is_roomy else _TIGHT_PIXELS) * len(effects))
    figure.update_layout(bargap=0.3, margin={"t": 10})
    figure.update_xaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    figure.update_yaxes(showgrid=False, tickfont={"size": 12 if is_roomy else 9, "color": INK})
    return figure


def _rows(figure: go.Figure, effects: Sequence[UnitEffect]) -> None:
    """The names of the units, from the top, a line where a stage begins, and a word where the model says nothing."""
    _, labels = unit_labels(effects)
    names = [html.escape(label) for label in labels]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(names))), ticktext=names)
    figure.update_yaxes(range=[len(names) - 0.5, -0.5])
    for row in unit_stages(labels):
        figure.add_hline(row - 0.5, line={"color": MUTED, "width": 0.5})
    for row, effect in enumerate(effects):
        if effect.change is None and model_points(effects):
            figure.add_annotation(
                x=0,
                y=row,
                xref="x domain",
                yref="y",
                text=f"<i>{too_few(effect)}</i>",
                showarrow=False,
                xanchor="left",
                font={"size": 10, "color": MUTED},
            )


def _hover(effect: UnitEffect, point: Point, is_model: bool) -> str:
    """One unit in a few lines."""
    if is_model or effect.probe is None:
        how = f"by the model; {effect.trials} trials replaced it"
    else:
        how = f"replaced alone by {effect.probe.block}, after epoch {effect.probe.epoch}"
    return "<br>".join(html.escape(line) for line in (effect.unit, point.words, how))
