"""Trials that share a device: how much memory the largest needs, and what that does to their times."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from rlsearch.policy import Policy
from rlsearch.results.describe import TIMES
from rlsearch.search.cluster import Slots
from rlsearch.search.costs import ExactCosts
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.ranges import values_of
from rlsearch.search.space import SearchSpace
from rlsearch.search.variations import random_choices
from rlsearch.training.loop import TrainingSpec, slow_precision

# A replaced unit takes about what it took before: a few policies show by how much one may exceed the baseline.
_NUM_POLICIES = 16


def largest_memory(policies: PolicySpace, costs: ExactCosts) -> int:
    """Predicted bytes of the largest training that a search may run: the baseline or one of some random policies, with
    the greatest batch and whatever optimizer and precision take the most."""
    space = policies.space
    baseline = Policy(space.model)
    settings = max(_settings(space), key=lambda training: costs.cost(baseline, training).memory)
    rng = random.Random(0)
    tried = [policies.decide(random_choices(policies, rng)).policy for _ in range(_NUM_POLICIES)]
    return max(costs.cost(policy, settings).memory for policy in [baseline, *tried])


def sharing_note(slots: Slots, predicted_bytes: int, gpu_bytes: int | None) -> str | None:
    """What to tell at the start of a search whose trials share GPUs; None where each has its own.

    Args:
        slots: how many trials run at once.
        predicted_bytes: of the largest training.
        gpu_bytes: of one GPU, where they are known.
    """
    if not slots.gpu or slots.sharing == 1:
        return None
    of_gpu = "" if gpu_bytes is None else f" of {_gigabytes(gpu_bytes)}"
    return f"{slots.sharing} trials share each GPU (predicted {_gigabytes(predicted_bytes)} each{of_gpu})"


def start_warnings(space: SearchSpace, slots: Slots) -> list[str]:
    """What to warn of at the start of a search on devices as they are."""
    precision = slow_precision(space.training.precision, torch.device("cuda" if slots.gpu else "cpu"))
    timing = timing_warning(space) if slots.sharing > 1 else None
    return [warning for warning in (precision, timing) if warning is not None]


def timing_warning(space: SearchSpace) -> str | None:
    """What is the matter where a search goes by times, and lets trials train at once on one device; else None."""
    judged = [*space.objectives, *(constraint.metric for constraint in space.constraints)]
    times = [metric for metric in dict.fromkeys(judged) if metric in TIMES]
    gpu = space.resources.gpu
    if not times or space.search.max_concurrent == 1 or (gpu is not None and gpu >= 1):
        return None
    verb = "goes" if len(times) == 1 else "go"
    return (
        f"{' and '.join(times)} {verb} into the result, but trials that share a device slow each other down, and their "
        "times cannot be compared; set resources.gpu: 1, or without a GPU search.max_concurrent: 1"
    )


def _settings(space: SearchSpace) -> Iterator[TrainingSpec]:
    """The space's training with the greatest batch, and every choice of what else decides about memory."""
    batches = space.searched.get("training.batch_size")
    greatest = space.training.batch_size
    if batches is not None:
        greatest = max([greatest, *values_of(batches)])
    optimizers = _choices(space, "optimizer")
    for precision in _choices(space, "precision"):
        for optimizer in optimizers:
            yield replace(space.training, batch_size=greatest, optimizer=optimizer, precision=precision)


def _choices(space: SearchSpace, name: str) -> list[str]:
    distribution = space.searched.get(f"training.{name}")
    return [getattr(space.training, name)] if distribution is None else list(values_of(distribution))


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
