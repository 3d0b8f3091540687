"""The model of the recorded table: ResNet-50 of the CIFAR kind (24 blocks), half as wide as published."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rlsearch.training.cifar_resnet import BasicBlock

WIDTHS = (8, 16, 32)
BLOCKS = 8


class NarrowResNet(nn.Module):
    """A stem, three stages of eight blocks, and a linear classifier on the averaged features."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, 1)
        self.layer2 = _stage(first, second, 2)
        self.layer3 = _stage(second, third, 2)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(out_channels, out_channels) for _ in range(BLOCKS - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)
