"""Models by name: CIFAR nets, torchvision's and timm's models, and a user's own ``package.module:factory``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from rlsearch.errors import ModelError, suggestion
from rlsearch.policy import ModelSpec
from rlsearch.training import timm_models, torchvision_models
from rlsearch.training.cifar_resnet import CifarResNet
from rlsearch.training.model_factory import build_from_factory
from rlsearch.training.model_kwargs import check_kwargs
from rlsearch.training.weights import load_initial_weights


@dataclass(frozen=True)
class BuiltIn:
    """A model of our own.

    Attributes:
        build: called with ``num_classes`` and the model's kwargs.
        image_size: the side of the images that it is usually trained on.
        kwargs: the kwargs that it takes, with their types.
    """

    build: Callable[..., nn.Module]
    image_size: int
    kwargs: Mapping[str, tuple[type, ...]] = field(default_factory=dict)


def _vit_tiny(num_classes: int, image_size: int = 32, patch_size: int = 4, **kwargs: Any) -> nn.Module:
    """torchvision's VisionTransformer in the width of DeiT-Ti, for small images."""
    from torchvision.models import VisionTransformer  # takes seconds to import, which the CIFAR ResNets need not pay

    size = {"num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    model: nn.Module = VisionTransformer(image_size, patch_size, **size, num_classes=num_classes, **kwargs)
    return model


_VIT_KWARGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("image_size", "patch_size"), (int,)),
    **dict.fromkeys(("dropout", "attention_dropout"), (float,)),
}

# The one place to add a model of our own.
MODELS: dict[str, BuiltIn] = {
    **{f"resnet{depth}": BuiltIn(partial(CifarResNet, depth), 32) for depth in (20, 32, 56, 110)},
    "vit_tiny": BuiltIn(_vit_tiny, 32, _VIT_KWARGS),
}


def known_models() -> list[str]:
    """The names to show: our own models, then the usual ones of torchvision and timm.

    `build_model` knows every other classification model of torchvision, every model of timm where that is installed,
    and ``package.module:factory`` besides.
    """
    return [*MODELS, *torchvision_models.NAMED, *timm_models.ALIASES]


def default_image_size(name: str, kwargs: Mapping[str, Any] | None = None) -> int | None:
    """The side of the images that a model is usually trained on; None for a user's own and for unknown names.

    Args:
        name: see `build_model`.
        kwargs: of the model; an ``image_size`` or ``img_size`` among them decides.
    """
    for key in ("image_size", "img_size"):
        if kwargs and type(kwargs.get(key)) is int:
            return int(kwargs[key])
    if name in MODELS:
        return MODELS[name].image_size
    if ":" in name:
        return None
    if _is_torchvision(name):
        return torchvision_models.default_image_size(name)
    return timm_models.default_image_size(name) if name in timm_models.names() else None


def build_model(
    name: str, num_classes: int = 10, weights: str | None = None, *, download: bool = False, **kwargs: Any
) -> nn.Module:
    """A model in training mode on the CPU, started from torch's global random state or from ``weights``.

    Args:
        name: one of `known_models`, any other classification model of torchvision, any model of timm, or
            ``package.module:factory``; looked up in this order. The last is code which is imported and called with
            ``num_classes`` and ``kwargs``: pass only a name that the user's own command gave.
        num_classes: the width of the classifier's output.
        weights: None (from scratch), a local ``.safetensors`` file or torch file that loads with ``weights_only``, or
            a name of torchvision's weights, as ``IMAGENET1K_V1``. A classifier of another width keeps its
            random start; everything else must fit exactly.
        download: whether named weights that are not on this machine yet may be fetched.
        kwargs: further arguments of the constructor, as ``small_stem`` for torchvision's ResNets, ``small_head`` for
            its VGGs, ``image_size`` for its ViTs and ``img_size`` for timm's.

    Raises:
        ModelError: an unknown name, kwargs that the model does not take, a factory that cannot be imported or
            returns no module, weights that cannot be read or do not fit.
    """
    if num_classes < 1:
        raise ModelError(f"num_classes must be at least 1, got {num_classes}")
    from_torchvision = False
    if ":" in name:
        model = build_from_factory(name, num_classes, kwargs)
    elif name in MODELS:
        model = _build_built_in(name, num_classes, kwargs)
    elif _is_torchvision(name):
        model, from_torchvision = torchvision_models.build(name, num_classes, kwargs), True
    elif name in timm_models.names():
        model = timm_models.build(name, num_classes, kwargs)
    else:
        raise ModelError(_unknown(name))
    if weights is not None:
        load_initial_weights(model, weights, name if from_torchvision else None, num_classes, download=download)
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


def _is_torchvision(name: str) -> bool:
    return name in torchvision_models.NAMED or name in torchvision_models.names()


def _unknown(name: str) -> str:
    """The message for a name that is found nowhere; a near name is sought among the usual ones first."""
    if name in timm_models.ALIASES:
        return f'model {name!r} is one of timm, which is not installed: pip install "rlsearch[timm]"'
    near = suggestion(name, known_models())
    if "did you mean" not in near:
        further = suggestion(name, torchvision_models.names() | timm_models.names())
        near = further if "did you mean" in further else near
    elsewhere = "every other classification model of torchvision, every model of timm"
    if not _has_timm():
        elsewhere += ' (not installed: pip install "rlsearch[timm]")'
    return f"unknown model {name!r}{near} (known besides: {elsewhere}, and your own as package.module:factory)"


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def _build_built_in(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    check_kwargs(name, kwargs, MODELS[name].kwargs)
    try:
        return MODELS[name].build(num_classes=num_classes, **kwargs)
    except Exception as error:  # the constructors assert, and raise whatever a wrong value leads to
        raise ModelError(f"model {name!r} cannot be built with kwargs {dict(kwargs)}: {error}") from error
