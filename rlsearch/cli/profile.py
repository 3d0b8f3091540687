"""``rlsearch profile``: the units of a model, what each costs, and what replacing it saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from rlsearch.policy import Policy
    from rlsearch.training.cost import Cost, CostModel

_MEGA = 1e6


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, or package.module:factory.")],
    policy: Annotated[
        Path | None, typer.Option(metavar="POLICY.json", help="Also cost this policy, beside the baseline.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side; by default what the model is made for.")
    ] = None,
    num_classes: Annotated[int, typer.Option(min=1, help="The width of the classifier.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step; memory depends on it.")] = 128,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw; memory depends on it.")] = "sgd",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Shows the units of a model, what each costs, and what each block would save. Nothing is trained or allocated.

    Example: rlsearch profile resnet32 --batch-size 64
    """
    import json

    from rich.console import Console

    from rlsearch.errors import ConfigError, Problem
    from rlsearch.policy import ModelSpec, Policy

    chosen = None if policy is None else Policy.load(policy)
    spec = ModelSpec(model, num_classes)
    if chosen is not None and chosen.model is not None:
        if chosen.model.name != model:
            message = f"the policy is for {chosen.model.name!r}, MODEL is {model!r}; give the policy's own model"
            raise ConfigError([Problem("model.name", message)], str(policy))
        spec = chosen.model
    costs = _cost_model(spec, image_size, batch_size, optimizer)
    content = _content(model, costs, chosen)
    if as_json:
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
        return
    console = Console()
    baseline = costs.cost(Policy())
    console.print(_units_table(content, baseline, batch_size, optimizer))
    if chosen is not None:
        console.print(_policy_table(baseline, costs.cost(chosen)))


def _cost_model(spec: Any, image_size: int | None, batch_size: int, optimizer: str) -> CostModel:
    from dataclasses import replace

    import torch

    from rlsearch.model_graph import example_shape
    from rlsearch.training.cost import CostModel
    from rlsearch.training.models import build_spec, default_image_size

    with torch.device("meta"):
        model = build_spec(replace(spec, weights=None))
    size = image_size or default_image_size(spec.name)
    shape = example_shape(model)[1:] if size is None else (3, size, size)
    return CostModel(model, shape, batch_size, optimizer)


def _content(name: str, costs: CostModel, policy: Policy | None) -> dict[str, Any]:
    """What ``--json`` prints."""
    from dataclasses import asdict

    from rlsearch.policy import Policy
    from rlsearch.replacement import BLOCKS

    baseline = costs.cost(Policy())
    content: dict[str, Any] = {"model": name, "params": baseline.params, "cost": asdict(baseline)}
    content["units"] = [
        {
            "name": unit.name,
            "chain": unit.chain,
            "role": unit.role,
            "sources": unit.sources,
            "params": unit.num_params,
            "blocks": {block: _saving(costs, baseline, unit.name, block) for block in BLOCKS},
        }
        for unit in costs.units
    ]
    if policy is not None:
        content["policy"] = {"hash": policy.hash, "cost": asdict(costs.cost(policy))}
    return content


def _saving(costs: CostModel, baseline: Cost, unit: str, block: str) -> dict[str, Any]:
    from rlsearch.policy import Policy, Replacement

    reason = costs.fits(unit, block)
    if reason is not None:
        return {"fits": False, "reason": reason}
    cost = costs.cost(Policy(replacements=(Replacement(unit, block),)))
    return {
        "fits": True,
        "params_saved": baseline.params - cost.params,
        "memory_saved": baseline.memory - cost.memory,
        "forward_flops_saved": baseline.forward_flops - cost.forward_flops,
        "step_flops_saved": baseline.step_flops - cost.step_flops,
    }


def _units_table(content: dict[str, Any], baseline: Cost, batch_size: int, optimizer: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"{content['model']}: {baseline.params:,} parameters\n"
        f"an image: {baseline.forward_flops / _MEGA:,.1f} MFLOP forward, {baseline.step_flops / _MEGA:,.1f} a step\n"
        f"a step of {batch_size} images with {optimizer}: {baseline.memory / _MEGA:,.1f} MB predicted",
        caption="a block saves % of the whole model's parameters/memory/FLOPs of a step\n"
        "– where it does not fit (--json says why, and names the sources)",
        box=SIMPLE_HEAD,
    )
    blocks = list(content["units"][0]["blocks"])
    table.add_column("unit", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    for block in blocks:
        table.add_column(block, justify="right", no_wrap=True)
    for unit in content["units"]:
        cells = [_saving_cell(unit["blocks"][block], baseline) for block in blocks]
        table.add_row(unit["name"], f"{unit['params']:,}", *cells)
    return table


def _saving_cell(saving: dict[str, Any], baseline: Cost) -> str:
    if not saving["fits"]:
        return "–"
    shares = (
        100 * saving["params_saved"] / baseline.params,
        100 * saving["memory_saved"] / baseline.memory,
        100 * saving["step_flops_saved"] / baseline.step_flops,
    )
    # One decimal where it tells something; "+ 0.0" turns a negative zero into zero.
    return "/".join(f"{share:.0f}" if share >= 10 else f"{round(share, 1) + 0.0:.1f}" for share in shares)


def _policy_table(baseline: Cost, cost: Cost) -> Table:
    from rich.table import Table

    table = Table(title="the policy beside the baseline (before any layer is dropped)")
    for column in ("", "baseline", "policy", "saved"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "learnable parameters": (baseline.params, cost.params, 1, ""),
        "predicted memory": (baseline.memory, cost.memory, _MEGA, " MB"),
        "forward of an image": (baseline.forward_flops, cost.forward_flops, _MEGA, " MFLOP"),
        "step of an image": (baseline.step_flops, cost.step_flops, _MEGA, " MFLOP"),
    }
    for name, (before, after, unit, suffix) in rows.items():
        digits = 0 if unit == 1 else 1
        saved = f"{100 * (1 - after / before):.1f} %"
        table.add_row(name, f"{before / unit:,.{digits}f}{suffix}", f"{after / unit:,.{digits}f}{suffix}", saved)
    return table
