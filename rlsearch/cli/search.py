"""``rlsearch search``: the main job. Launches a search and shows its front when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlsearch.search.run import SearchResult


def search(
    space: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="A search space.")],
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="The run's own folder; it must not hold anything yet.")],
    trials: Annotated[
        int | None, typer.Option(help="How many trials; the baseline and controls are among them.")
    ] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="No further trial starts after this time: 2h, 90m, 1h30m.")
    ] = None,
    warm_start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An earlier run on the same model and space, to learn from."),
    ] = None,
    address: Annotated[
        str, typer.Option(help="A running Ray cluster's address; DIR must then be on storage that its nodes share.")
    ] = "local",
    seed: Annotated[int | None, typer.Option(help="Of the proposals and of every training.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: training.epochs=3.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the front as one JSON object; progress goes to the standard error.")
    ] = False,
) -> None:
    """Searches training policies: trains the baseline, the controls, then what the sampler proposes.

    Ctrl-C stops it, and `rlsearch resume DIR` goes on.

    Example: rlsearch search search_spaces/digits_resnet32.yaml --run-dir runs/digits
    """
    from rich.console import Console

    from rlsearch.search.space import load_space

    options = {"search.trials": trials, "search.time_budget": time_budget, "search.seed": seed}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    loaded = load_space(space, [*(settings or []), *given])

    from rlsearch.search.run import start_search  # Ray takes a second: a mistake in the space is told without it

    console = Console(stderr=as_json)
    result = start_search(loaded, run_dir, warm_start=warm_start, address=address, console=console)
    show_result(result, run_dir, console, as_json)


def show_result(result: SearchResult, run_dir: Path, console: Console, as_json: bool) -> None:
    """What a search, new or resumed, ends with: the front beside the baseline, the report, the next commands.

    Args:
        result: how the search ended.
        run_dir: the folder as the user wrote it, for the commands to copy.
        console: for people.
        as_json: print the front as ``pareto --json`` does.

    Raises:
        SearchError: nothing was trained to its end.
        typer.Exit: a signal stopped the search.
    """
    import json
    import shlex

    from rlsearch import results
    from rlsearch.errors import SearchError
    from rlsearch.results.console import render_front
    from rlsearch.results.report import write_report

    folder, model = shlex.quote(str(run_dir)), result.model_option
    if result.signal_exit_code is not None:
        console.print(f"stopped after {len(result.records)} trials", style="yellow")
        console.print(f"resume with: rlsearch resume {folder}{model}", soft_wrap=True, highlight=False)
        raise typer.Exit(result.signal_exit_code)
    if result.why_ended:
        told = f"{result.why_ended}: ended after {len(result.records)} trials"
        console.print(told, style="yellow", soft_wrap=True)
    if result.resume_with:
        told = f"to go on all the same: rlsearch resume {folder} {result.resume_with}{model}"
        console.print(told, soft_wrap=True, highlight=False)
    run = results.read_run(result.folder)
    if not results.candidates(run):
        raise SearchError(
            f"none of the {len(result.records)} trials is complete, so there is no front; "
            f"see their reasons: rlsearch pareto {folder}"
        )
    written = write_report(run)
    if as_json:
        typer.echo(json.dumps(results.summary(run), indent=2, allow_nan=False))
        return
    render_front(run, console)
    titles = {"report": "report", "front": "picture", "units": "layers"}
    shown = "\n".join(f"{titles[name]}: {path}" for name, path in written.items())
    console.print(f"\n{shown}\n", soft_wrap=True, highlight=False)
    console.print(
        "next:\n"
        f"  rlsearch export {folder} --out policy{model}        the knee's policy and weights, measured again\n"
        f"  rlsearch confirm {folder}{model}                    the front again with new seeds, on the test split\n"
        f'  rlsearch pareto {folder} --where "accuracy>=0.9" --select params\n'
        f"  rlsearch resume {folder} --trials +20{model}\n"
        f"  tensorboard --logdir {folder}/tensorboard",
        soft_wrap=True,
        highlight=False,
    )
