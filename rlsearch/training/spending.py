"""What a trial spends: predicted from its cost model at every cut, and summed up as its epochs go by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from rlsearch.policy import ModelSpec, Policy
from rlsearch.training.cost import CostModel
from rlsearch.training.feature_inputs import CacheWork
from rlsearch.training.models import build_spec
from rlsearch.training.sizes import Sizes


@dataclass
class _Sums:
    """What adds up over a trial; part of its checkpoint."""

    num_images: int = 0
    train_seconds: float = 0.0
    train_flops: float = 0.0
    forward_flops: float = 0.0
    # Learnable parameters times the images that were trained on with them.
    learned: int = 0
    memory: int = 0


class Spending:
    """Operations, memory and learnable parameters of one trial.

    Args:
        costs: of the untouched model.
        policy: what is replaced by what.

    Attributes:
        cost: of the policy, before anything is dropped.
        sums: what has been spent so far.
    """

    def __init__(self, costs: CostModel, policy: Policy) -> None:
        self.cost = costs.cost(policy)
        self.sums = _Sums()
        self._costs = costs
        self._policy = policy
        self._untouched_flops = costs.cost(Policy()).forward_flops

    @property
    def forward_share(self) -> float:
        """Forward operations as a share of what the untouched model would have spent on the same images."""
        return self.sums.forward_flops / (self._untouched_flops * self.sums.num_images)

    @property
    def mean_learnable_params(self) -> float:
        """Learnable parameters, averaged over the images trained on."""
        return self.sums.learned / self.sums.num_images

    def step_memory(self, model: nn.Module, cut: int, *, stored: bool) -> int:
        """Predicted bytes of a training step at a cut, without what lies stored for it.

        Args:
            model: as it trains: what of it still learns counts.
            cut: how many segments have left.
            stored: whether their output is read rather than computed.
        """
        return self._costs.memory_at(self._policy, cut, Sizes.of(model), stored=stored)

    def add_epoch(self, num_images: int, learnable_params: int, cut: int, *, stored: bool) -> None:
        """Counts the steps of an epoch, which were all made at one cut."""
        forward, step = self._costs.image_flops(self._policy, cut)
        prefix = 0.0 if stored else self._costs.forward_flops(self._policy, 0, cut)
        self.sums.num_images += num_images
        self.sums.learned += learnable_params * num_images
        self.sums.forward_flops += (forward + prefix) * num_images
        self.sums.train_flops += (step + prefix) * num_images

    def add_cache(self, work: CacheWork) -> None:
        """Counts the forward passes that filled a cache of features."""
        spent = work.num_images * self._costs.forward_flops(self._policy, work.start, work.end)
        self.sums.forward_flops += spent
        self.sums.train_flops += spent

    def state_dict(self) -> dict[str, Any]:
        """Plain types, from which `load_state_dict` goes on."""
        return asdict(self.sums)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the sums back."""
        self.sums = _Sums(**state)


def costs_of(
    model: ModelSpec, batch_size: int, input_shape: Sequence[int], optimizer: str, precision: str
) -> CostModel:
    """The costs of a model by its description, nothing allocated.

    They are the same for every trial of a search: a process that runs many of them looks once.
    """
    return _costs_of(json.dumps(asdict(model), sort_keys=True), tuple(input_shape), batch_size, optimizer, precision)


@lru_cache(maxsize=8)
def _costs_of(model: str, input_shape: tuple[int, ...], batch_size: int, optimizer: str, precision: str) -> CostModel:
    with torch.device("meta"):
        untouched = build_spec(replace(ModelSpec(**json.loads(model)), weights=None))
    return CostModel(untouched, input_shape, batch_size, optimizer, precision)
