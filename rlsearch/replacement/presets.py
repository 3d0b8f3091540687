"""The published forms of Replacement Learning, as policies for any model.

``v1`` is the first version (arXiv 2410.01239), as far as it is published: every fourth layer becomes a P + b N, in
transformers the self-attention layers alone. A layer that its neighbours do not fit stays as it is; where that goes for
all of them, the tensors that fit are replaced (``boundary: keep``), as in ResNet-20. What else the papers leave open
stands at the options of the block.

``v2`` is our reading of the second version (arXiv 2605.19533), a reconstruction: every fourth layer, attention and MLP
each counted for itself in transformers, gives way to one computing layer (``operator: single``) where one layer can
stand in, else to one of its own structure; its parameters are the neighbours' with their channels mapped (`project`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rlsearch.errors import ModelError, suggestion
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement.fitting import fits
from rlsearch.replacement.units import Unit, find_units

_PERIOD = 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_V1_FORMS: Sequence[Mapping[str, Any]] = ({}, {"boundary": "keep"})
_V2_FORMS: Sequence[Mapping[str, Any]] = (
    {"operator": "single", "boundary": "project"},
    {"operator": "same", "boundary": "project"},
    # A bottleneck's narrow layers are too small for maps of the usual rank.
    {"operator": "same", "boundary": "project", "rank": 1, "boundary_rank": 1},
)


def preset(name: str, model: nn.Module, example_input: Tensor | None = None) -> Policy:
    """The policy of a published form for ``model``, bound to no model's name.

    Args:
        name: ``v1`` or ``v2``.
        model: an untouched model; neither changed nor run.
        example_input: for finding its units, see `rlsearch.find_units`.

    Raises:
        ModelError: an unknown name; a model without units; or one in which the form has nothing to replace.
    """
    if name not in _PRESETS:
        raise ModelError(f"unknown preset {name!r}{suggestion(name, _PRESETS)}")
    units = find_units(model, example_input)
    replacements = _PRESETS[name](model, units)
    if not replacements:
        raise ModelError(f"preset {name} replaces nothing in {type(model).__name__}: {_why_nothing(model, units)}")
    return Policy(replacements=tuple(replacements), provenance={"preset": name})


def _v1(model: nn.Module, units: Sequence[Unit]) -> list[Replacement]:
    attention = [unit for unit in units if _is_attention(model, unit)]
    layers = attention or [unit for unit in units if unit.role == "block"]
    chosen = [unit.name for unit in layers[_PERIOD - 1 :: _PERIOD]]
    for options in _V1_FORMS:
        found = [unit for unit in chosen if fits(model, units, unit, "scalar", options) is None]
        if found:
            return [Replacement(unit, "scalar", options) for unit in found]
    return []


def _v2(model: nn.Module, units: Sequence[Unit]) -> list[Replacement]:
    has_attention = any(_is_attention(model, unit) for unit in units)
    roles = dict.fromkeys(unit.role for unit in units if (unit.role == "block") != has_attention)
    found = []
    for role in roles:
        layers = [unit for unit in units if unit.role == role]
        for unit in layers[_PERIOD - 1 :: _PERIOD]:
            form = next((form for form in _V2_FORMS if fits(model, units, unit.name, "project", form) is None), None)
            if form is not None:
                found.append(Replacement(unit.name, "project", form))
    return found


_PRESETS: Mapping[str, Callable[[nn.Module, Sequence[Unit]], list[Replacement]]] = {"v1": _v1, "v2": _v2}


def _is_attention(model: nn.Module, unit: Unit) -> bool:
    """Whether a part of a unit is its attention, by what its class or its role is called."""
    name = f"{type(model.get_submodule(unit.name)).__name__} {unit.role}"
    return unit.role != "block" and _ATTENTION.search(name) is not None


def _why_nothing(model: nn.Module, units: Sequence[Unit]) -> str:
    """What stands against the units that were to be replaced."""
    attention = [unit for unit in units if _is_attention(model, unit)]
    chosen = (attention or [unit for unit in units if unit.role == "block"])[_PERIOD - 1 :: _PERIOD]
    if not chosen:
        return f"it has {len(attention) or len(units)} units, and every {_PERIOD}th is to be replaced"
    reasons = [fits(model, units, unit.name, "scalar") for unit in chosen]
    return "no unit of every fourth fits (" + "; ".join(reason for reason in reasons if reason) + ")"
