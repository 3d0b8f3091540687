"""``rlsearch pareto``: the front of a run, the baseline, the pick and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pareto(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    where: Annotated[
        str | None,
        typer.Option(help="Conditions on the trials: 'accuracy>=0.9 and params<=0.8x' (x: the baseline)."),
    ] = None,
    select: Annotated[
        str, typer.Option(metavar="knee|OBJECTIVE", help="The pick: the knee, or the best in one objective.")
    ] = "knee",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Shows the Pareto front of a run beside the end-to-end baseline, the pick, and what it saves.

    Example: rlsearch pareto runs/digits --where "accuracy>=0.9 and params<=0.8x" --select memory
    """
    import json

    from rich.console import Console

    from rlsearch import results
    from rlsearch.results.console import render_front

    run = results.read_run(run_dir)
    conditions = () if where is None else results.parse_where(where)
    if as_json:
        typer.echo(json.dumps(results.summary(run, select, conditions), indent=2, allow_nan=False))
        return
    render_front(run, Console(), results.select(run, select, conditions), conditions)
