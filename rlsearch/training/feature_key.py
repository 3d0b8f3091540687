"""What a file of stored features must be of, to be taken up again by the run that wrote it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from rlsearch.learn_drop.features import FeatureForm
from rlsearch.training.device_data import DeviceData
from rlsearch.training.feature_views import Views


def feature_key(
    form: FeatureForm, views: Views, data: DeviceData, model: nn.Module, *, run: str, cut: int, seed: int
) -> dict[str, Any]:
    """Everything that stored features depend on, as plain values.

    Args:
        form: what is stored.
        views: of which views.
        data: of which images, on which device.
        model: with its dropped prefix frozen and in eval mode, and the rest in training mode.
        run: names the training.
        cut: how many segments are dropped.
        seed: of the views.
    """
    device = data.device
    return {
        "run": run,
        "cut": cut,
        "form": asdict(form) | {"dtype": str(form.dtype)},
        "views": asdict(views),
        "seed": seed,
        "data": data.fingerprint(),
        "weights": _frozen_hash(model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


def _frozen_hash(model: nn.Module) -> str:
    """Of the parameters that are frozen and of the buffers of modules in eval mode."""
    frozen = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    for path, module in model.named_modules():
        if not module.training:
            frozen |= {f"{path}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
