"""A user's own model, named ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rlsearch.errors import ModelError, suggestion


def build_from_factory(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """What the factory returns, in training mode. Its module is imported and run.

    Raises:
        ModelError: it cannot be imported or called so, fails, or returns no module.
    """
    factory = _import_factory(name)
    _check_call(factory, name, num_classes, kwargs)
    try:
        model = factory(num_classes=num_classes, **kwargs)
    except Exception as error:
        raise ModelError(f"model factory {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model factory {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model.train()


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ModelError(f"a model of your own is named package.module:factory, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        remedy = "run from the folder that holds it, or put that folder on PYTHONPATH"
        raise ModelError(
            f"module {module_name!r} of model {name!r} cannot be imported ({type(error).__name__}: {error}); {remedy}"
        ) from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            names = [known for known in vars(module) if not known.startswith("_") and callable(vars(module)[known])]
            raise ModelError(f"module {module_name!r} has no {attribute!r}{suggestion(attribute, names)}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ModelError(f"model {name!r} must be callable, got {type(factory).__name__}")
    return factory  # type: ignore[no-any-return]  # callable() does not narrow Any


def _check_call(factory: Callable[..., Any], name: str, num_classes: int, kwargs: Mapping[str, Any]) -> None:
    """Names the kwargs that do not fit before anything of the user's runs."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some callables written in C have no signature; the call itself will tell
        return
    try:
        signature.bind(num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise ModelError(
            f"model factory {name!r} cannot be called with num_classes and kwargs {sorted(kwargs)}: {error}; "
            f"its signature is {signature}"
        ) from None
