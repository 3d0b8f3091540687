"""Policies and values in few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.results.describe import (
    describe_difference,
    describe_policy,
    describe_savings,
    describe_trial,
    describe_value,
    natural_key,
)
from rlsearch.results.tables import Run


def replaced(*pairs: tuple[str, str], **options: Any) -> tuple[Replacement, ...]:
    return tuple(Replacement(unit, block, options) for block, unit in pairs)


def test_a_policy_on_one_line() -> None:
    units = replaced(("skip", "layer1.4"), ("skip", "layer1.2"), ("scalar", "layer2.3"), ("skip", "layer1.10"))
    drop = LearnDrop(threshold=0.012, patience=2)
    assert describe_policy(Policy()) == "end-to-end"
    assert describe_policy(Policy(replacements=units, learn_drop=drop)) == (
        "scalar layer2.3; skip layer1.2,1.4,1.10; drop<0.012 p2"
    )
    drop = LearnDrop(threshold=0.01, patience=1, features="stored", warmup=0.5)
    assert describe_policy(Policy(learn_drop=drop)) == "drop<0.01 p1 warmup=0.5 features=stored"
    # What a schedule does not look at is not shown.
    assert describe_policy(Policy(learn_drop=LearnDrop(score="schedule"))) == "drop score=schedule"


def test_what_units_share_is_said_once() -> None:
    units = replaced(("channel", "encoder_layer_3.attention"), ("channel", "encoder_layer_11.attention"))
    assert describe_policy(Policy(replacements=units)) == "channel encoder_layer_3,11.attention"
    units = replaced(("skip", "features"), ("skip", "head"), ("skip", "7"), ("skip", "8"))
    assert describe_policy(Policy(replacements=units)) == "skip 7,8,features,head"


def test_a_role_that_all_share_stands_once_behind_them() -> None:
    same = replaced(*(("scalar", f"encoder.layer_{index}.attention") for index in (3, 11, 5)))
    assert describe_policy(Policy(replacements=same)) == "scalar encoder.layer_3,5,11.attention"
    mixed = replaced(("scalar", "layer_3.attention"), ("scalar", "layer_4.mlp"))
    assert describe_policy(Policy(replacements=mixed)) == "scalar layer_3.attention,4.mlp"


def test_options_of_a_block_part_it_from_the_same_without() -> None:
    units = replaced(("scalar", "layer1.1")) + replaced(("scalar", "layer1.3"), init="fit", boundary="keep")
    assert describe_policy(Policy(replacements=units)) == "scalar layer1.1; scalar(boundary=keep,init=fit) layer1.3"


def test_settings_that_differ_from_the_baseline_are_named(make_record: Any) -> None:
    start = make_record(0)
    other = make_record(1, training=json.dumps({"epochs": 3, "batch_size": 128, "optimizer": "sgd", "lr": 0.04567}))
    assert describe_trial(other, start) == "end-to-end; batch_size=128; lr=0.0457"
    assert describe_trial(other, None) == describe_trial(start, start) == "end-to-end"


@pytest.mark.parametrize(
    ("metric", "value", "scale", "expected"),
    [
        ("accuracy", 0.97777, None, "97.78 %"),
        ("params", 466_906, None, "466,906"),
        ("memory", 61_400_000, None, "58.6 MiB"),
        ("memory", 20 * 2**30, None, "20.00 GiB"),
        ("train_flops", 1.1134e12, None, "1.113 TFLOP"),
        ("train_flops", 0.8904e12, 1.1134e12, "0.890 TFLOP"),
        ("train_flops", 0.8904e12, None, "890.400 GFLOP"),
        ("forward_flops", 12.0, None, "0.000 MFLOP"),
        ("train_seconds", 4.25, None, "4.2 s"),
        ("samples_per_second", 1014.4, None, "1,014 images/s"),
        ("forward_share", 0.7126, None, "71.3 %"),
        ("mean_learnable_params", 312_114.4, None, "312,114"),
        ("params", None, None, "–"),
        ("params", None, 5.0, "–"),
    ],
)
def test_values_with_their_units(metric: str, value: float | None, scale: float | None, expected: str) -> None:
    assert describe_value(metric, value, scale) == expected


@pytest.mark.parametrize(
    ("metric", "value", "reference", "expected"),
    [
        ("accuracy", 0.95, 0.9632, "−1.3 points"),
        ("accuracy", 0.97, 0.96, "+1.0 points"),
        ("params", 779, 1000, "−22.1 %"),
        ("params", 99_999, 100_000, "±0.0 %"),
        ("params", None, 1000, ""),
    ],
)
def test_differences_with_their_sign(metric: str, value: float | None, reference: float, expected: str) -> None:
    assert describe_difference(metric, value, reference) == expected


def test_what_a_trial_saves_in_a_sentence(make_record: Any) -> None:
    start = make_record(0, accuracy=0.9, params=100, memory=200, train_flops=4.0)
    trial = make_record(1, accuracy=0.892, params=75, memory=180, train_flops=3.0)
    run = Run(folder=Path("run"), objectives={"accuracy": "maximize"}, records=(start, trial))
    assert describe_savings(run, trial) == "parameters −25.0 %, memory −10.0 %, compute −25.0 %, accuracy −0.8 points"
    assert describe_savings(run, start) == "the end-to-end baseline itself: it saves nothing"
    alone = Run(folder=Path("run"), objectives={"accuracy": "maximize"}, records=(trial,))
    assert describe_savings(alone, trial) == "there is no baseline to compare it with"


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["layer10.1", "layer2.10", "layer2.9", "head", "layer2"]
    assert sorted(names, key=natural_key) == ["head", "layer2", "layer2.9", "layer2.10", "layer10.1"]
