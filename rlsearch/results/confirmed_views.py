"""What was confirmed, as a table for a terminal and as a part of ``report.html``."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from rlsearch.results import page
from rlsearch.results.confirmation import Confirmation, confirmations
from rlsearch.results.confirmed_words import (
    CONFIRMED_NOTE,
    confirmed_line,
    describe_chance,
    describe_change,
    describe_seeds,
    describe_width,
)
from rlsearch.results.describe import describe_trial, describe_value
from rlsearch.results.selection import Selection, baseline, record_of
from rlsearch.results.tables import Run

_HEAD = ("trial", "test, %", "to baseline", "sd", "P(front)", "seeds", "validation", "policy")
_NUMBERS = range(len(_HEAD) - 1)
# A terminal has no room for what `rlsearch pareto` shows too.
_IN_TERMINAL = [index for index, title in enumerate(_HEAD) if title != "validation"]


def confirmed_table(run: Run) -> Table:
    """Every trial that was trained again, one a row, the baseline first; below a mean the half of its interval."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index in _IN_TERMINAL:
        is_number = index in _NUMBERS
        table.add_column(_HEAD[index], justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for _, row in _rows(run):
        cells = [row[index] for index in _IN_TERMINAL]
        table.add_row(*(Text(cell.text).append(f"\n{cell.note}" if cell.note else "", style="dim") for cell in cells))
    return table


def confirmed_page(run: Run, pick: Selection) -> Iterable[str]:
    """The part of a page; nothing where no trial was trained again."""
    rows = [
        page.Row((page.Cell(f"★ {trial}"), *cells[1:]), "strong pick") if trial == pick.trial else page.Row(cells)
        for trial, cells in _rows(run)
    ]
    told = confirmed_line(run)
    if rows and told is not None:
        yield page.section(
            "Confirmed with new seeds",
            page.table(_HEAD, rows, _NUMBERS),
            page.text(f"{told[0].upper()}{told[1:]}."),
            note=CONFIRMED_NOTE,
        )


def _rows(run: Run) -> list[tuple[int, tuple[page.Cell, ...]]]:
    """The cells of each trial, with its number; after the baseline the best mean first."""
    reference = baseline(run)
    first = None if reference is None else reference.trial
    ended = {record.trial for record in run.records}
    found = [item for item in confirmations(run).values() if item.trial in ended]
    found.sort(key=lambda item: (item.trial != first, -_mean(item), item.trial))
    return [(item.trial, _cells(run, item)) for item in found]


def _cells(run: Run, found: Confirmation) -> tuple[page.Cell, ...]:
    record, reference = record_of(run, found.trial), baseline(run)
    policy = describe_trial(record, reference)
    accuracy = found.accuracy
    return (
        page.Cell(str(found.trial)),
        page.Cell("–" if accuracy is None else f"{100 * accuracy.mean:.2f}", describe_width(accuracy)),
        page.Cell(describe_change(found.difference), describe_width(found.difference)),
        page.Cell("–" if accuracy is None or accuracy.sd is None else f"{100 * accuracy.sd:.2f}"),
        page.Cell(describe_chance(found.chance)),
        page.Cell(describe_seeds(found)),
        page.Cell(describe_value("accuracy", record.accuracy)),
        page.Cell(f"baseline: {policy}" if record.origin == "baseline" else policy),
    )


def _mean(found: Confirmation) -> float:
    return -1.0 if found.accuracy is None else found.accuracy.mean
