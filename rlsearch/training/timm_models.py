"""timm's models by name, where timm is installed (the extra ``timm``). It is imported only when a name asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from rlsearch.errors import ModelError

ALIASES = {f"deit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
_DEFAULT_SIZE = 224
# What would load weights, or read other files, past the setting `weights`.
_REFUSED = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes")


@cache
def names() -> frozenset[str]:
    """All of timm's models and the aliases; none where timm is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        return frozenset()
    return frozenset(timm.list_models()) | frozenset(ALIASES)


def default_image_size(name: str) -> int:
    """The side of the images that the model is usually trained on."""
    import timm

    config = timm.get_pretrained_cfg(ALIASES.get(name, name))
    return int(config.input_size[-1]) if config is not None else _DEFAULT_SIZE


def build(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model of timm with random weights; the kwargs are those of ``timm.create_model``.

    Raises:
        ModelError: kwargs that the model does not take.
    """
    import timm

    wrong = [key for key in _REFUSED if key in kwargs]
    if wrong:
        raise ModelError(
            f"kwargs of model {name!r}: {', '.join(wrong)} cannot be given here; initial weights are given by weights"
        )
    try:
        model = timm.create_model(ALIASES.get(name, name), pretrained=False, num_classes=num_classes, **kwargs)
    except Exception as error:  # timm's constructors assert, and raise whatever a wrong value leads to
        raise ModelError(f"model {name!r} cannot be built with kwargs {dict(kwargs)}: {error}") from error
    assert isinstance(model, nn.Module)
    return model.train()
