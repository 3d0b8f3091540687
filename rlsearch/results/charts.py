"""The charts of ``report.html``, as plotly figures.

All text in them is escaped, since plotly reads some HTML in labels.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import replace

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rlsearch.results.departures import epochs_of
from rlsearch.results.describe import (
    LABELS,
    describe_difference,
    describe_metric,
    describe_trial,
    describe_value,
    natural_key,
)
from rlsearch.results.figures import BLUE, GRID, INK, MUTED, ORANGE, axes_of, groups, scale_of
from rlsearch.results.selection import Selection, baseline, front, normalised_hypervolume, policy_of
from rlsearch.results.tables import Run, TrialRecord

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_SKIP_COLOR = "#a9b4c0"
_BLOCK_COLORS = ("#1f5fa8", "#7a4fa3", "#2b8a6e", "#c2781f", "#b23a48", "#4a6fa5", "#6b705c")
_MOST_POINTS = 150


def front_chart(run: Run, pick: Selection) -> go.Figure:
    """Accuracy against every cost, a panel each; the policy stands at the pointer."""
    upright, across = axes_of(run)
    panels: Sequence[str | None] = across or [None]
    figure = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03)
    to_y, y_title = scale_of(run, upright)
    scales = [(None, "trial") if name is None else scale_of(run, name) for name in panels]
    for group in groups(run, pick):
        texts = [_hover(run, record) for record in group.records]
        for column, (name, (to_x, _)) in enumerate(zip(panels, scales, strict=True), start=1):
            xs = [r.trial if name is None or to_x is None else to_x(r.metric(name) or 0) for r in group.records]
            figure.add_scatter(
                x=xs,
                y=[to_y(record.metric(upright) or 0) for record in group.records],
                mode="markers",
                name=group.label,
                legendgroup=group.label,
                showlegend=column == 1,
                marker={
                    "color": group.color,
                    "symbol": group.symbol,
                    "size": group.size + 2,
                    "line": {"color": "white", "width": 1},
                },
                text=texts,
                hovertemplate="%{text}<extra></extra>",
                row=1,
                col=column,
            )
    for column, (name, (_, x_title)) in enumerate(zip(panels, scales, strict=True), start=1):
        figure.update_xaxes(title_text=x_title, row=1, col=column)
        _mark_baseline(figure, run, name, column)
    figure.update_yaxes(title_text=y_title, row=1, col=1)
    return styled(figure, 430)


def hypervolume_chart(run: Run) -> go.Figure | None:
    """The hypervolume after each trial: whether the search still gained. None without a baseline."""
    if baseline(run) is None:
        return None
    # Of a long run, evenly spaced trials and the last: each point is a hypervolume of all trials up to it.
    step = -(-len(run.records) // _MOST_POINTS)
    ends = sorted({*range(1, len(run.records) + 1, step), len(run.records)})
    parts = [(end, normalised_hypervolume(replace(run, records=run.records[:end]))) for end in ends]
    points = [(run.records[end - 1].trial, volume) for end, volume in parts if volume is not None]
    xs, ys = zip(*points, strict=True)
    figure = go.Figure()
    figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": BLUE, "width": 2, "shape": "hv"}, showlegend=False)
    figure.update_traces(hovertemplate="after trial %{x}: %{y:.4f}<extra></extra>")
    figure.update_xaxes(title_text="trial")
    figure.update_yaxes(title_text="hypervolume", rangemode="tozero")
    return styled(figure, 300)


def units_chart(run: Run, pick: Selection) -> go.Figure | None:
    """Which block stands in for which unit in the front's policies; None where the front replaces nothing."""
    rows = [(record, policy_of(record)) for record in front(run)]
    rows = [(record, policy) for record, policy in rows if policy.replacements]
    if not rows:
        return None
    everywhere = {item.unit for record in run.records for item in policy_of(record).replacements}
    units = sorted(everywhere, key=natural_key)
    blocks = sorted({item.block for _, policy in rows for item in policy.replacements})
    labels = [row_label(record, pick) for record, _ in rows]
    figure = go.Figure()
    colors = {"skip": _SKIP_COLOR}
    colors |= dict(zip((block for block in blocks if block != "skip"), itertools.cycle(_BLOCK_COLORS), strict=False))
    for block in blocks:
        places = [
            (unit, label)
            for label, (_, policy) in zip(labels, rows, strict=True)
            for unit in units
            if any(item.unit == unit and item.block == block for item in policy.replacements)
        ]
        figure.add_scatter(
            x=[html.escape(unit) for unit, _ in places],
            y=[label for _, label in places],
            mode="markers",
            name=html.escape(block),
            marker={"symbol": "square", "size": 16, "color": colors[block]},
            hovertemplate="%{x}: " + html.escape(block) + "<br>%{y}<extra></extra>",
        )
    names = [html.escape(unit) for unit in units]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, range=[-0.5, len(names) - 0.5])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=labels[::-1])
    figure.update_yaxes(range=[-0.5, len(labels) - 0.5])
    return styled(figure, 130 + 26 * len(rows))


