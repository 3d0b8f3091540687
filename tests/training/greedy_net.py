"""A model that asks for a petabyte: in training, where that is foreseen, or in evaluation, where it is not."""

from __future__ import annotations

from torch import Tensor, nn

from rlsearch import build_model


class Greedy(nn.Module):
    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self._in_training = in_training

    def forward(self, images: Tensor) -> Tensor:
        if self.training == self._in_training:
            images = images + images.new_empty(2**50).sum()
        return images


def build(num_classes: int, in_training: bool) -> nn.Module:
    return nn.Sequential(Greedy(in_training), build_model("resnet20", num_classes))
