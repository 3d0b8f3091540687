"""What a dropper is given is what it can work with; every refusal says what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlsearch.config import typed
from rlsearch.errors import ConfigError, ModelError, Problem, suggestion
from rlsearch.model_graph import outermost
from rlsearch.policy import LearnDrop
from rlsearch.replacement import SurgeryReport, find_units
from rlsearch.replacement.fitting import is_replaced


def check_settings(settings: LearnDrop, epochs: int) -> None:
    """Raises ConfigError with everything that is out of range."""
    problems = settings.problems()
    whole = typed(epochs, int, "epochs", problems)
    if whole is not None and whole < 1:
        problems.append(Problem("epochs", f"must be at least 1, got {epochs}"))
    if problems:
        raise ConfigError(problems, "learn_drop")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises ModelError for an optimizer that layers cannot be taken out of."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ModelError(
            "learn_drop: LBFGS keeps all parameters in one flat list, so that no layer can leave it; "
            "use an optimizer with a state for each parameter, as SGD or AdamW"
        )
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise ModelError(f"learn_drop: {name} has no param_groups and state to take dropped layers out of")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ModelError(
            f"learn_drop: {name} holds none of the parameters of {type(model).__name__}; make the optimizer of this "
            "model's parameters, after `rlsearch.apply_policy`"
        )


def unit_names(
    model: nn.Module, units: Sequence[str] | None, report: SurgeryReport | None, example_input: Tensor | None
) -> list[str]:
    """The model's units in forward order: those that are given, else those that are found.

    Raises:
        ModelError: there are none, or none of that name, or replaced units of which nothing is told.
    """
    if is_replaced(model) and not (report and report.replaced):
        raise ModelError(
            f"learn_drop: {type(model).__name__} has replaced units; pass report=, what `rlsearch.apply_policy` gave, "
            "so that none leaves before the units that it borrows from"
        )
    names = list(units or (report.units if report else ()))
    known = dict(model.named_modules())
    # Parts of units are not looked for: of a skipped unit there are none any more.
    for name in dict.fromkeys(outermost(names).values()):
        if name not in known:
            raise ModelError(
                f"learn_drop: units: {type(model).__name__} has no module {name!r}{suggestion(name, known)}"
            )
    try:
        return names or [unit.name for unit in find_units(model, example_input)]
    except ModelError as error:
        raise ModelError(
            f"learn_drop: {error}\nto drop layers of it all the same, name them in forward order: units=[...]"
        ) from error
