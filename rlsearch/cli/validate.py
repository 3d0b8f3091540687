"""``rlsearch validate``: checks a search space without training, and says how large it is and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlsearch.search.space import SearchSpace
    from rlsearch.search.summary import SpaceSummary

_UNITS = {
    "params": (1, "learnable parameters"),
    "memory_predicted": (1e6, "predicted memory, MB"),
    "forward_flops": (1e6, "forward of an image, MFLOP"),
    "step_flops": (1e6, "step of an image, MFLOP"),
}


def validate(
    space: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="A search space.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: training.epochs=3.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Checks a search space without training: every error at once; its size, its costs, whether its limits can be met.

    Example: rlsearch validate search_spaces/digits_resnet32.yaml
    """
    import json

    from rich.console import Console

    from rlsearch.errors import ConfigError, Problem, UserError

    try:
        loaded, summary = _checked(space, settings or [])
    except UserError as error:
        if not as_json:
            raise
        problems = error.problems if isinstance(error, ConfigError) else (Problem("", str(error)),)
        errors = [{"key": problem.key, "message": problem.message} for problem in problems]
        typer.echo(json.dumps({"valid": False, "errors": errors, "size": None, "cost": None}, indent=2))
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(_content(summary), indent=2, allow_nan=False))
        return
    _print(loaded, summary, str(space), Console())


def _checked(path: Path, settings: list[str]) -> tuple[SearchSpace, SpaceSummary]:
    from rlsearch.errors import ConfigError
    from rlsearch.search.check import check_space
    from rlsearch.search.space import load_space
    from rlsearch.search.summary import summarize

    space = load_space(path, settings)
    problems = check_space(space)
    if problems:
        raise ConfigError(problems, str(path))
    return space, summarize(space)


def _content(summary: SpaceSummary) -> dict[str, Any]:
    """What ``--json`` prints."""
    from dataclasses import asdict

    return {"valid": True, "errors": [], **asdict(summary)}


def _print(space: SearchSpace, summary: SpaceSummary, name: str, console: Console) -> None:
    from rich.table import Table

    # Sentences are not wrapped: they are read by a terminal, and by `grep`.
    console.print(f"{name}: valid", style="green", highlight=False, markup=False, soft_wrap=True)
    plus = f", times the continuous {', '.join(summary.continuous)}" if summary.continuous else ""
    console.print(
        f"{summary.size:,} points{plus}: {summary.replacements:,} sets of replacements "
        f"(at most {summary.max_replaced} of {summary.num_units} units at once) and what is searched beside them",
        highlight=False,
        soft_wrap=True,
    )
    if summary.variants:
        roles = ", ".join(f"{count} of role {role}" for role, count in summary.roles.items())
        fitting = ", ".join(f"{name} {count}" for name, count in summary.variants.items())
        console.print(f"units: {roles}; how many each fits: {fitting}", highlight=False, markup=False, soft_wrap=True)
    table = Table(
        title=f"cost of {summary.sampled} random valid policies, nothing dropped",
        caption="parameters: the least and the greatest of all policies",
    )
    for column in ("", "baseline", "least", "median", "greatest"):
        table.add_column(column, justify="left" if not column else "right")
    for cost, (unit, label) in _UNITS.items():
        spread = summary.cost[cost]
        values = (spread.baseline, spread.least, spread.median, spread.greatest)
        table.add_row(label, *(f"{value / unit:,.{0 if unit == 1 else 1}f}" for value in values))
    console.print(table)
    for constraint in space.constraints:
        share = summary.constraints[constraint.metric]
        told = "only training can tell" if share is None else f"kept by {100 * share:.0f} % of them"
        console.print(f"constraint {constraint.metric} {constraint}: {told}", highlight=False, soft_wrap=True)
    for warning in summary.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