def curves_chart(run: Run, pick: Selection) -> go.Figure | None:
    """Accuracy by epoch of the front and the baseline; None where no epochs were kept.

    Raises:
        RunFolderError: a table of epochs is damaged.
    """
    reference = baseline(run)
    figure = go.Figure()
    shown = [record for record in front(run) if reference is None or record.trial != reference.trial]
    for record in [*shown, *([] if reference is None else [reference])]:
        rows = epochs_of(run, record)
        if not rows:
            continue
        color, width = _curve_style(record, pick)
        figure.add_scatter(
            x=[row["epoch"] for row in rows],
            y=[None if row["accuracy"] is None else 100 * row["accuracy"] for row in rows],
            mode="lines",
            line={"color": color, "width": width},
            showlegend=False,
            hovertemplate=f"trial {record.trial}, epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
        )
    if not figure.data:
        return None
    last = max(max(trace.x) for trace in figure.data)
    figure.update_xaxes(title_text="epoch", tick0=1, dtick=-(-last // 10))
    figure.update_yaxes(title_text="accuracy, %")
    return styled(figure, 300)


def _mark_baseline(figure: go.Figure, run: Run, across: str | None, column: int) -> None:
    """Dashed lines through the baseline: they part what is better from what is worse."""
    reference = baseline(run)
    if reference is None:
        return
    upright, _ = axes_of(run)
    line = {"color": MUTED, "width": 1, "dash": "dash"}
    figure.add_hline(scale_of(run, upright)[0](reference.metric(upright) or 0), line=line, row=1, col=column)
    if across is not None:
        figure.add_vline(scale_of(run, across)[0](reference.metric(across) or 0), line=line, row=1, col=column)


def _curve_style(record: TrialRecord, pick: Selection) -> tuple[str, float]:
    if record.trial == pick.trial:
        return ORANGE, 3
    return (INK, 2.5) if record.origin == "baseline" else ("rgba(31,95,168,0.45)", 1.5)


def row_label(record: TrialRecord, pick: Selection) -> str:
    """A trial on an axis; a star marks the pick."""
    star = "★ " if record.trial == pick.trial else ""
    accuracy = "" if record.accuracy is None else f", {describe_value('accuracy', record.accuracy)}"
    return f"{star}trial {record.trial}{accuracy}"


def _hover(run: Run, record: TrialRecord) -> str:
    """A trial in a few lines: its policy, and every objective with its difference to the baseline."""
    reference = baseline(run)
    lines = [f"trial {record.trial} ({record.origin})", describe_trial(record, reference)]
    for name in run.objectives:
        value = record.metric(name)
        base = None if reference is None else reference.metric(name)
        change = describe_difference(name, value, base)
        lines.append(f"{LABELS[name]}: {describe_metric(name, record, base)}{f' ({change})' if change else ''}")
    return "<br>".join(map(html.escape, lines))


def styled(figure: go.Figure, height: int) -> go.Figure:
    """The figure in the looks that all have."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 15, "t": 40, "b": 50},
        font={"family": _FONT, "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"align": "left", "bgcolor": "white", "bordercolor": GRID, "font": {"color": INK}},
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    axis = {"gridcolor": GRID, "zeroline": False, "ticks": "", "tickfont": {"color": MUTED}, "title_standoff": 8}
    figure.update_xaxes(automargin=True, **axis)
    figure.update_yaxes(automargin=True, **axis)
    return figure
