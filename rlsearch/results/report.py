"""``report.html``, ``front.png`` and ``units.png``: a run as one offline file to pass on, and as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from rlsearch.errors import RlsearchError
from rlsearch.files import write_atomic
from rlsearch.results import page
from rlsearch.results.charts import curves_chart, front_chart, hypervolume_chart, row_label, units_chart
from rlsearch.results.comparison import BEATS, control_verdicts
from rlsearch.results.confirmation import confirmations
from rlsearch.results.confirmed_views import confirmed_page
from rlsearch.results.confirmed_words import describe_confirmation
from rlsearch.results.departures import departures_of, describe_departures, epochs_of
from rlsearch.results.describe import (
    HEADLINE,
    LABELS,
    SHARED_NOTE,
    describe_difference,
    describe_metric,
    describe_savings,
    describe_trial,
    is_shared_time,
)
from rlsearch.results.dropping import dropping_sentence
from rlsearch.results.dropping_charts import departures_chart, dropping_chart
from rlsearch.results.figures import front_png, run_title
from rlsearch.results.noise import baseline_noise
from rlsearch.results.racing import POOR_CORRELATION, racing_figures
from rlsearch.results.selection import (
    REFERENCE_FACTOR,
    Selection,
    baseline,
    candidates,
    counts,
    front,
    record_of,
    select,
)
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.results.unit_effects import unit_effects
from rlsearch.results.unit_effects_chart import unit_effects_chart
from rlsearch.results.unit_words import NOTHING_KNOWN, TITLE, effects_note
from rlsearch.results.units_figure import units_png


def write_report(run: Run, key: str = "knee") -> dict[str, Path]:
    """Writes ``report.html``, ``front.png`` and ``units.png`` into the run's folder, each whole or not at all.

    Args:
        run: a run with at least one complete trial.
        key: the pick, as `rlsearch.results.select` takes it.

    Returns:
        ``{"report": path, "front": path, "units": path}``; without ``units`` where no unit's replacement is known of.

    Raises:
        UserError: an unknown key.
        RunFolderError: no trial is complete, or a table of the run is damaged.
        RlsearchError: a file cannot be written; the old one is then as it was.
    """
    pick = select(run, key)
    # YAML and JSON can hold halves of characters, which no file can.
    contents = {"report": report_html(run, pick).encode(errors="backslashreplace"), "front": front_png(run, pick)}
    units = units_png(run)
    if units is not None:
        contents["units"] = units
    paths = {name: run.folder / ("report.html" if name == "report" else f"{name}.png") for name in contents}
    for name, path in paths.items():
        try:
            write_atomic(path, contents[name])
        except OSError as error:
            raise RlsearchError(f"{path}: cannot be written ({error.strerror or error})") from None
    return paths


def report_html(run: Run, pick: Selection) -> str:
    """The content of ``report.html``."""
    return page.page(f"rlsearch: {run_title(run)}", _body(run, pick))


def _body(run: Run, pick: Selection) -> Iterable[str]:
    yield page.heading(run_title(run))
    yield page.text(_subtitle(run), "muted")
    yield _pick_section(run, pick)
    yield page.section(
        "The front",
        page.chart(front_chart(run, pick), "front-chart"),
        note="Each point is a trained policy; the dashed lines are the baseline. Point at one for its policy.",
    )
    yield page.section(
        "Trials on the front",
        _front_table(run, pick),
        note=f"Below each value, the difference to the baseline.{_times(run)}",
    )
    yield from confirmed_page(run, pick)
    units = units_chart(run, pick)
    if units is not None:
        yield page.section(
            "What the front replaces",
            page.chart(units, "units-chart"),
            note="One row a policy on the front, one column a unit that any trial replaced; empty means left as it is.",
        )
    yield from _effects_section(run)
    yield from _dropping_section(run, pick)
    small = [
        page.section(title, page.chart(figure, name), note=note)
        for title, figure, name, note in (
            ("Hypervolume", hypervolume_chart(run), "hypervolume-chart", _HYPERVOLUME),
            ("Accuracy by epoch", curves_chart(run, pick), "curves-chart", _CURVES),
        )
        if figure is not None
    ]
    if small:
        yield page.columns(*small)
    yield from _racing_section(run)
    yield _failures_section(run)
    yield page.section("All trials and the search space", _all_trials(run), _space(run))


_HYPERVOLUME = (
    "The share of the objective space that the trials dominate, after each trial. The reference is "
    f"{REFERENCE_FACTOR:g} times the baseline in every cost, and nothing of what is maximised."
)
_CURVES = "On the validation split. Orange: the pick; black: the baseline; blue: the rest of the front."


_DROPPING = (
    "Layers in forward order, from the top. Blue: it learned in that epoch; grey: it had left training. Below, the "
    "memory of a training step and the accuracy, by epoch."
)
_RACING = (
    "Trials that had next to no chance of improving the front were stopped at these epochs. The correlation (Kendall's "
    "tau-b) between the accuracy there and at the end, over the trials trained in full, says how far that can be "
    f"trusted; below {POOR_CORRELATION:g} fewer are stopped."
)
_DEPARTURES = "All trials of the front with Learn&Drop: the darker a layer, the more epochs it learned."


def _subtitle(run: Run) -> str:
    ended = [record.ended for record in run.records if record.ended is not None]
    states = ", ".join(f"{number} {state}" for state, number in counts(run).items() if number)
    goals = ", ".join(f"{direction} {name}" for name, direction in run.objectives.items())
    when = f"; last trial ended {max(ended):%Y-%m-%d %H:%M} UTC" if ended else ""
    return f"{run.folder.resolve().name}: {len(run.records)} trials ({states}); {goals}{when}"


def _times(run: Run) -> str:
    """A word on times that others spoiled, where any are shown."""
    is_shown = any(is_shared_time(name, record) for name in run.objectives for record in run.records)
    return f" {SHARED_NOTE}." if is_shown else ""


def _pick_section(run: Run, pick: Selection) -> str:
    """The pick in figures, why it is the pick, and whether it beats its controls."""
    chosen, reference = record_of(run, pick.trial), baseline(run)
    confirmed = confirmations(run).get(pick.trial)
    names = [*reversed(HEADLINE), *(name for name in run.objectives if name not in HEADLINE)]
    items = [_card(name, chosen, reference) for name in names]
    noise = baseline_noise(run)
    told = noise.sentence if noise else "differences within the noise between seeds decide nothing"
    verdicts = [(item.sentence, "" if item.verdict == BEATS else "warn") for item in control_verdicts(run, chosen)]
    return page.section(
        f"The pick: trial {pick.trial}",
        page.preformatted(describe_trial(chosen, reference)),
        page.cards(items),
        page.text(f"It is {pick.why}. Against the end-to-end baseline: {describe_savings(run, chosen)}."),
        *([] if confirmed is None else [page.text(f"Confirmed: {describe_confirmation(confirmed)}.")]),
        page.bullets(verdicts),
        page.text(f"In the search each trial was trained once: {told}.", "muted"),
    )


def _card(name: str, record: TrialRecord, reference: TrialRecord | None) -> tuple[str, str, str]:
    """A metric's label, its difference to the baseline, and the two values; the value alone where there is none."""
    base = None if reference is None else reference.metric(name)
    shown = describe_metric(name, record, base)
    change = describe_difference(name, record.metric(name), base)
    if reference is None or not change:
        return LABELS[name], shown, ""
    return LABELS[name], change, f"{shown}; baseline {describe_metric(name, reference)}"


