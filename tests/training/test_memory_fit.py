"""A batch that does not fit is refused before it trains, with the greatest that would."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_net import make

from rlsearch import (
    DataSpec,
    LearnDrop,
    ModelSpec,
    Policy,
    Replacement,
    TrainingSpec,
    TrialSpec,
    run_trial,
)
from rlsearch.errors import OutOfMemoryError
from rlsearch.training.cost import CostModel
from rlsearch.training.memory_fit import MemoryFit, largest_batch

CPU = torch.device("cpu")
POLICY = Policy(replacements=(Replacement("units.1", "skip"),), learn_drop=LearnDrop())


@lru_cache
def costs(batch_size: int) -> CostModel:
    return CostModel(make(10), (3, 16, 16), batch_size)


def needed(batch_size: int) -> int:
    return costs(batch_size).cost(POLICY).memory


@given(
    fixed=st.integers(0, 10**6),
    steps=st.lists(st.integers(1, 10**4), min_size=1, max_size=300),
    room=st.integers(0, 3 * 10**6),
)
def test_the_largest_batch_is_the_last_that_fits(fixed: int, steps: list[int], room: int) -> None:
    sizes = [fixed + sum(steps[: n + 1]) for n in range(len(steps))]
    too_many = next((n for n, size in enumerate(sizes, start=1) if size > room), None)
    if too_many is None:
        return
    asked: list[int] = []

    def size(count: int) -> int:
        asked.append(count)
        return sizes[count - 1]

    found = largest_batch(size, room, len(sizes))
    assert found == (too_many - 1 if too_many > 2 else 0)
    assert len(set(asked)) <= 24


def test_what_does_not_fit_is_told_with_what_would() -> None:
    room = needed(37) + 1000
    MemoryFit(costs, POLICY, 37, CPU).check(room)
    with pytest.raises(OutOfMemoryError) as caught:
        MemoryFit(costs, POLICY, 64, CPU).check(room)
    assert str(caught.value) == (
        f"a training step of 64 images needs {needed(64) / 1e9:.2f} GB (predicted), and {room / 1e9:.2f} GB of memory "
        "were free at its start: the greatest batch_size that fits is 37"
    )


def test_a_model_that_never_fits_is_told_so() -> None:
    with pytest.raises(OutOfMemoryError, match="too little for 2 images: use a smaller model or smaller images"):
        MemoryFit(costs, POLICY, 64, CPU).check(100_000)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_trial_that_runs_out_of_memory_tells_what_it_needs(in_training: bool) -> None:
    """In training it is refused before it begins; what evaluation takes is not foreseen."""
    model = ModelSpec("greedy_net:build", kwargs={"in_training": in_training})
    # There are a hundred images: more a step would not be trained with, and are not asked for.
    spec = TrialSpec(model, DataSpec("digits", limit=100), TrainingSpec(epochs=1, batch_size=10**6))
    with pytest.raises(OutOfMemoryError) as caught:
        list(run_trial(spec, device="cpu"))
    told = str(caught.value)
    found = re.search(r"of 90 images needs ([\d,]+\.\d\d) GB \(predicted\), and [\d.,]+ GB of memory were free", told)
    assert found is not None
    assert (float(found[1].replace(",", "")) > 4e6) == in_training
    assert ("too little for 2 images" in told) == in_training
    assert ("allocate" in told) != in_training
