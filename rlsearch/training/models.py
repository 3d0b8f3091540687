"""Models by name: CIFAR ResNets, torchvision's ResNets, and a user's own ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from rlsearch.errors import ModelError, suggestion
from rlsearch.policy import ModelSpec
from rlsearch.training.cifar_resnet import CifarResNet
from rlsearch.training.weights import load_initial_weights


@dataclass(frozen=True)
class BuiltIn:
    """A model known by name.

    Attributes:
        build: called with ``num_classes`` and the model's kwargs.
        image_size: the side of the images that it is usually trained on.
        kwargs: the kwargs that it takes, with their types.
        torchvision_weights: whether torchvision has named weights for it.
    """

    build: Callable[..., nn.Module]
    image_size: int
    kwargs: Mapping[str, type] = field(default_factory=dict)
    torchvision_weights: bool = False


def _torchvision_resnet(name: str, num_classes: int, small_stem: bool = False, **kwargs: Any) -> nn.Module:
    """torchvision's ResNet; ``small_stem`` gives it a 3x3 stem of stride 1 and no max-pool, for small images."""
    import torchvision  # takes a second to import, which the CIFAR models need not pay

    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=num_classes, **kwargs)
    if small_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


_TORCHVISION_KWARGS = {"small_stem": bool, "zero_init_residual": bool, "groups": int, "width_per_group": int}

# The one place to add a model.
MODELS: dict[str, BuiltIn] = {
    **{f"resnet{depth}": BuiltIn(partial(CifarResNet, depth), 32) for depth in (20, 32, 56, 110)},
    **{
        name: BuiltIn(partial(_torchvision_resnet, name), 224, _TORCHVISION_KWARGS, torchvision_weights=True)
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    },
}


def known_models() -> list[str]:
    """The names that `build_model` knows, smallest model first; ``package.module:factory`` is known besides."""
    return sorted(MODELS, key=lambda name: int(name.removeprefix("resnet")))


def default_image_size(name: str) -> int | None:
    """The side of the images that a model is usually trained on; None for a user's own and for unknown names."""
    return MODELS[name].image_size if name in MODELS else None


def build_model(
    name: str, num_classes: int = 10, weights: str | None = None, *, download: bool = False, **kwargs: Any
) -> nn.Module:
    """A model in training mode on the CPU, started from torch's global random state or from ``weights``.

    Args:
        name: one of `known_models`, or ``package.module:factory``. That is code which is imported and called with
            ``num_classes`` and ``kwargs``: pass only a name that the user's own command gave.
        num_classes: the width of the classifier's output.
        weights: None (from scratch), a local ``.safetensors`` file or torch file that loads with ``weights_only``, or
            a name of torchvision's weights (``IMAGENET1K_V1``, ``DEFAULT``). A classifier of another width keeps its
            random start; everything else must fit exactly.
        download: whether named weights that are not on this machine yet may be fetched.
        kwargs: further arguments of the constructor, as ``small_stem`` for torchvision's ResNets.

    Raises:
        ModelError: an unknown name, kwargs that the model does not take, a factory that cannot be imported or
            returns no module, weights that cannot be read or do not fit.
    """
    if num_classes < 1:
        raise ModelError(f"num_classes must be at least 1, got {num_classes}")
    has_named_weights = name in MODELS and MODELS[name].torchvision_weights
    if ":" in name:
        model = _build_from_factory(name, num_classes, kwargs)
    elif name in MODELS:
        model = _build_built_in(name, num_classes, kwargs)
    else:
        raise ModelError(f"unknown model {name!r}{suggestion(name, MODELS)} (or name your own: package.module:factory)")
    if weights is not None:
        load_initial_weights(model, weights, name if has_named_weights else None, num_classes, download=download)
    return model


def build_spec(spec: ModelSpec) -> nn.Module:
    """The model of a `ModelSpec`; see `build_model`.

    Raises:
        ModelError: as `build_model`, or for kwargs that are settings of the spec itself.
    """
    misplaced = [key for key in ("name", "num_classes", "weights", "download") if key in spec.kwargs]
    if misplaced:
        raise ModelError(f"kwargs of model {spec.name!r}: {', '.join(misplaced)} belong beside kwargs, not into them")
    return build_model(spec.name, spec.num_classes, spec.weights, download=spec.download, **spec.kwargs)


def _build_built_in(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    known = MODELS[name].kwargs
    wrong = []
    for key, value in kwargs.items():
        if key not in known:
            wrong.append(f"{key!r} is unknown{suggestion(key, known)}")
        elif type(value) is not known[key]:
            kind = "true or false" if known[key] is bool else "a whole number"
            wrong.append(f"{key!r} must be {kind}, got {value!r}")
    if wrong:
        takes = "" if known else " (it takes none)"
        raise ModelError(f"kwargs of model {name!r}{takes}: {'; '.join(wrong)}")
    try:
        return MODELS[name].build(num_classes=num_classes, **kwargs)
    except (ValueError, ArithmeticError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"model {name!r} cannot be built with kwargs {dict(kwargs)}: {error}") from error


def _build_from_factory(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
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
