"""``rlsearch report``: one offline HTML file about a run, and its front as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    select: Annotated[
        str, typer.Option(metavar="knee|OBJECTIVE", help="The pick: the knee, or the best in one objective.")
    ] = "knee",
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as one JSON object.")] = False,
) -> None:
    """Writes DIR/report.html (one file that needs no network), DIR/front.png and DIR/units.png.

    The last one shows which layers bear replacing, where trials tell of any.

    Example: rlsearch report runs/digits
    """
    import json

    from rlsearch import results
    from rlsearch.results.report import write_report

    written = write_report(results.read_run(run_dir), select)
    if as_json:
        typer.echo(json.dumps({name: str(path) for name, path in written.items()}))
        return
    for path in written.values():
        typer.echo(f"written: {path}")
