"""What a policy costs exactly, before it trains: what hard constraints are checked against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from rlsearch.policy import Policy
from rlsearch.search.constraints import EXACT_METRICS, Constraint
from rlsearch.training.cost import Cost, CostModel
from rlsearch.training.distributed import largest_share
from rlsearch.training.loop import TrainingSpec, resolve_precision


class ExactCosts:
    """The costs of policies of one model, whatever their batch size and optimizer.

    Args:
        model: the untouched model.
        input_shape: (C, H, W) of one image.
        device: where trials run (``cpu``, ``cuda``): it decides the precision, and whether ``memory`` is known exactly.
        workers: how many processes train one trial together: memory is that of one, with its part of a batch.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int], device: str = "cpu", workers: int = 1) -> None:
        self._model = model
        self._input_shape = tuple(input_shape)
        self._device = torch.device(device)
        self._workers = workers
        self._models: dict[tuple[int, str, str], CostModel] = {}

    def cost(self, policy: Policy, training: TrainingSpec) -> Cost:
        """The cost of one training step of ``policy``, nothing dropped."""
        precision = resolve_precision(training.precision, self._device)
        key = (largest_share(training.batch_size, self._workers), training.optimizer, precision)
        if key not in self._models:
            self._models[key] = CostModel(self._model, self._input_shape, *key)
        return self._models[key].cost(policy)

    def metrics(self, policy: Policy, training: TrainingSpec) -> dict[str, float]:
        """The metrics that a trial of ``policy`` will report exactly so."""
        return self.metrics_of(self.cost(policy, training))

    def metrics_of(self, cost: Cost) -> dict[str, float]:
        """The same, of a cost."""
        exact = {"params": cost.params, "params_total": cost.params_total, "memory_predicted": cost.memory}
        assert set(exact) == set(EXACT_METRICS)
        if self._device.type == "cpu":  # only CUDA measures its memory; elsewhere the prediction is reported
            exact["memory"] = cost.memory
        return dict(exact)


class HardConstraints:
    """The constraints that a policy's exact costs decide.

    Args:
        constraints: those of the search space; the ones on measured metrics (accuracy, seconds) are left to the trial.
        costs: of the space's model.
        baseline: the untouched model's policy.
        training: the baseline's.
    """

    def __init__(
        self, constraints: Iterable[Constraint], costs: ExactCosts, baseline: Policy, training: TrainingSpec
    ) -> None:
        self._costs = costs
        stated = tuple(constraints)
        # Costs take time to set up: without constraints nobody asks for them.
        self._reference = costs.metrics(baseline, training) if stated else {}
        self._constraints = tuple(constraint for constraint in stated if constraint.metric in self._reference)

    def violations(self, policy: Policy, training: TrainingSpec) -> dict[str, float]:
        """Metric to how far the policy misses its bound; at or below 0 it keeps it."""
        return self.violations_of(self._costs.metrics(policy, training)) if self._constraints else {}

    def violations_of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The same, of a policy's exact metrics."""
        return {
            constraint.metric: constraint.violation(metrics[constraint.metric], self._reference[constraint.metric])
            for constraint in self._constraints
        }

    def met(self, policy: Policy, training: TrainingSpec) -> bool:
        """Whether the policy may be trained."""
        return all(violation <= 0 for violation in self.violations(policy, training).values())
