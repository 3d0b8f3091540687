"""`rlsearch validate`, from its entry point to what it prints and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "search_spaces" / "digits_resnet32.yaml"


@pytest.fixture
def validate(in_process: Callable[..., Any]) -> Callable[..., Any]:
    return partial(in_process, "validate")


def content(done: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_valid_space_is_told_with_its_size_its_costs_and_its_limits(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{DIGITS}: valid" in done.stdout
    assert "210,796 points, times the continuous learn_drop.threshold: 52,699 sets of replacements" in done.stdout
    assert "(at most 7 of 15 units at once)" in done.stdout
    assert "units: 15 of role block; how many each fits: skip 13, scalar 7, channel 7, lowrank 7" in done.stdout
    assert "466,906" in done.stdout
    assert "constraint params <= 1.0x: kept by 100 % of them" in done.stdout


def test_json_gives_the_same_in_numbers(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS), "--json", "--set", "constraints={params: '<= 0.8x', accuracy: '>= 0.9'}")
    found = content(done)
    assert (done.returncode, found["valid"], found["errors"], found["size"]) == (0, True, [], 210796)
    assert found["continuous"] == ["learn_drop.threshold"]
    assert set(found["cost"]) == {"params", "params_total", "memory_predicted", "forward_flops", "step_flops"}
    for spread in found["cost"].values():
        assert 0 < spread["least"] < spread["median"] < spread["baseline"]
        # A low-rank block computes its U Vᵀ besides: it may cost more than what it replaces, but little.
        assert spread["median"] < spread["greatest"] < 1.01 * spread["baseline"]
    assert found["cost"]["params"]["baseline"] == 466906
    assert found["constraints"]["accuracy"] is None
    assert 0 < found["constraints"]["params"] < 1
    assert found["feasible"] == found["constraints"]["params"]
    assert found["warnings"] == []


def test_every_error_is_told_at_once_with_exit_code_2_and_no_traceback(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS), "--set", "training.lr=-1", "--set", "serch={}", "--set", "data.name=digit")
    assert (done.returncode, done.stdout) == (2, "")
    assert "3 problems" in done.stderr
    for told in (
        "training.lr: must be a finite number above 0, got -1.0",
        "serch: unknown key; did you mean 'search'?",
        "data.name: unknown data set 'digit'; did you mean 'digits'?",
    ):
        assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "key", "told"),
    [
        ("model.name=resnet33", "model", "unknown model 'resnet33'"),
        ("space.replacement.units=block*", "space.replacement.units", "'block*' matches no unit of resnet32"),
        ("space.replacement.blocks=[skp]", "space.replacement.blocks", "did you mean 'skip'?"),
    ],
)
def test_json_names_the_key_of_every_error(validate: Callable[..., Any], setting: str, key: str, told: str) -> None:
    done = validate(str(DIGITS), "--json", "--set", setting)
    found = content(done)
    assert (done.returncode, found["valid"], found["size"], found["cost"]) == (2, False, None, None)
    (error,) = found["errors"]
    assert error["key"] == key
    assert told in error["message"]


def test_missing_data_are_a_warning_and_the_costs_are_told_all_the_same(
    validate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = validate(str(ROOT / "search_spaces" / "cifar10_resnet20.yaml"), "--json")
    found = content(done)
    assert (done.returncode, found["valid"], found["size"]) == (0, True, 516)
    (warning,) = found["warnings"]
    assert "cifar10" in warning
    assert "the search will not start without them; the costs are for images of 3x32x32" in warning
    assert found["cost"]["params"]["baseline"] == 272474
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "data", "told", "params"),
    [
        # A set known by name tells its classes and the size of its images, a model at most a usual size.
        ({"name": "resnet20"}, {"name": "cifar100"}, "the costs are for images of 3x32x32", 278_324),
        ({"name": "resnet34"}, {"name": "stl10"}, "the costs are for images of 3x96x96", 21_289_802),
        ({"name": "resnet20"}, {"name": "stl10", "image_size": 48}, "the costs are for images of 3x48x48", 272_474),
        ({"name": "resnet20"}, {"name": "imagefolder:nowhere"}, "of 3x32x32 and for 10 classes; model.num", 272_474),
        ({"name": "resnet20", "num_classes": 100}, {"name": "imagefolder:nowhere"}, "of 3x32x32", 278_324),
    ],
)
def test_what_missing_data_would_tell_is_known_or_said_to_be_assumed(
    validate: Callable[..., Any], tmp_path: Path, model: Any, data: Any, told: str, params: int
) -> None:
    data = data if ":" in data["name"] else {**data, "root": str(tmp_path)}
    space = {"replacement": {"units": "layer*", "blocks": ["skip"]}}
    path = tmp_path / "space.yaml"
    path.write_text(json.dumps({"model": model, "data": data, "space": space}), encoding="utf-8")
    found = content(validate(str(path), "--json"))
    (warning,) = found["warnings"]
    assert told in warning
    assert ("model.num_classes" in warning) == ("model.num" in told)
    assert found["cost"]["params"]["baseline"] == params


def test_roles_and_variants_are_told_with_the_units_they_fit(validate: Callable[..., Any]) -> None:
    settings = ("space.replacement.roles=[conv1, conv2]", "space.replacement.options={init: [half, fit]}")
    done = validate(str(DIGITS), *(part for setting in settings for part in ("--set", setting)))
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("units: "))
    assert line.startswith("units: 15 of role conv1, 15 of role conv2; how many each fits: skip 28, scalar(init=half) ")
    assert "scalar(init=fit)" in line
    found = content(validate(str(DIGITS), "--json"))
    assert found["roles"] == {"block": 15}
    assert found["variants"] == {"skip": 13, "scalar": 7, "channel": 7, "lowrank": 7}


def test_limits_that_no_policy_can_keep_are_an_error_with_the_nearest_value(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS), "--json", "--set", "constraints.params=<= 0.1x")
    assert (done.returncode, content(done)["valid"]) == (2, False)
    (error,) = content(done)["errors"]
    assert error["key"] == "constraints.params"
    assert error["message"] == (
        "<= 0.1x = 46,691 cannot be met: the least that a policy of this space reaches is 115,290 (0.247x); "
        "raise the bound, or allow more in space.replacement (units, blocks, max_fraction)"
    )


def test_limits_that_few_policies_keep_are_a_warning(validate: Callable[..., Any]) -> None:
    found = content(validate(str(DIGITS), "--json", "--set", "constraints.params=<= 0.25x"))
    assert (found["valid"], found["feasible"]) == (True, 0.0)
    (warning,) = found["warnings"]
    assert "none of 200 random policies keeps the constraints" in warning
    assert found["cost"]["params"]["least"] == 115_290  # of all policies, not of those 200


def test_limits_on_memory_that_no_policy_was_found_to_keep_are_a_warning(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS), "--set", "constraints.memory=<= 0.3x")
    assert done.returncode == 0
    (warning,) = (line for line in done.stdout.splitlines() if line.startswith("warning: "))
    assert "constraints.memory: <= 0.3x = 4.1 MiB may be out of reach: the least found is " in warning


def test_objectives_that_need_no_training_are_an_error(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS), "--set", "objectives={params: minimize, memory: minimize}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "objectives: params and memory are known before training" in done.stderr
    assert "add accuracy: maximize" in done.stderr


def test_a_stopping_rule_that_cannot_act_is_a_warning(validate: Callable[..., Any]) -> None:
    settings = ("search.min_gain=0.001", "search.gain_window=36")
    found = content(validate(str(DIGITS), "--json", *(part for setting in settings for part in ("--set", setting))))
    (warning,) = found["warnings"]
    assert warning.startswith("search.min_gain looks at the front after 40 trials at the earliest")


def test_more_classes_than_the_model_was_told_is_an_error(validate: Callable[..., Any]) -> None:
    done = validate(str(DIGITS), "--set", "model.num_classes=7")
    assert done.returncode == 2
    assert "model.num_classes: must be at least the data's 10, got 7" in done.stderr
