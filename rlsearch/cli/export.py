"""``rlsearch export``: a trial of a run as files that stand alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The folder to be made; it must not exist yet.")],
    trial: Annotated[int | None, typer.Option(min=0, help="This trial; else --select decides.")] = None,
    select: Annotated[
        str, typer.Option(metavar="knee|OBJECTIVE", help="The pick: the knee, or the best in one objective.")
    ] = "knee",
    where: Annotated[str | None, typer.Option(help="Conditions on the trials: 'accuracy>=0.9'.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Names the run's own model code, which lets it run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Writes policy.json, model.safetensors and a card, and measures the model again, rebuilt from these files alone.

    Example: rlsearch export runs/digits --select knee --out best
    """
    import json
    from dataclasses import asdict

    from rlsearch import results
    from rlsearch.export import export_trial

    run = results.read_run(run_dir)
    why = "named by --trial"
    if trial is None:
        trial, why = results.select(run, select, () if where is None else results.parse_where(where))
    report = export_trial(run, trial, out, model=model)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "folder": str(report.folder), "why": why}, indent=2))
        return
    typer.echo(f"trial {trial} ({why}) is in {out}")
    typer.echo(
        f"rebuilt from its files: {report.validation_accuracy:.2%} on the validation split "
        f"(recorded: {report.recorded_accuracy:.2%}), {report.test_accuracy:.2%} on the test split"
    )
    if report.note:
        typer.echo(report.note)
