"""A user's own model, named ``package.module:factory``: code, which runs only where the user's own command names it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import site
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from rlsearch.errors import ModelError, suggestion


def check_named(name: str, named: str | None, source: str) -> None:
    """Whether the model that a file names may be built: code that comes out of a file must be named by the user too.

    Args:
        name: of the model, as the file has it.
        named: what the user's own command gave with ``--model``, if anything.
        source: what names the model, for messages.

    Raises:
        ModelError: the user gave another name, or none for a model that is code.
    """
    if named is not None and named != name:
        raise ModelError(f"--model is {named!r}, but the model of {source} is {name!r}")
    if named is None and ":" in name:
        raise ModelError(f"the model of {source} is code, {name!r}: if you trust it, add --model {name}")


def naming_option(name: str) -> str:
    """What a command takes to let this model run, with a space before it; empty for one that is no code."""
    return f" --model {name}" if ":" in name else ""


def is_installed_code(name: str) -> bool:
    """Whether a name leads into an installed package or Python itself, and not to what lies in the user's own folders.

    Installed packages hold functions that fetch and run whatever their arguments say. Nothing is imported.
    """
    top = name.partition(":")[0].partition(".")[0]
    if ":" not in name or not top.isidentifier():
        return False
    found = importlib.util.find_spec(top)
    if found is None:
        return False  # importing it will tell
    places = [*(found.submodule_search_locations or ()), *([found.origin] if found.has_location else [])]
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots = [Path(path).resolve() for path in (*installed, *site.getsitepackages(), site.getusersitepackages())]
    files = [Path(place).resolve() for place in places if place is not None]
    return top == "rlsearch" or not files or any(root in file.parents for file in files for root in roots)


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
        if isinstance(factory, ModuleType):
            raise ModelError(f"model {name!r}: {part!r} is a module; a module's name stands before the colon")
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
