"""``rlsearch confirm``: the front and the baseline trained again with new seeds, measured on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlsearch.results import Run


def confirm(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    seeds: Annotated[
        int,
        typer.Option(
            min=2,
            help="Trainings of each policy. Their seeds are the numbers after the search's own that no trial had, the "
            "same for all policies: after a search with seed 0, whose baseline trained with seed 1 too, they are 2, 3, "
            "4. With more seeds later, only those that are new are trained.",
        ),
    ] = 3,
    trial: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Only this trial and the baseline, not the whole front; may be repeated."),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(metavar="knee|OBJECTIVE", help="Only the pick and the baseline."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Names the run's own model code, which lets it run."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; progress goes to the standard error.")
    ] = False,
) -> None:
    """Trains the front and the baseline again with new seeds, one at a time, and measures them on the test split.

    Each training is kept in DIR/confirmed.parquet as soon as it is done. After Ctrl-C the same command goes on; the
    training that was under way starts again. The report is written anew; it and `rlsearch pareto` then show means,
    intervals and chances.

    Example: rlsearch confirm runs/digits --seeds 3
    """
    from rich.console import Console

    from rlsearch.cli.confirm_progress import ConfirmProgress
    from rlsearch.cli.ctrl_c import EXIT_CODE
    from rlsearch.cli.warnings import shown_warnings
    from rlsearch.confirm import confirm_run

    console = Console(stderr=as_json)
    try:
        with shown_warnings(), ConfirmProgress(console) as progress:
            run = confirm_run(run_dir, seeds=seeds, trials=trial or (), key=select, model=model, watch=progress)
    except KeyboardInterrupt:
        console.print("stopped; what has finished is kept", style="yellow")
        console.print(f"go on with: {_same_command(run_dir, seeds, trial, select, model)}", soft_wrap=True)
        raise typer.Exit(EXIT_CODE) from None
    _show(run, console, as_json)


def _show(run: Run, console: Console, as_json: bool) -> None:
    """What is confirmed by now, the run's report with it."""
    import json

    from rlsearch.results.confirmation import confirmations
    from rlsearch.results.confirmed_views import confirmed_table
    from rlsearch.results.confirmed_words import CONFIRMED_NOTE, confirmed_line
    from rlsearch.results.report import write_report
    from rlsearch.results.run_summary import confirmed_entry

    written = write_report(run)
    if as_json:
        found = [{"trial": trial} | (confirmed_entry(run, trial) or {}) for trial in sorted(confirmations(run))]
        typer.echo(json.dumps({"folder": str(run.folder), "confirmed": found}, indent=2, allow_nan=False))
        return
    console.print(confirmed_table(run))
    for line in (CONFIRMED_NOTE, confirmed_line(run)):
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {written['report']}", soft_wrap=True, highlight=False)


def _same_command(run_dir: Path, seeds: int, trials: list[int] | None, select: str | None, model: str | None) -> str:
    """The command line that goes on."""
    import shlex

    words = ["rlsearch", "confirm", str(run_dir), "--seeds", str(seeds)]
    for trial in trials or ():
        words += ["--trial", str(trial)]
    for name, value in (("--select", select), ("--model", model)):
        words += [] if value is None else [name, value]
    return shlex.join(words)
