"""The command line: one file a subcommand, each only parsing and wiring.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rlsearch._version import __version__
from rlsearch.cli.confirm import confirm
from rlsearch.cli.ctrl_c import EXIT_CODE, handle_ctrl_c
from rlsearch.cli.doctor import doctor
from rlsearch.cli.export import export
from rlsearch.cli.pareto import pareto
from rlsearch.cli.profile import profile
from rlsearch.cli.repair import repair
from rlsearch.cli.report import report
from rlsearch.cli.resume import resume
from rlsearch.cli.search import search
from rlsearch.cli.train import train
from rlsearch.cli.validate import validate
from rlsearch.errors import RlsearchError, UserError, printable
from rlsearch.files import is_storage_failure

app = typer.Typer(
    name="rlsearch",
    help="Searches training policies for vision models: which layers to replace, by what, and when to drop them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (validate, profile, search, resume, repair, pareto, report, confirm, export, train, doctor):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlsearch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def main() -> None:
    """Runs the command line; a user's mistake ends with one message and 2, a failed run with 1."""
    handle_ctrl_c()
    # A user's own `package.module:factory` lies where the command was typed.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        app()
    except UserError as error:
        _leave(error, 2)
    except RlsearchError as error:
        _leave(error, 1)
    except OSError as error:
        if not is_storage_failure(error):
            raise
        told = f"{error.filename or 'a file'}: cannot be written ({error.strerror})"
        _leave(f"{told}; what was there before is as it was: mend it, then give the same command again", 1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(EXIT_CODE)


def _leave(error: RlsearchError | str, code: int) -> None:
    told = "\n".join(map(printable, f"rlsearch: {error}".split("\n")))
    typer.echo(told, err=True)
    sys.exit(code)
