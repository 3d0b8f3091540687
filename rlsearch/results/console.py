"""The front of a run in a terminal: a table, the pick, what it saves, and whether its controls beat it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsearch.results.comparison import BEATS, control_verdicts
from rlsearch.results.confirmation import Confirmation, confirmations
from rlsearch.results.confirmed_words import confirmed_line, describe_chance, describe_confirmation, describe_width
from rlsearch.results.departures import Departures, departures_of, when_left
from rlsearch.results.describe import (
    DROPPING,
    LABELS,
    SHARED_NOTE,
    describe_difference,
    describe_metric,
    describe_savings,
    describe_trial,
    describe_value,
    is_shared_time,
)
from rlsearch.results.noise import REPEAT, baseline_noise
from rlsearch.results.racing import racing_figures
from rlsearch.results.selection import (
    Selection,
    baseline,
    candidates,
    counts,
    front,
    normalised_hypervolume,
    policy_of,
    record_of,
    select,
)
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.results.where import Condition

# A terminal of fewer columns shows what is confirmed in a table of its own: policies need their place.
_WIDE = 100
_CONFIRMED = ("on test", "P(front)")


def render_front(
    run: Run, console: Console, selected: Selection | None = None, where: Sequence[Condition] = ()
) -> None:
    """Prints the front, the baseline first, then the pick and what it saves.

    Args:
        run: the run.
        console: where to print.
        selected: the pick; None for the knee.
        where: conditions that the trials of the front must meet.

    Raises:
        UserError, RunFolderError: as `rlsearch.results.select`, where ``selected`` is None.
    """
    pick = selected or select(run, where=where)
    is_wide = console.width >= _WIDE
    console.print(front_table(run, pick, where, confirmed=is_wide))
    if confirmations(run) and not is_wide:
        console.print(confirmed_columns(run, pick, where))
    dropping = learn_drop_table(run, pick, where)
    if dropping.row_count:
        console.print(dropping)
    for line in front_lines(run, pick, where):
        console.print(line)


def front_table(run: Run, pick: Selection, where: Sequence[Condition] = (), *, confirmed: bool = True) -> Table:
    """The front as a table: each value above its difference to the baseline; a star marks the pick.

    Where trials are confirmed, and ``confirmed`` is set, two columns more: those of `confirmed_columns`.
    """
    reference = baseline(run)
    known = confirmations(run) if confirmed else {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("trial", justify="right", no_wrap=True)
    for name in run.objectives:
        table.add_column(LABELS[name], justify="right", no_wrap=True)
    for title in _CONFIRMED if known else ():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("policy", overflow="fold")
    for record in _rows(run, where):
        number, style = _number(record, pick)
        cells = [_cell(name, record, reference) for name in run.objectives]
        cells += _confirmed_cells(known.get(record.trial)) if known else []
        table.add_row(Text(number), *cells, Text(_title(record, reference)), style=style)
    return table


def confirmed_columns(run: Run, pick: Selection, where: Sequence[Condition] = ()) -> Table:
    """What is confirmed of the front: the mean on the test split above the half of its 95 % interval, and the
    probability to be on the true front."""
    table = Table(title="Confirmed", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="")
    for title in ("trial", *_CONFIRMED):
        table.add_column(title, justify="right", no_wrap=True)
    known = confirmations(run)
    for record in _rows(run, where):
        number, style = _number(record, pick)
        table.add_row(Text(number), *_confirmed_cells(known.get(record.trial)), style=style)
    return table


def learn_drop_table(run: Run, pick: Selection, where: Sequence[Condition] = ()) -> Table:
    """What Learn&Drop did in those trials of the front that have it; without rows where none has.

    Raises:
        RunFolderError: a table of epochs is damaged.
    """
    table = Table(title="Learn&Drop", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("layers left")
    for name in DROPPING:
        table.add_column(LABELS[name], justify="right")
    table.add_column("memory of a step", justify="right")
    for record in front(run, where):
        if policy_of(record).learn_drop is None:
            continue
        found = departures_of(run, record)
        values = [describe_metric(name, record) for name in DROPPING]
        number, style = _number(record, pick)
        table.add_row(Text(number), _left(record, found), *values, _memory(record, found), style=style)
    return table


def front_lines(run: Run, pick: Selection, where: Sequence[Condition] = ()) -> list[Text]:
    """What stands below the table: counts, hypervolume, the pick and why, what it saves, the controls."""
    members = front(run, where)
    reference = baseline(run)
    states = ", ".join(f"{number} {state}" for state, number in counts(run).items() if number)
    on_it = ""
    if reference is not None:
        on_it = f"; the baseline is {'' if reference in members else 'not '}on it"
    volume = normalised_hypervolume(run)
    among = len(candidates(run, where))
    asked = f" with {' and '.join(map(str, where))}" if where else ""
    chosen = record_of(run, pick.trial)
    has_repeats = any(record.origin == REPEAT and record.state == "COMPLETE" for record in run.records)
    aside = "; the baseline's repeats aside" if has_repeats else ""
    lines = [
        Text(f"front: {len(members)} of the {among} complete trials{asked}{on_it} ({states}{aside})"),
        Text("hypervolume: " + ("not defined without a baseline" if volume is None else f"{volume:.4f}")),
        Text(f"★ trial {pick.trial} is {pick.why}", style="bold"),
        Text(f"  against the end-to-end baseline: {describe_savings(run, chosen)}"),
    ]
    confirmed = confirmations(run).get(chosen.trial)
    if confirmed is not None:
        lines.append(Text(f"  {describe_confirmation(confirmed)}"))
    told = confirmed_line(run)
    if told is not None:
        lines.append(Text(told))
    noise = baseline_noise(run)
    if noise is not None:
        lines.append(Text(noise.sentence))
    if any(is_shared_time(name, record) for name in run.objectives for record in members):
        lines.append(Text(SHARED_NOTE, style="yellow"))
    for verdict in control_verdicts(run, chosen):
        lines.append(Text(f"  {verdict.sentence}", style="" if verdict.verdict == BEATS else "yellow"))
    for rung in racing_figures(run) or ():
        lines.append(Text(f"racing {rung.sentence}", style="yellow" if rung.is_poor else ""))
    return lines


def _rows(run: Run, where: Sequence[Condition]) -> list[TrialRecord]:
    """The baseline, and the rest of the front."""
    reference, members = baseline(run), front(run, where)
    if reference is None:
        return members
    return [reference, *(record for record in members if record.trial != reference.trial)]


def _number(record: TrialRecord, pick: Selection) -> tuple[str, str]:
    """A trial's number, with a star for the pick, and the style of its row."""
    return (f"★ {record.trial}", "bold") if record.trial == pick.trial else (str(record.trial), "")


