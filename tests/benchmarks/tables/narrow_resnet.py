"""The model of the recorded table: ResNet-50 of the CIFAR kind (24 blocks), half as wide as published."""

from __future__ import annotations

from rlsearch.training.cifar_resnet import CifarResNet


def NarrowResNet(num_classes: int = 10) -> CifarResNet:
    """Named as the recorded policies name it."""
    return CifarResNet(50, num_classes, widths=(8, 16, 32))