def _front_table(run: Run, pick: Selection) -> str:
    """The baseline, the front, and the controls that are not on it."""
    reference = baseline(run)
    members = front(run)
    shown = {record.trial for record in members}
    controls = [item for item in candidates(run) if item.origin.endswith("control") and item.trial not in shown]
    rows = [] if reference is None else [_row(run, reference, reference, pick, "end-to-end baseline")]
    for record in members:
        if reference is None or record.trial != reference.trial:
            rows.append(_row(run, record, reference, pick, _note(run, record)))
    rows += [_row(run, record, reference, pick, f"{record.origin}, dominated") for record in controls]
    head = ["trial", *(LABELS[name] for name in run.objectives), "policy"]
    return page.table(head, rows, range(len(run.objectives) + 1))


def _note(run: Run, record: TrialRecord) -> str:
    """Where a trial comes from when no sampler proposed it, and what left in it."""
    found = departures_of(run, record)
    parts = ["" if record.origin == "sampler" else record.origin, "" if found is None else describe_departures(found)]
    return "; ".join(part for part in parts if part)


def _row(run: Run, record: TrialRecord, reference: TrialRecord | None, pick: Selection, note: str) -> page.Row:
    cells = [page.Cell(f"★ {record.trial}" if record.trial == pick.trial else str(record.trial))]
    for name in run.objectives:
        base = None if reference is None else reference.metric(name)
        change = "" if record is reference else describe_difference(name, record.metric(name), base)
        cells.append(page.Cell(describe_metric(name, record, base), change))
    cells.append(page.Cell(describe_trial(record, reference), note))
    return page.Row(tuple(cells), "strong pick" if record.trial == pick.trial else "")


