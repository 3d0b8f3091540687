"""``rlsearch train``: one policy at full length, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rlsearch.policy import ModelSpec, Policy
    from rlsearch.training.metrics import EpochMetrics
    from rlsearch.training.trial import TrialSpec


def train(
    policy: Annotated[Path, typer.Argument(metavar="POLICY", help="A policy.json, of an export or your own.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="Checkpoint, metrics and weights go here.")],
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="digits, parquet:PATH, cifar10, …; else the policy's own.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and augmentation.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="training.lr=0.2, data.flip=true, …; may be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Names the policy's own model code, which lets it run."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it; else CUDA where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last epoch's metrics as JSON.")] = False,
) -> None:
    """Trains a policy, and writes the model's weights. Called again with the same OUT, it goes on where it was.

    Example: rlsearch train best/policy.json --data digits --epochs 30 --out trained
    """
    import json

    from rlsearch.export import named_model
    from rlsearch.files import write_atomic
    from rlsearch.policy import Policy
    from rlsearch.replacement import materialize
    from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
    from rlsearch.training.trial import Trial

    chosen = Policy.load(policy)
    spec = _spec(chosen, named_model(chosen, model, str(policy)), data, epochs, seed, settings or [])
    trial = Trial(spec, device=device, scratch=out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, history_file = out / "checkpoint.pt", out / "metrics.json"
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        trial.load_state_dict(load_checkpoint(checkpoint))
        history = json.loads(history_file.read_text(encoding="utf-8"))[: trial.epochs_done]
        typer.echo(f"going on after epoch {trial.epochs_done} of {checkpoint}", err=True)
    while not trial.done:
        metrics = trial.run_epoch()
        history.append(metrics.to_dict())
        write_atomic(history_file, json.dumps(history, indent=1).encode())
        save_checkpoint(checkpoint, trial.state_dict())
        if not as_json:
            typer.echo(_line(metrics))
    save_weights(out / "model.safetensors", materialize(trial.model))
    chosen.save(out / "policy.json")
    if as_json:
        typer.echo(json.dumps(history[-1], indent=2))
    else:
        typer.echo(f"weights: {out / 'model.safetensors'}")


def _spec(
    policy: Policy, model: ModelSpec, data: str | None, epochs: int | None, seed: int, settings: list[str]
) -> TrialSpec:
    """What to train: the policy's own data and training settings, with what the command line changes."""
    from rlsearch.config import from_mapping
    from rlsearch.errors import ConfigError, Problem
    from rlsearch.search.yaml_file import override
    from rlsearch.training.data import DataSpec
    from rlsearch.training.loop import TrainingSpec
    from rlsearch.training.trial import TrialSpec

    problems: list[Problem] = []
    content: dict[str, Any] = {
        "data": dict(policy.provenance.get("data") or {}),
        "training": dict(policy.provenance.get("training") or {}),
    }
    if data is not None and data != content["data"].get("name"):
        content["data"] = {"name": data}
    if epochs is not None:
        content["training"]["epochs"] = epochs
    content = override(content, settings, problems)
    if "name" not in content["data"]:
        problems.append(Problem("--data", "is missing, and the policy names no data: give one, as in --data digits"))
    if problems:
        raise ConfigError(problems, "rlsearch train")
    data_spec = from_mapping(DataSpec, content["data"], "data", problems)
    training = from_mapping(TrainingSpec, content["training"], "training", problems)
    if problems or data_spec is None or training is None:
        raise ConfigError(problems, "rlsearch train")
    return TrialSpec(model, data_spec, training, policy, seed)


def _line(metrics: EpochMetrics) -> str:
    dropped = f", {metrics.dropped_units} units dropped" if metrics.dropped_units else ""
    return (
        f"epoch {metrics.epoch}/{metrics.epochs}: accuracy {metrics.accuracy:.2%}, "
        f"train loss {metrics.train_loss:.4f}, {metrics.samples_per_second:,.0f} images/s{dropped}"
    )
