"""``rlsearch train``: one policy, or a plain model with Learn&Drop, at full length and without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlsearch.cli.train_folder import TrainFolder
    from rlsearch.training.trial import Trial


def train(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="POLICY_OR_MODEL",
            help="A policy.json, of an export or your own; or a model's name (ours, torchvision's, timm's), or "
            "package.module:factory.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="OUT", help="Checkpoint, metrics and weights go here.")],
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="digits, parquet:PATH, cifar10, …; else the policy's own.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    learn_drop: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,…",
            help="Layers that have stopped learning leave training: 'default', or settings such as "
            "threshold=0.5,features=stored; what is not named is as the policy has it, else the default. 'off' trains "
            "a policy's layers to the end.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and augmentation.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="training.lr=0.2, data.flip=true, model.kwargs.small_stem=true, …; may be repeated.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Names the policy's own model code, which lets it run."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it; else CUDA where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last epoch's metrics as JSON.")] = False,
) -> None:
    """Trains a policy, or a model whose layers leave training early, and writes the model's weights.

    Called again with the same OUT, it goes on where it was.

    Example: rlsearch train best/policy.json --data digits --epochs 30 --out trained

    Example: rlsearch train resnet32 --learn-drop default --data digits --epochs 30 --out trained
    """
    import json

    from rlsearch.cli.train_folder import TrainFolder
    from rlsearch.cli.train_spec import TrainOptions, training_spec
    from rlsearch.cli.train_words import summary
    from rlsearch.cli.warnings import shown_warnings
    from rlsearch.training.trial import Trial

    options = TrainOptions(subject, data, epochs, learn_drop, seed, tuple(settings or ()), model)
    with shown_warnings():
        spec, images = training_spec(options)
        trial = Trial(spec, data=images, device=device, scratch=out)
        folder = TrainFolder.opened(out, trial)
        if folder.history:
            typer.echo(f"going on after epoch {trial.epochs_done} of {folder.checkpoint}", err=True)
        _run(trial, folder, quiet=as_json)
        written = folder.write_results(trial, images)
    if as_json:
        typer.echo(json.dumps(folder.history[-1], indent=2))
        return
    for line in [*summary(folder.history, trial), *(f"{what}: {path}" for what, path in written.items())]:
        typer.echo(line)


def _run(trial: Trial, folder: TrainFolder, quiet: bool) -> None:
    """Trains to the end; every epoch is kept before it is told."""
    from rich.console import Console

    from rlsearch.cli.train_words import epoch_line

    # A terminal alone shows it, and only while an epoch runs: an epoch may take minutes.
    console = Console(stderr=True)
    while not trial.done:
        with console.status(f"epoch {trial.epochs_done + 1} of {trial.spec.training.epochs}"):
            metrics = trial.run_epoch()
            folder.keep(trial, metrics)
        if not quiet:
            typer.echo(epoch_line(metrics, trial))
