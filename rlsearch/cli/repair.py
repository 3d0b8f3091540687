"""``rlsearch repair``: makes a run's files say what its study says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def repair(
    run_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a run; no search may be going on in it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was mended as one JSON object.")] = False,
) -> None:
    """Writes the tables, TensorBoard's files, space.yaml and the report of a run anew where they differ from its study.

    The study (DIR/study.db) is what counts; all the rest follows from it. Trials that a killed search left open are
    closed, or queued for `rlsearch resume`. Nothing is trained.

    Example: rlsearch repair runs/digits
    """
    import json
    from dataclasses import asdict
    from functools import partial

    from rlsearch.search.repair import repair_run

    found = repair_run(run_dir, partial(typer.echo, err=True))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    for line in found.mended:
        typer.echo(f"mended: {line}")
    for line in found.lost:
        typer.echo(f"lost: {line}")
    told = f"{len(found.mended)} mended" if found.mended else "nothing to mend"
    typer.echo(f"{run_dir}: {found.trials} trials; {told}; study, tables and TensorBoard agree")
