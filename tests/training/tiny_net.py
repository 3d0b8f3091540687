"""A net so small that a training of it takes a second; trainings name it ``tiny_net:make``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class TinyNet(nn.Module):
    """A stem, four units and a head."""

    def __init__(self, num_classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.units = nn.Sequential(*(_unit(8, norm) for _ in range(4)))
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.units(self.stem(images))
        return self.head(features.mean((2, 3)))


def make(num_classes: int) -> TinyNet:
    return TinyNet(num_classes)


def make_with_dropout(num_classes: int) -> nn.Module:
    """Batch norm, and random numbers in the forward pass."""
    net = TinyNet(num_classes)
    net.units.append(nn.Dropout(0.2))
    return net


def make_without_batch_norm(num_classes: int) -> TinyNet:
    """What an image gives does not depend on the others of its batch."""
    return TinyNet(num_classes, lambda width: nn.GroupNorm(2, width))


def _unit(width: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