def _effects_section(run: Run) -> Iterable[str]:
    """What replacing each unit alone does to the accuracy; nothing where no trial replaced any."""
    effects = unit_effects(run)
    figure = unit_effects_chart(effects)
    if figure is not None:
        yield page.section(TITLE, page.chart(figure, "effects-chart"), note=effects_note(run, effects))
    elif effects:
        yield page.section(TITLE, page.text(NOTHING_KNOWN, "muted"))


def _dropping_section(run: Run, pick: Selection) -> Iterable[str]:
    """Which layers left at which epoch; nothing where no trial of the front tells."""
    told = [(record, found) for record in front(run) if (found := departures_of(run, record)) is not None]
    if not told:
        return
    # The pick where it has Learn&Drop, else the first of the front.
    record, found = next((item for item in told if item[0].trial == pick.trial), told[0])
    sentence = dropping_sentence(found, record.forward_share, record.mean_learnable_params)
    parts = [
        page.text(f"{row_label(record, pick)}: {sentence}."),
        page.chart(dropping_chart(epochs_of(run, record), found), "dropping-chart"),
    ]
    if len(told) > 1:
        parts += [page.text(_DEPARTURES), page.chart(departures_chart(told, pick), "departures-chart")]
    yield page.section("When layers left training", *parts, note=_DROPPING)


def _racing_section(run: Run) -> Iterable[str]:
    """The rungs, and how far they could be trusted; nothing where trials were not raced."""
    found = racing_figures(run)
    if not found:
        return
    rows = []
    for rung in found:
        correlation = page.Cell(
            "–" if rung.correlation is None else f"{rung.correlation:.2f}", "poor" if rung.is_poor else ""
        )
        rows.append(page.Row((str(rung.epoch), str(rung.stopped), str(rung.trials), correlation)))
    head = ["after epoch", "stopped", "trained in full", "rank correlation with the end"]
    yield page.section("Racing", page.table(head, rows, range(4)), note=_RACING)


def _failures_section(run: Run) -> str:
    """The trials without a result, and why: a search that hides them cannot be judged."""
    rows = [
        page.Row((str(record.trial), record.state, record.reason or "–", describe_trial(record, baseline(run))))
        for record in run.records
        if record.state != "COMPLETE"
    ]
    if not rows:
        return page.section("Trials that did not complete", page.text("None.", "muted"))
    return page.section("Trials that did not complete", page.table(["trial", "state", "reason", "policy"], rows, [0]))


def _all_trials(run: Run) -> str:
    names = list(run.objectives)
    reference = baseline(run)
    rows = []
    for record in run.records:
        values = (
            describe_metric(name, record, None if reference is None else reference.metric(name)) for name in names
        )
        rows.append(page.Row((str(record.trial), record.state, *values, describe_trial(record, reference))))
    head = ["trial", "state", *(LABELS[name] for name in names), "policy"]
    return page.folded(f"All {len(rows)} trials", page.table(head, rows, [0, *range(2, 2 + len(names))]))


def _space(run: Run) -> str:
    content = yaml.safe_dump(dict(run.space), sort_keys=False, allow_unicode=True)
    return page.folded("The search space (space.yaml)", page.preformatted(content))
