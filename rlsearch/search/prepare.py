"""Looks at the model and the data of a search space before anything is started or written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsearch.errors import ConfigError
from rlsearch.policy import Policy
from rlsearch.search.check import build_unallocated, check_space, check_streamed
from rlsearch.search.costs import ExactCosts, HardConstraints
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.sampler import PolicySampler
from rlsearch.search.space import SearchSpace
from rlsearch.search.start_design import check_trials
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.models import build_spec


@dataclass(frozen=True)
class Prepared:
    """A search whose space, model and data have been looked at and found good.

    Attributes:
        space: with the data's number of classes.
        data: the images.
        policies: what the space offers.
        sampler: proposes policies.
        costs: of the model.
    """

    space: SearchSpace
    data: ImageData
    policies: PolicySpace
    sampler: PolicySampler
    costs: ExactCosts

    @property
    def data_bytes(self) -> int:
        """What the images take."""
        return self.data.num_bytes


def prepare(space: SearchSpace, address: str = "local") -> Prepared:
    """Looks at the model and the data of a search space; nothing is written but torchvision's cache.

    Raises:
        UserError: something is wrong with one of them.
    """
    problems = check_space(space)
    if problems:
        raise ConfigError(problems, "search space")
    data = load_data(space.data)
    if data.is_streamed:
        problems = check_streamed(space)
        if problems:
            raise ConfigError(problems, "search space")
    space = space.with_num_classes(data.num_classes)
    if space.model.weights is not None:
        build_spec(space.model)  # fetches them once, before many workers would
    model = build_unallocated(space)
    # A driver on a cluster's head may have no GPU itself: there the search space's word counts.
    asked, has_gpu = space.resources.gpu, torch.cuda.is_available()
    on_gpu = asked != 0 and (has_gpu or (address != "local" and asked is not None))
    costs = ExactCosts(model, data.input_shape, "cuda" if on_gpu else "cpu", space.resources.workers)
    baseline = Policy(space.model)
    constraints = HardConstraints(space.constraints, costs, baseline, space.training)
    policies = PolicySpace(space, model, data.input_shape)
    check_trials(policies, constraints)
    costs.cost(baseline, space.training)  # a model that cannot be costed should be told now
    return Prepared(space, data, policies, PolicySampler(policies, constraints, costs), costs)
