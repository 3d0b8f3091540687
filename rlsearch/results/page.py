"""The pieces of an HTML page that loads nothing: whatever is text is escaped here, once."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

# Nothing from any network. Of scripts only plotly and the one below run, known by their digests: what a run's files
# smuggled in past all escaping would do nothing. plotly sets styles on elements, and draws heat maps as data.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
# A chart is data behind its box.
_DRAW = """
for (const data of document.querySelectorAll("script.figure")) {
  const figure = JSON.parse(data.textContent);
  Plotly.newPlot(data.previousElementSibling, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
"""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: #1f2933;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 4px; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 20px 22px; margin-top: 18px; }
p { margin: 4px 0 10px; }
.muted { color: #616e7c; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; margin: 14px 0 8px; }
.card { border: 1px solid #e4e7eb; border-radius: 8px; padding: 12px 14px; }
.card .name { color: #616e7c; font-size: 13px; }
.card .value { font-size: 22px; font-weight: 600; letter-spacing: -0.01em; }
.card .note { color: #616e7c; font-size: 13px; }
.two section { min-width: 0; overflow: hidden; }
@media (min-width: 900px) { .two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: #616e7c; font-size: 13px; white-space: nowrap; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
th.number, td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td small { display: block; color: #616e7c; }
tr.strong td { font-weight: 600; }
tr.strong td small { font-weight: 400; }
tr.pick td:first-child { color: #d9480f; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: #f5f7f9; padding: 12px 14px; border-radius: 6px; overflow-x: auto; margin: 10px 0 0; }
details summary { cursor: pointer; font-weight: 600; }
ul { margin: 6px 0; padding-left: 20px; }
.warn { color: #9a5b00; }
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: text, and a smaller line below it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A table row, with the CSS classes ``pick`` and ``strong`` where they apply."""

    cells: tuple[Cell | str, ...]
    style: str = ""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: text, escaped here.
        body: HTML, made by the other functions of this module.
    """
    # A browser reads every line's end as one character, and so do the digests of what it reads.
    script = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    policy = _POLICY.format(scripts=f"{_digest(script)} {_digest(_DRAW)}")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
            f"<script>{script}</script></head><body><main>",
            *body,
            f"</main><script>{_DRAW}</script></body></html>",
            "",
        ]
    )


def heading(content: str) -> str:
    """The page's heading: plain text."""
    return f"<h1>{html.escape(content)}</h1>"


def section(title: str, *parts: str, note: str = "") -> str:
    """A box with a heading, a line below it, and HTML."""
    lines = [f"<section><h2>{html.escape(title)}</h2>"]
    if note:
        lines.append(text(note, "muted"))
    return "\n".join([*lines, *parts, "</section>"])


def text(content: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{html.escape(content)}</p>' if style else f"<p>{html.escape(content)}</p>"


def bullets(lines: Sequence[tuple[str, str]]) -> str:
    """A list of plain texts, each with its CSS class."""
    items = "".join(f'<li class="{style}">{html.escape(line)}</li>' for line, style in lines)
    return f"<ul>{items}</ul>" if items else ""


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Figures side by side: a name, a value, and a note each."""
    parts = [
        f'<div class="card"><div class="name">{html.escape(name)}</div>'
        f'<div class="value">{html.escape(value)}</div><div class="note">{html.escape(note)}</div></div>'
        for name, value, note in items
    ]
    return f'<div class="cards">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Iterable[Row], numbers: Iterable[int] = ()) -> str:
    """A table; the columns whose index is in ``numbers`` are set to the right."""
    right = set(numbers)

    def row_of(tag: str, cells: Iterable[Cell | str], style: str = "") -> str:
        parts = []
        for index, cell in enumerate(cells):
            filled = Cell(cell) if isinstance(cell, str) else cell
            kind = ' class="number"' if index in right else ""
            note = f"<small>{html.escape(filled.note)}</small>" if filled.note else ""
            parts.append(f"<{tag}{kind}>{html.escape(filled.text)}{note}</{tag}>")
        return f'<tr class="{style}">{"".join(parts)}</tr>'

    body = "\n".join(row_of("td", row.cells, row.style) for row in rows)
    return f'<div class="scroll"><table><thead>{row_of("th", head)}</thead><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """HTML that is shown when its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def preformatted(content: str) -> str:
    """Plain text in a fixed-width font."""
    return f"<pre>{html.escape(content)}</pre>"


def chart(figure: go.Figure, name: str) -> str:
    """A plotly figure: its box, and its data as JSON, in which no text can end the element.

    Args:
        figure: the figure.
        name: the box's id: letters and dashes.
    """
    data = str(figure.to_json())
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    height = "100%" if figure.layout.height is None else f"{figure.layout.height}px"
    box = f'<div id="{name}" style="height:{height}; width:100%"></div>'
    return f'{box}<script type="application/json" class="figure">{data}</script>'


def _digest(script: str) -> str:
    """What a content security policy calls a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def columns(*parts: str) -> str:
    """One or two boxes, side by side where the window is wide enough."""
    # The two columns are fixed: plotly measures its box once, while the page is still being read.
    return f'<div class="two">{"".join(parts)}</div>' if len(parts) > 1 else "".join(parts)
