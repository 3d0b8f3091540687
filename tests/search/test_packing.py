"""Trials that share a device: how many fit, what is told about it, and that their times are marked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlsearch import Policy, TrainingSpec, build_model
from rlsearch.results.describe import describe_metric
from rlsearch.search.cluster import Slots, memory_fraction
from rlsearch.search.costs import ExactCosts
from rlsearch.search.packing import largest_memory, sharing_note, start_warnings, timing_warning
from rlsearch.search.policy_space import PolicySpace
from rlsearch.search.space import SearchSpace, parse_space
from rlsearch.training.loop import slow_precision

GB = 10**9


def space(**sections: Any) -> SearchSpace:
    content: dict[str, Any] = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "objectives": {"accuracy": "maximize"},
        "space": {"replacement": {"blocks": ["scalar", "skip"]}},
    }
    return parse_space(content | sections).with_num_classes(10)


@pytest.mark.parametrize(
    ("count", "gpu", "sharing"), [(4, 0.25, 4), (6, 1 / 3, 3), (2, 1 / 8, 2), (2, 1.0, 1), (2, 2.0, 1), (2, 0.0, 2)]
)
def test_how_many_trials_share_a_device(count: int, gpu: float, sharing: int) -> None:
    assert Slots(count, 1, gpu).sharing == sharing


def test_sharing_a_gpu_is_told() -> None:
    note = sharing_note(Slots(8, 1, 0.25), 3_100_000_000, 24 * GB)
    assert note == "4 trials share each GPU (predicted 3.1 GB each of 24.0 GB)"
    assert sharing_note(Slots(8, 1, 0.25), GB, None) == "4 trials share each GPU (predicted 1.0 GB each)"
    assert sharing_note(Slots(2, 1, 1.0), GB, 24 * GB) is None
    assert sharing_note(Slots(2, 1, 0.0), GB, None) is None


@pytest.mark.parametrize("count", [2, 4, 8])
def test_what_torch_may_give_out_leaves_room_for_every_context(count: int) -> None:
    share = memory_fraction(1 / count, 24 * GB)
    assert count * (share * 24 * GB + 2**30) <= 24 * GB + 1
    assert memory_fraction(1 / 8, 2 * GB) == 1 / 16  # a small GPU: some is left in any case


def test_the_largest_training_of_a_space_has_its_largest_batch_and_optimizer() -> None:
    searched = {"batch_size": [32, 128, 64], "optimizer": ["sgd", "adamw"], "epochs": 2, "precision": "fp32"}
    content = space(training=searched)
    model = build_model("resnet20")
    costs = ExactCosts(model, (3, 8, 8))
    found = largest_memory(PolicySpace(content, model, (3, 8, 8)), costs)
    baseline = costs.cost(Policy(), TrainingSpec(batch_size=128, optimizer="adamw", precision="fp32")).memory
    assert baseline <= found < 1.1 * baseline


def test_times_as_objectives_are_warned_about_where_devices_may_be_shared() -> None:
    timed = space(objectives={"accuracy": "maximize", "train_seconds": "minimize"})
    assert "train_seconds goes into the result" in (timing_warning(timed) or "")
    bounded = space(constraints={"samples_per_second": ">= 0.5x"})
    assert "samples_per_second goes" in (timing_warning(bounded) or "")
    assert timing_warning(space()) is None
    assert timing_warning(replace(timed, resources=replace(timed.resources, gpu=1))) is None
    assert timing_warning(replace(timed, search=replace(timed.search, max_concurrent=1))) is None


def test_the_start_of_a_search_warns() -> None:
    content = space(
        objectives={"accuracy": "maximize", "train_seconds": "minimize"},
        training={"batch_size": 32, "optimizer": "sgd", "epochs": 2, "precision": "bf16"},
    )
    imitated = slow_precision("bf16", torch.device("cpu"))
    assert start_warnings(content, Slots(2, 1, 1 / 2)) == [timing_warning(content)]
    assert start_warnings(content, Slots(2, 1, 1)) == []
    assert start_warnings(content, Slots(1, 1, 0)) == ([] if imitated is None else [imitated])


def test_a_time_of_a_shared_device_is_marked(make_record: Any) -> None:
    shared, alone = (make_record(1, train_seconds=12.0, accuracy=0.5, packed=count) for count in (4, 1))
    assert describe_metric("train_seconds", shared) == "12.0 s †"
    assert describe_metric("train_seconds", alone) == "12.0 s"
    assert describe_metric("accuracy", shared) == "50.00 %"
