"""What ``rlsearch profile`` finds out, as ``--json`` prints it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from rlsearch.errors import ConfigError, Problem, SurgeryError, suggestion
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import BLOCKS, Unit
from rlsearch.training.cost import Cost, CostModel, LayerCost


def profile_content(
    name: str,
    setting: Mapping[str, Any],
    costs: CostModel,
    policy: Policy | None,
    pattern: str | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The profile of a model.

    Args:
        name: of the model.
        setting: the input shape, batch size and optimizer, to be shown with the costs.
        costs: of the model.
        policy: to be costed too.
        pattern: of the names of the units to be looked at; None for all.
        progress: is told what is being done.

    Raises:
        ConfigError: no unit's name matches the pattern.
        SurgeryError: the policy cannot be applied to the model.
    """
    units = _matching(costs, pattern)
    # A policy that does not fit should not be waited for.
    chosen = None if policy is None else _policy_content(costs, policy)
    baseline = costs.cost(Policy())
    content: dict[str, Any] = {"model": name, **setting, "params": baseline.params, "cost": asdict(baseline)}
    content["layers"] = [_layer_content(layer, baseline) for layer in costs.layers(Policy())]
    content["units"] = []
    for done, unit in enumerate(units):
        progress(f"trying the blocks in {unit.name} ({done + 1} of {len(units)} units)")
        content["units"].append(_unit_content(costs, baseline, unit))
    if chosen is not None:
        content["policy"] = chosen
    return content


def _layer_content(layer: LayerCost, baseline: Cost) -> dict[str, Any]:
    """What the stem, a unit, or the head has of the cost."""
    return asdict(layer) | {"peak_share": (layer.saved + layer.held) / baseline.memory}


def _matching(costs: CostModel, pattern: str | None) -> list[Unit]:
    units = [unit for unit in costs.units if pattern is None or fnmatchcase(unit.name, pattern)]
    if not units:
        hint = suggestion(str(pattern), [unit.name for unit in costs.units])
        raise ConfigError([Problem("--units", f"no unit's name matches {pattern!r}{hint}")], "profile")
    return units


def _unit_content(costs: CostModel, baseline: Cost, unit: Unit) -> dict[str, Any]:
    blocks = {}
    for name, kind in BLOCKS.items():
        blocks[name] = _saving(costs, baseline, unit.name, name, {})
        if "operator" in kind.options:
            blocks[name]["single"] = _saving(costs, baseline, unit.name, name, {"operator": "single"})
    return {
        "name": unit.name,
        "chain": unit.chain,
        "role": unit.role,
        "sources": unit.sources,
        "params": unit.num_params,
        "blocks": blocks,
    }


def _saving(costs: CostModel, baseline: Cost, unit: str, block: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a block saves that stands in for this unit alone."""
    try:
        cost = costs.cost(Policy(replacements=(Replacement(unit, block, options),)))
    except SurgeryError:
        return {"fits": False, "reason": costs.fits(unit, block, options)}
    return {
        "fits": True,
        "params_saved": baseline.params - cost.params,
        "memory_saved": baseline.memory - cost.memory,
        "forward_flops_saved": baseline.forward_flops - cost.forward_flops,
        "step_flops_saved": baseline.step_flops - cost.step_flops,
    }


def _policy_content(costs: CostModel, policy: Policy) -> dict[str, Any]:
    given = {item.unit: item for item in policy.replacements}
    units = [
        {
            "name": step.unit.name,
            "chain": step.unit.chain,
            "role": step.unit.role,
            "block": step.block,
            "options": dict(given[step.unit.name].options),
            "sources": step.sources,
        }
        for step in costs.plan(policy)
    ]
    return {"hash": policy.hash, "units": units, "cost": asdict(costs.cost(policy))}
