"""torchvision's classification models by name. torchvision is imported only when a model of it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, get_args

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rlsearch.errors import ModelError
from rlsearch.training.model_kwargs import check_kwargs

# The models that help texts and suggestions name, so that nothing need be imported for them.
NAMED = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11_bn", "vgg16", "vgg16_bn"),
    *("vit_b_16", "vit_l_16", "convnext_tiny", "swin_t", "regnet_y_400mf", "mobilenet_v2", "densenet121"),
)
_DEFAULT_SIZE = 224

# Parameters without a default that the builders take out of their kwargs, and give one.
_DEFAULTED = ("image_size", "input_size", "dropout", "stochastic_depth_prob")
_SCALARS = (bool, int, float, str)


@cache
def names() -> frozenset[str]:
    """All of torchvision's classification models."""
    import torchvision  # takes seconds to import, which the CIFAR models need not pay

    return frozenset(torchvision.models.list_models(module=torchvision.models))


def default_image_size(name: str) -> int:
    """The smallest side of images that one of the model's named weights was trained on; 224 without such weights."""
    if name in NAMED:
        return _DEFAULT_SIZE
    import torchvision

    members = torchvision.models.get_model_weights(name)
    return min((entry.transforms.keywords.get("crop_size", _DEFAULT_SIZE) for entry in members), default=_DEFAULT_SIZE)


def build(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model of torchvision with random weights.

    The kwargs are those of the constructor that can be written in a policy, besides ``image_size`` for ViTs,
    ``small_stem`` for ResNets (a 3x3 stem of stride 1 and no max-pool, for small images) and ``small_head`` for VGGs
    (global average pooling and one linear layer). Inception v3 and GoogLeNet are built without their auxiliary
    classifiers; their named weights expect ``transform_input: true``.

    Raises:
        ModelError: kwargs that the model does not take.
    """
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    signature = inspect.signature(builder)
    known, fixed = _known_kwargs(signature.return_annotation)
    check_kwargs(name, kwargs, known, fixed)
    given = {key: value for key, value in kwargs.items() if key not in ("small_stem", "small_head")}
    if "aux_logits" in known:
        given = {"aux_logits": False, "init_weights": True} | given
        if given["aux_logits"]:
            raise ModelError(
                f"kwargs of model {name!r}: 'aux_logits' must be left out: one output is trained, not three"
            )
    small_head = bool(kwargs.get("small_head"))
    if small_head and "dropout" in kwargs:
        raise ModelError(f"kwargs of model {name!r}: 'dropout' has no place in a small_head; leave one of the two out")
    try:
        if small_head:
            return _vgg_with_small_head(builder, num_classes, given)
        model = _build(builder, num_classes, given)
    except Exception as error:  # the constructors assert, and raise whatever a wrong value leads to
        raise ModelError(f"model {name!r} cannot be built with kwargs {dict(kwargs)}: {error}") from error
    if kwargs.get("small_stem"):
        _make_stem_small(model)
    return model


def _known_kwargs(kind: type[nn.Module]) -> tuple[dict[str, tuple[type, ...]], set[str]]:
    """What a constructor takes, with the types where these are plain values; and what the model's name decides."""
    known: dict[str, tuple[type, ...]] = {}
    fixed = set()
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD or parameter.name == "num_classes":
            continue
        if parameter.default is parameter.empty and parameter.name not in _DEFAULTED:
            fixed.add(parameter.name)
        elif not any(word in str(parameter.annotation) for word in ("Callable", "torchvision")):
            scalars = (parameter.annotation, *get_args(parameter.annotation))
            known[parameter.name] = tuple(scalar for scalar in _SCALARS if scalar in scalars)
    if kind.__name__ == "ResNet":
        known["small_stem"] = (bool,)
    if kind.__name__ == "VGG":
        known["small_head"] = (bool,)
    return known, fixed


class _ListsOnCpu(TorchFunctionMode):
    """Makes index tensors on the CPU, whatever the default device is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _build(builder: Callable[..., nn.Module], num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    # RegNet computes its widths with tensors and reads them back, which it cannot on the meta device.
    mode = _ListsOnCpu() if builder.__name__.startswith("regnet") else nullcontext()
    with mode:
        return builder(weights=None, num_classes=num_classes, **kwargs)


def _make_stem_small(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _vgg_with_small_head(builder: Callable[..., nn.Module], num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """A VGG whose 120 million parameters of the usual classifier are never allocated; it starts as torchvision's do."""
    with torch.device("meta"):
        model = builder(weights=None, num_classes=num_classes, **kwargs)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, num_classes)
    model.to_empty(device=torch.get_default_device())
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model
