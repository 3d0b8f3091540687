"""The outputs of a dropped prefix, kept so that it need not run again.

Storing them is our reading of Learn&Drop's "reducing the number of operations performed by the network in the forward
propagation" (arXiv 2604.23403): reconstruction.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Module = Callable[[Tensor], Tensor]


class FeatureCache:
    """V fixed views an image of a prefix's output, all in one tensor on the device.

    Four-dimensional features are kept with the channels last, so that a gathered batch is in the layout that
    convolutions are fastest in, with no copy.

    Args:
        num_images: how many images there are.
        num_views: V.
        feature_shape: of one image's features, (C, H, W) or anything else.
        dtype: of the features.
        device: where they are kept.
    """

    def __init__(
        self, num_images: int, num_views: int, feature_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.feature_shape = feature_shape
        self.values = torch.empty((num_views, num_images, *self._stored(feature_shape)), dtype=dtype, device=device)

    @property
    def num_views(self) -> int:
        """V."""
        return self.values.shape[0]

    @property
    def num_images(self) -> int:
        """How many images are kept."""
        return self.values.shape[1]

    def batch(self, indices: Tensor, views: Tensor) -> Tensor:
        """The features of ``indices`` (B,), each in its view of ``views`` (B,): (B, *feature_shape)."""
        return self._loaded(self.values[views, indices])

    def write(self, view: int, start: int, features: Tensor) -> None:
        """Keeps ``features`` (B, *feature_shape) of one view, from image ``start`` on."""
        if features.ndim == 4:
            features = features.permute(0, 2, 3, 1)
        self.values[view, start : start + len(features)] = features

    def advanced(self, module: Module, feature_shape: tuple[int, ...], batch_size: int) -> FeatureCache:
        """The cache after the cut has moved on: ``module`` leads from the old cut to the new one.

        The images are not needed again.
        """
        moved = FeatureCache(self.num_images, self.num_views, feature_shape, self.values.dtype, self.values.device)
        for view in range(self.num_views):
            for start in range(0, self.num_images, batch_size):
                old = self._loaded(self.values[view, start : start + batch_size])
                moved.write(view, start, module(old))
        return moved

    @staticmethod
    def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[1:], shape[0]) if len(shape) == 3 else shape

    def _loaded(self, values: Tensor) -> Tensor:
        return values.permute(0, 3, 1, 2) if len(self.feature_shape) == 3 else values


def num_bytes(num_images: int, num_views: int, feature_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The memory that a cache takes."""
    size = num_images * num_views * dtype.itemsize
    for extent in feature_shape:
        size *= extent
    return size


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device`` (host memory for the CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        # Other systems do not say what is available; half of what there is, is a careful guess.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024