def _confirmed_cells(found: Confirmation | None) -> list[Text]:
    """What the table says of a trial on the test split."""
    if found is None or found.accuracy is None:
        return [Text("–"), Text("–")]
    shown = Text(describe_value("accuracy", found.accuracy.mean))
    width = describe_width(found.accuracy)
    return [shown.append(f"\n{width}", style="dim not bold") if width else shown, Text(describe_chance(found.chance))]


def _left(record: TrialRecord, found: Departures | None) -> str:
    """How many layers left, and after which epochs; of a trial whose epochs are gone, how many units."""
    if found is None:
        return f"{record.dropped_units or 0} units"
    return f"{found.num_left or 'none'} of {len(found.layers)}{', ' if found.cuts else ''}{when_left(found)}"


def _memory(record: TrialRecord, found: Departures | None) -> str:
    """The bytes of a step, before the first cut and after the last."""
    first = found.cuts[0].memory_before if found is not None and found.cuts else None
    last = describe_value("memory", record.step_memory, scale=first)
    return last if first is None else f"{describe_value('memory', first).split()[0]} → {last}"


def _title(record: TrialRecord, reference: TrialRecord | None) -> str:
    """The policy, and where it comes from when no sampler proposed it."""
    policy = describe_trial(record, reference)
    if record.origin == "baseline":
        return f"baseline: {policy}"
    return policy if record.origin == "sampler" else f"{policy} ({record.origin})"


def _cell(name: str, record: TrialRecord, reference: TrialRecord | None) -> Text:
    if reference is None or record.trial == reference.trial:
        return Text(describe_metric(name, record))
    value = Text(describe_metric(name, record, scale=reference.metric(name)))
    change = describe_difference(name, record.metric(name), reference.metric(name))
    return value.append("\n").append(change, style="dim not bold")
