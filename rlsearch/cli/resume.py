"""``rlsearch resume``: goes on with a search, however it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlsearch.cli.search import show_result


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    trials: Annotated[
        str | None, typer.Option(metavar="N|+N", help="How many trials in all, or so many more than planned.")
    ] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="No further trial starts after this time: 2h, 90m, 1h30m.")
    ] = None,
    gpu_hours: Annotated[
        str | None,
        typer.Option(metavar="N|+N", help="No further trial starts above this GPU time in all, or so much more."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Names the run's own model code, which lets it run."),
    ] = None,
    address: Annotated[str, typer.Option(help="A running Ray cluster's address.")] = "local",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the front as one JSON object; progress goes to the standard error.")
    ] = False,
) -> None:
    """Goes on with a search that was interrupted or killed, or that is to have more trials.

    What was under way is trained first, from its last checkpoint. The tables are made to say what the study says.

    Example: rlsearch resume runs/digits --trials +50
    """
    from rich.console import Console

    from rlsearch.errors import ConfigError, Problem
    from rlsearch.search.run import resume_search
    from rlsearch.search.settings import parse_duration

    problems: list[Problem] = []
    seconds = None if time_budget is None else parse_duration(time_budget, "--time-budget", problems)
    if problems:
        raise ConfigError(problems, "command line")
    console = Console(stderr=as_json)
    result = resume_search(
        run_dir,
        trials=trials,
        time_budget=seconds,
        gpu_hours=gpu_hours,
        model=model,
        address=address,
        console=console,
    )
    show_result(result, run_dir, console, as_json)
