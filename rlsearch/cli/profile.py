"""``rlsearch profile``: the units of a model, what each costs, and what replacing it saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from rlsearch.policy import ModelSpec, Policy
    from rlsearch.training.cost import CostModel


def profile(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's name (ours, torchvision's, timm's), or package:factory.")
    ],
    policy: Annotated[
        Path | None, typer.Option(metavar="POLICY.json", help="Also cost this policy, beside the baseline.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="v1|v2", help="Also cost a published form of Replacement Learning.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only units of these names: 'layer3.*', '*.mlp'.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side; by default what the model is made for.")
    ] = None,
    num_classes: Annotated[int, typer.Option(min=1, help="The width of the classifier.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step; memory depends on it.")] = 128,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw; memory depends on it.")] = "sgd",
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the cost by layer, and by how many have left.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Shows the units of a model, what each costs, and what each block would save. Nothing is trained or allocated.

    Example: rlsearch profile resnet32 --batch-size 64 --preset v1
    """
    import json
    import logging

    from rich.console import Console
    from rich.measure import Measurement

    spec, chosen = _read(model, num_classes, policy, preset)
    with Console(stderr=True).status(f"building {spec.name}") as status:
        from rlsearch.cli.profile_content import profile_content
        from rlsearch.training.cost import CostModel

        # What fails on fake tensors is logged there with its stack, besides being raised.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        built, shape = _build(spec, image_size)
        status.update(f"looking at {spec.name}")
        costs = CostModel(built, shape, batch_size, optimizer)
        if preset is not None:
            chosen = _preset(preset, built, shape)
        setting = {"input_shape": list(shape), "batch_size": batch_size, "optimizer": optimizer}
        content = profile_content(spec.name, setting, costs, chosen, units, status.update)
        if picture is not None:
            _draw(picture, content, costs)
    if as_json:
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
        return
    from rlsearch.cli.profile_table import layers_table, policy_tables, units_table

    tables = [layers_table(content), units_table(content)]
    if chosen is not None:
        tables += policy_tables(content, f"the preset {preset}" if preset is not None else f"the policy {policy}")
    console = Console()
    for table in tables:
        # A table that is too wide for the terminal is shown whole, rather than with cells cut off.
        least = Measurement.get(console, console.options.update(width=1000), table).minimum
        Console(width=max(console.width, least)).print(table, "", soft_wrap=False)


def _read(model: str, num_classes: int, path: Path | None, preset: str | None) -> tuple[ModelSpec, Policy | None]:
    """The model that is meant, and the policy of the file; before anything is built."""
    from rlsearch.errors import ConfigError, Problem
    from rlsearch.policy import ModelSpec, Policy

    if path is not None and preset is not None:
        raise ConfigError([Problem("--preset", "cannot stand beside --policy; give one of the two")], "profile")
    if path is None:
        return ModelSpec(model, num_classes), None
    chosen = Policy.load(path)
    if chosen.model is None:
        return ModelSpec(model, num_classes), chosen
    if chosen.model.name != model:
        message = f"the policy is for {chosen.model.name!r}, MODEL is {model!r}; give the policy's own model"
        raise ConfigError([Problem("model.name", message)], str(path))
    return chosen.model, chosen


def _draw(path: Path, content: Any, costs: CostModel) -> None:
    from rlsearch.cli.profile_picture import write_picture
    from rlsearch.errors import UserError
    from rlsearch.policy import Policy

    try:
        write_picture(path, content, costs.at_cuts(Policy()))
    except OSError as error:
        raise UserError(f"--picture: {path} cannot be written: {error.strerror or error}") from None


def _build(spec: ModelSpec, image_size: int | None) -> tuple[nn.Module, tuple[int, ...]]:
    """The model, on the meta device, and the shape of one image for it."""
    from dataclasses import replace

    import torch
    from torch import nn

    from rlsearch.errors import ModelError
    from rlsearch.model_graph import example_shape
    from rlsearch.training.models import build_spec, default_image_size

    with torch.device("meta"):
        model = build_spec(replace(spec, weights=None))
    size = image_size or default_image_size(spec.name, spec.kwargs)
    if size is not None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        return model, (3 if first is None else first.in_channels, size, size)
    try:
        return model, example_shape(model)[1:]
    except ModelError as error:
        remedy = "give --image-size, the pixels a side of the square images that it takes"
        raise ModelError(f"model {spec.name!r}: no image size could be guessed; {remedy}\n{error}") from error


def _preset(name: str, model: Any, shape: tuple[int, ...]) -> Policy:
    import torch

    from rlsearch.policy import Policy

    # Two images: a batch norm in training mode refuses one value a channel.
    return Policy.preset(name, model, torch.empty(2, *shape, device="meta"))
