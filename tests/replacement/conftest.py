"""Small models whose shapes are known, beside the real ResNet-32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlsearch.policy import Policy, Replacement
from rlsearch.training.models import build_model


@pytest.fixture
def resnet32() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet32")


@pytest.fixture(scope="session")
def untouched_resnet32() -> nn.Module:
    """For tests that only look."""
    return build_model("resnet32")


@pytest.fixture
def policy_of() -> Callable[..., Policy]:
    """A policy from unit=block or unit=(block, options), with dots in the units' names."""

    def make(replacements: dict[str, str | tuple[str, dict[str, object]]]) -> Policy:
        pairs = {unit: (given, {}) if isinstance(given, str) else given for unit, given in replacements.items()}
        return Policy(replacements=tuple(Replacement(unit, block, options) for unit, (block, options) in pairs.items()))

    return make


class ChainNet(nn.Module):
    """A chain of given units, and a mean over what follows the channels."""

    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.chain = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.chain(x)
        return out


@pytest.fixture
def chain_net() -> type[ChainNet]:
    return ChainNet
