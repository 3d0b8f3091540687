"""Search spaces: what a file may say, and every message where it says something else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rlsearch.errors import ConfigError, Problem
from rlsearch.policy import LearnDrop
from rlsearch.search.check import check_space
from rlsearch.search.constraints import Constraint, parse_constraints
from rlsearch.search.ranges import default_of, parse_distribution, size_of, to_plain, values_of
from rlsearch.search.settings import parse_duration
from rlsearch.search.space import DEFAULT_OBJECTIVES, SearchSpace, load_space, parse_space
from rlsearch.search.summary import summarize
from rlsearch.search.variants import variants_of

SPACES = Path(__file__).parents[2] / "search_spaces"
DIGITS = SPACES / "digits_resnet32.yaml"
SMALL: dict[str, Any] = {
    "model": {"name": "resnet20"},
    "data": {"name": "digits"},
    "space": {"replacement": {"units": "layer*", "blocks": ["skip", "scalar"]}},
}


def problems_of(content: Any) -> dict[str, str]:
    """Key to message of everything that is wrong with a space."""
    with pytest.raises(ConfigError) as caught:
        parse_space(content)
    return by_key(caught.value.problems)


def by_key(problems: Iterable[Problem]) -> dict[str, str]:
    """Key to all that is told about it."""
    found: dict[str, str] = {}
    for problem in problems:
        found[problem.key] = found.get(problem.key, "") + problem.message + "\n"
    return found


def file_problems(tmp_path: Path, text: str) -> list[Problem]:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_space(path)
    assert caught.value.source == str(path)
    return list(caught.value.problems)


def small(**sections: Any) -> dict[str, Any]:
    return {**SMALL, **sections}


def options(**values: Any) -> dict[str, Any]:
    return small(space={"replacement": {"blocks": ["skip", "scalar"], "options": values}})


def test_the_digits_space_says_what_its_file_says() -> None:
    space = load_space(DIGITS)
    assert (space.model.name, space.data.name, space.num_classes) == ("resnet32", "digits", None)
    assert (space.training.epochs, space.training.batch_size, space.training.lr) == (9, 64, 0.1)
    assert space.searched == {
        "learn_drop.threshold": FloatDistribution(0.3, 0.8),
        "learn_drop.patience": IntDistribution(1, 3),
    }
    assert space.objectives == DEFAULT_OBJECTIVES
    assert space.constraints == (Constraint("params", "<=", 1.0, True),)
    assert space.replacement is not None
    assert (space.replacement.units, space.replacement.roles) == (("layer*",), ("block",))
    assert space.replacement.blocks == ("skip", "scalar", "channel", "lowrank")
    # The freeze control takes the usual threshold where the range holds it.
    assert space.learn_drop == LearnDrop(threshold=0.65, features="stored")
    assert (space.search.trials, space.search.seed, space.search.min_epochs) == (40, 0, None)
    assert (space.resources.cpu, space.resources.gpu) == (1.0, None)


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_that_is_shipped_is_valid_and_opens_with_its_commands(path: Path) -> None:
    space = load_space(path)
    assert check_space(space) == []
    assert f"rlsearch search   search_spaces/{path.name}" in path.read_text(encoding="utf-8")
    assert space.data.download is False


def test_the_nine_spaces_are_there() -> None:
    assert {path.stem for path in SPACES.glob("*.yaml")} == {
        "digits_resnet32",
        "cifar10_resnet20",
        "cifar10_resnet32",
        "cifar10_resnet110",
        "cifar10_vgg16",
        "cifar10_vit_tiny",
        "imagenette_resnet34",
        "imagenet_resnet101",
        "imagenet_vit_b16",
    }


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_resolved_space_is_the_same_space(path: Path, tmp_path: Path) -> None:
    space = load_space(path)
    resolved = tmp_path / "space.yaml"
    resolved.write_text(yaml.safe_dump(space.to_dict(), sort_keys=False), encoding="utf-8")
    assert load_space(resolved) == space
    assert load_space(resolved).to_dict() == space.to_dict()


@pytest.mark.parametrize(
    ("content", "key", "told"),
    [
        (small(modle={"name": "resnet20"}), "modle", "did you mean 'model'?"),
        (small(model={"nam": "resnet20"}), "model.nam", "did you mean 'name'?"),
        (small(model={"nam": "resnet20"}), "model.name", "is missing"),
        (small(data={"name": "digits", "rot": "data"}), "data.rot", "did you mean 'root'?"),
        (small(training={"epoch": 3}), "training.epoch", "did you mean 'epochs'?"),
        (small(training={"epochs": 0}), "training.epochs", "must be at least 1, got 0"),
        (small(training={"lr": "1e-3"}), "training.lr", "write it with a decimal point"),
        (small(training={"lr": True}), "training.lr", "must be a number, got True"),
        (small(training={"optimizer": "sdg"}), "training.optimizer", "did you mean 'sgd'?"),
        (small(training={"epochs": [3, 9]}), "training.epochs", "cannot be searched"),
        (small(training={"lr": {"low": 0.1, "high": 0.2, "lgo": True}}), "training.lr.lgo", "did you mean 'log'?"),
        (small(training={"lr": {"low": 0.2, "high": 0.1}}), "training.lr", "got low 0.2 and high 0.1"),
        (small(training={"lr": {"low": 0.1}}), "training.lr.high", "is missing"),
        (small(training={"lr": {"low": 0.0, "high": 0.1}}), "training.lr", "above 0, got 0.0"),
        (small(training={"lr": {"low": -0.1, "high": 0.1, "log": True}}), "training.lr.low", "above 0 with log"),
        (small(training={"lr": {"low": 0.1, "high": 0.4, "step": 0.2}}), "training.lr.step", "must divide"),
        (small(training={"lr": {"low": 0.1, "high": 0.4, "step": 0.1, "log": True}}), "training.lr.step", "drop one"),
        (small(training={"lr": {"low": 0.1, "high": math.inf}}), "training.lr.high", "must be finite"),
        (small(training={"lr": {"choices": []}}), "training.lr.choices", "at least one choice"),
        (small(training={"lr": {"choices": [0.1], "log": True}}), "training.lr.log", "unknown key"),
        (small(training={"lr": [0.1, 0.1]}), "training.lr[1]", "stands twice"),
        (small(training={"batch_size": [32, 64.5]}), "training.batch_size[1]", "a whole number, got 64.5"),
        (small(training={"optimizer": {"low": 1, "high": 2}}), "training.optimizer", "give a list of choices"),
        (small(training={"optimizer": ["sgd", "adam"]}), "training.optimizer", "did you mean 'adamw'?"),
        (small(training=3), "training", "must be a mapping, got 3"),
        (small(objectives={"acuracy": "maximize"}), "objectives.acuracy", "did you mean 'accuracy'?"),
        (small(objectives={"accuracy": "maximise"}), "objectives.accuracy", "did you mean 'maximize'?"),
        (small(objectives={"accuracy": "minimize"}), "objectives.accuracy", "must be maximize"),
        (small(objectives={}), "objectives", "at least one metric"),
        (small(objectives={"params": "minimize"}), "objectives", "params is known before training, so that nothing"),
        (
            small(objectives={"params": "minimize", "memory": "minimize", "train_flops": "minimize"}),
            "objectives",
            "params, memory and train_flops are known before training, so that nothing needs to be trained; add acc",
        ),
        (
            small(objectives={"params": "minimize"}, constraints={"memory": "<= 0.9x"}),
            "objectives",
            "params is known before training, so that nothing needs to be trained; add accuracy: maximize",
        ),
        (small(constraints={"params": "< 1.0x"}), "constraints.params", "got '< 1.0x'"),
        (small(constraints={"params": 3}), "constraints.params", "got 3"),
        (
            small(constraints={"params": "<= 0x"}),
            "constraints.params",
            "must be above 0: no trial keeps it, got '<= 0x'",
        ),
        (small(constraints={"accuracy": ">= 95"}), "constraints.accuracy", "a share (95 % is 0.95), got '>= 95'"),
        (small(constraints={"accuracy": ">= -0.1"}), "constraints.accuracy", "must be a bound such as"),
        (small(constraints={"parms": "<= 1.0x"}), "constraints.parms", "did you mean 'params'?"),
        (small(space={"replacment": {}}), "space.replacment", "did you mean 'replacement'?"),
        (small(space={"replacement": {"unit": "layer*"}}), "space.replacement.unit", "did you mean 'units'?"),
        (small(space={"replacement": {"units": []}}), "space.replacement.units", "at least one"),
        (small(space={"replacement": {"blocks": ["scalr"]}}), "space.replacement.blocks", "did you mean 'scalar'?"),
        (small(space={"replacement": {"blocks": [3]}}), "space.replacement.blocks[0]", "must be text"),
        (small(space={"replacement": {"max_fraction": 1.5}}), "space.replacement.max_fraction", "at most 1, got 1.5"),
        (small(space={"replacement": {"options": {"int": "fit"}}}), "space.replacement.options.int", "'init'?"),
        (small(space={"replacement": {"options": {"init": "fitt"}}}), "space.replacement.options.init", "'fitt'"),
        (options(init=["half", "fitt"]), "space.replacement.options.init[1]", "'fitt'"),
        (options(init=[3, "fit"]), "space.replacement.options.init[0]", "got 3"),
        (options(init=["half", "fit", "half"]), "space.replacement.options.init[2]", "'half' stands twice; keep one"),
        (options(init=[]), "space.replacement.options.init", "must hold at least one value"),
        (options(intt=["half"]), "space.replacement.options.intt", "'init'?"),
        (small(space={"replacement": {"roles": []}}), "space.replacement.roles", "at least one"),
        (small(space={"replacement": {"roles": ["mlp", "mlp"]}}), "space.replacement.roles[1]", "stands twice"),
        (small(space={"learn_drop": {"thresold": 0.1}}), "space.learn_drop.thresold", "did you mean 'threshold'?"),
        (small(space={"learn_drop": {"patience": {"low": 0, "high": 2}}}), "space.learn_drop.patience", "at least 1"),
        (small(space={}), "space", "leaves nothing to search"),
        (small(search={"trails": 4}), "search.trails", "did you mean 'trials'?"),
        (small(search={"trials": 0}), "search.trials", "at least 1, got 0"),
        (small(search={"epoch_timeout": "soon"}), "search.epoch_timeout", "must be a time above 0, as in 2h, 90m"),
        (small(search={"time_budget": "2 hours"}), "search.time_budget", "as in 2h"),
        (small(search={"gpu_hours": 0}), "search.gpu_hours", "must be a finite number above 0, got 0.0"),
        (small(search={"gpu_hours": 8}, resources={"gpu": 0}), "search.gpu_hours", "with resources.gpu: 0 trials take"),
        (small(search={"min_gain": 1}), "search.min_gain", "must be a share above 0 and below 1, as in 0.001, got 1.0"),
        (small(search={"min_gain": 0.1, "gain_window": 0}), "search.gain_window", "must be at least 1, got 0"),
        (small(search={"min_epochs": 10}), "search.min_epochs", "at most training.epochs = 9"),
        (small(resources={"gpu": "all"}), "resources.gpu", "must be auto or a number, got 'all'"),
        (small(resources={"gpu": 1.5}), "resources.gpu", "must be whole above 1"),
        (small(resources={"cpu": 0}), "resources.cpu", "above 0, got 0.0"),
        ([], "", "must be a mapping"),
        (None, "", "is empty; it must hold at least model, data and space"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_and_a_remedy(content: Any, key: str, told: str) -> None:
    problems = problems_of(content)
    assert key in problems
    assert told in problems[key]


@pytest.mark.parametrize(
    "sections",
    [
        {"objectives": {"params": "minimize"}, "constraints": {"accuracy": ">= 0.9"}},
        {"objectives": {"params": "minimize", "train_seconds": "minimize"}},
        {
            "objectives": {"params": "minimize", "train_flops": "minimize"},
            "space": {"replacement": {"blocks": ["skip"]}, "learn_drop": {}},
        },
        {"constraints": {"accuracy": ">= 1.2x"}},
    ],
)
def test_what_only_training_tells_may_be_an_objective_or_a_bound(sections: dict[str, Any]) -> None:
    space = parse_space(small(**sections))
    assert dict(space.objectives) == sections.get("objectives", dict(parse_space(small()).objectives))
    assert [bound.metric for bound in space.constraints] == list(sections.get("constraints", {}))


def test_everything_that_is_wrong_is_told_at_once() -> None:
    content = {
        "model": {"name": "resnet20", "num_clases": 10},
        "training": {"lr": {"low": 1.0, "hihg": 2.0}, "epochs": -1},
        "objectives": {"loss": "minimize"},
        "constraints": {"params": "1.0x"},
        "space": {"replacement": {"blocks": ["skipp", "scaler"]}},
        "serch": {},
    }
    keys = {
        "serch",
        "data",
        "model.num_clases",
        "training.lr.hihg",
        "training.lr.high",
        "training.epochs",
        "objectives.loss",
        "constraints.params",
        "space.replacement.blocks",
    }
    assert set(problems_of(content)) == keys


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {name: resnet20\ndata: {}", "line 2, column 5"),
        ("model: {name: a}\n\tdata: 3", "line 2, column 1"),
        ("model: !!python/object:os.system {}", "line 1, column 8"),
        ("model: *missing", "line 1, column 8"),
        ("date: 2026-99-99", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_yaml_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    (problem,) = file_problems(tmp_path, text)
    assert told in problem.message


def test_a_key_that_stands_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    text = "model: {name: resnet20}\ntraining:\n  lr: 0.1\n  epochs: 3\n  lr: 0.2\nmodel: {name: resnet32}\n"
    problems = {problem.key: problem.message for problem in file_problems(tmp_path, text)}
    assert problems == {
        "lr": "stands twice, in lines 3 and 5; keep one of the two",
        "model": "stands twice, in lines 1 and 6; keep one of the two",
    }


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_space(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_space(tmp_path)


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_space(path)


def test_settings_override_the_file_and_later_ones_win() -> None:
    space = load_space(DIGITS, ["training.epochs=3", "data.limit=100", "training.epochs=4", "search.time_budget=1h30m"])
    assert (space.training.epochs, space.data.limit, space.search.time_budget) == (4, 100, 5400.0)


def test_a_setting_may_make_a_value_searched() -> None:
    space = load_space(DIGITS, ["training.lr={low: 0.02, high: 0.5, log: true}"])
    assert space.searched["training.lr"] == FloatDistribution(0.02, 0.5, log=True)
    assert space.training.lr == 0.1


@pytest.mark.parametrize(
    ("setting", "key", "told"),
    [
        ("training.epochs", "--set", "must be dotted.key=value"),
        ("=3", "--set", "must be dotted.key=value"),
        ("training.epochs={", "--set training.epochs", "is not valid YAML"),
        ("training.lr.low=0.1", "--set training.lr.low", "training.lr is 0.1, which holds no keys"),
        ("training.epoch=3", "training.epoch", "did you mean 'epochs'?"),
        ("search.trials=many", "search.trials", "must be a whole number, got 'many'"),
    ],
)
def test_a_setting_that_is_wrong_is_told(setting: str, key: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(DIGITS, [setting])
    problems = {problem.key: problem.message for problem in caught.value.problems}
    assert told in problems[key]


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("<= 1.0x", Constraint("params", "<=", 1.0, True)),
        (">=0.9", Constraint("params", ">=", 0.9, False)),
        ("  <=  3e5 ", Constraint("params", "<=", 3e5, False)),
        ("<= 1.2.3", None),
        ("<= 1e999", None),
        ("<= x", None),
        ("== 1", None),
        ("<= -1", None),
        ("<= 1.0 x y", None),
        ("", None),
    ],
)
def test_constraint_text(text: str, constraint: Constraint | None) -> None:
    problems: list[Problem] = []
    found = parse_constraints({"params": text}, "constraints", problems)
    assert found == (() if constraint is None else (constraint,))
    assert len(problems) == (constraint is None)


def test_a_violation_is_above_zero_exactly_where_the_bound_is_missed() -> None:
    at_most, at_least = Constraint("params", "<=", 0.5, True), Constraint("accuracy", ">=", 0.9, False)
    assert [at_most.violation(value, 100.0) for value in (49, 50, 51)] == [-1.0, 0.0, 1.0]
    assert [at_least.violation(value, 0.1) > 0 for value in (0.89, 0.9, 0.91)] == [True, False, False]


@given(st.floats(1e-9, 1e12), st.booleans(), st.sampled_from(["<=", ">="]))
def test_a_constraint_is_read_back_from_its_text(value: float, relative: bool, op: str) -> None:
    (found,) = parse_constraints({"params": str(Constraint("params", op, value, relative))}, "constraints", [])
    assert (found.op, found.relative) == (op, relative)
    assert found.value == value


numbers = st.floats(-1e6, 1e6)
ranges = st.one_of(
    st.lists(numbers, min_size=1, unique=True).map(lambda values: (float, values)),
    st.lists(st.integers(), min_size=1, unique=True).map(lambda values: (int, {"choices": values})),
    st.lists(st.text(), min_size=1, unique=True).map(lambda values: (str, values)),
    st.tuples(numbers, numbers).map(lambda pair: (float, {"low": min(pair), "high": max(pair)})),
    st.tuples(st.integers(1, 99), st.integers(0, 20), st.integers(1, 5)).map(
        lambda t: (int, {"low": t[0], "high": t[0] + t[1] * t[2], "step": t[2]})
    ),
    st.tuples(st.integers(1, 9), st.integers(0, 99)).map(
        lambda pair: (int, {"low": pair[0], "high": sum(pair), "log": True})
    ),
    st.tuples(st.floats(1e-6, 1), st.floats(1, 10)).map(
        lambda pair: (float, {"low": pair[0], "high": pair[1], "log": True})
    ),
)


@given(ranges, numbers)
def test_a_range_is_read_back_from_what_it_writes_and_holds_its_default(written: Any, usual: float) -> None:
    kind, value = written
    problems: list[Problem] = []
    distribution = parse_distribution(value, kind, "key", problems)
    assert problems == []
    assert distribution is not None
    assert parse_distribution(to_plain(distribution), kind, "key", []) == distribution
    default = default_of(distribution, usual if kind is float else 7)
    assert distribution._contains(distribution.to_internal_repr(default))
    size = size_of(distribution)
    if size is not None:
        values = values_of(distribution)
        assert len(values) == size
        assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)


def test_the_baseline_takes_the_usual_value_or_the_middle() -> None:
    log = FloatDistribution(0.01, 1.0, log=True)
    assert default_of(log, 0.2) == 0.2
    assert default_of(log, 5.0) == pytest.approx(0.1)
    assert default_of(FloatDistribution(0.0, 1.0, step=0.25), 0.3) == 0.5
    assert default_of(IntDistribution(32, 512, step=32), 128) == 128
    assert default_of(CategoricalDistribution(["a", "b"]), "c") == "a"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2h", 7200.0), ("90m", 5400.0), ("1h30m", 5400.0), ("1.5d", 129600.0), (30, 30.0), ("45", 45.0), ("10s", 10.0)],
)
def test_durations(value: object, seconds: float) -> None:
    assert parse_duration(value, "key", []) == seconds


@pytest.mark.parametrize("value", [0, -1, "h", "2x", "", True, "1h 30m", math.inf, math.nan, None])
def test_what_is_no_duration(value: object) -> None:
    problems: list[Problem] = []
    assert parse_duration(value, "key", problems) is None
    assert len(problems) == 1


def test_the_number_of_classes_is_the_datas_unless_it_is_stated() -> None:
    space = parse_space(SMALL)
    fitted = space.with_num_classes(37)
    assert (fitted.num_classes, fitted.model.num_classes) == (37, 37)
    assert parse_space(fitted.to_dict()) == fitted
    stated = parse_space(small(model={"name": "resnet20", "num_classes": 100}))
    assert stated.with_num_classes(10).model.num_classes == 100
    with pytest.raises(ConfigError, match="at least the data's 101, got 100"):
        stated.with_num_classes(101)


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"model": {"name": "resnet21"}}, "model", "did you mean 'resnet"),
        ({"model": {"name": "resnet20", "kwargs": {"widht": 3}}}, "model", "widht"),
        ({"model": {"name": "nowhere.at:all"}}, "model", "cannot be imported"),
        ({"space": {"replacement": {"units": ["layer*", "layr*"]}}}, "space.replacement.units", "'layr*' matches no"),
        ({"space": {"replacement": {"units": "layer2.0"}}}, "space.replacement.blocks", "'skip' fits none"),
        ({"space": {"replacement": {"max_fraction": 0.1}}}, "space.replacement.max_fraction", "one of 9 matched"),
        ({"model": {"name": "resnet20", "weights": "nowhere.safetensors"}}, "model.weights", "nowhere.safetensors"),
    ],
)
def test_what_only_the_model_can_tell(changes: dict[str, Any], key: str, told: str) -> None:
    problems = by_key(check_space(parse_space({**SMALL, **changes})))
    assert told in problems[key]


@pytest.mark.parametrize(
    ("replacement", "key", "told"),
    [
        (
            {"roles": ["conv9"]},
            "roles",
            "'conv9' is no role of resnet20; the roles of its units are block, conv1, conv2",
        ),
        ({"roles": ["block", "conv2"]}, "roles", "block and conv2 overlap: layer1.0.conv2 is a part of layer1.0; keep"),
        # Not one of these units is a part of another, but layer1.2.conv1 would borrow from a part of layer1.1.
        ({"roles": ["block", "conv1"], "units": ["layer1.1", "layer1.2.conv1"]}, "roles", "block and conv1 overlap"),
        ({"roles": ["block", "conv1"], "units": "layer1.[0-9]"}, "roles", "no unit of role 'conv1'; leave it out"),
        (
            {"units": ["layer*", "*.conv1"]},
            "units",
            "'*.conv1' matches no unit of resnet20 of the given roles, only of",
        ),
        (
            {"options": {"rank": [2, 4000]}},
            "options.rank[1]",
            "with 4000 no block fits any of the matched units (layer",
        ),
        ({"blocks": ["lowrank"], "options": {"rank": [3000, 4000]}}, "blocks", "'lowrank' fits none of the matched"),
    ],
)
def test_what_only_the_units_can_tell(replacement: dict[str, Any], key: str, told: str) -> None:
    replacement = {"units": "layer*", "blocks": ["skip", "lowrank"], **replacement}
    found = by_key(check_space(parse_space(small(space={"replacement": replacement}))))
    assert set(found) == {f"space.replacement.{key}"}
    assert told in found[f"space.replacement.{key}"]


def test_units_and_parts_of_other_chains_may_be_mixed() -> None:
    replacement = {"units": ["layer1.?", "layer2.*.conv1"], "roles": ["block", "conv1"], "blocks": ["skip", "scalar"]}
    assert check_space(parse_space(small(space={"replacement": replacement}))) == []


def test_variants_are_named_by_what_is_listed_in_the_order_of_the_blocks_own_options() -> None:
    listed = {"rank": [8, 2], "boundary": "keep", "init": ["half"]}
    replacement = parse_space(
        small(space={"replacement": {"blocks": ["lowrank", "skip", "scalar"], "options": listed}})
    ).replacement
    assert replacement is not None
    found = variants_of(replacement)
    assert list(found) == [
        "lowrank(init=half, rank=8)",
        "lowrank(init=half, rank=2)",
        "skip",
        "scalar(init=half)",
    ]
    assert all(name == variant.name for name, variant in found.items())
    assert found["lowrank(init=half, rank=2)"].options == {"init": "half", "boundary": "keep", "rank": 2}
    assert found["scalar(init=half)"].options == {"init": "half", "boundary": "keep"}
    assert [variant.sources for variant in found.values()] == ["adjacent", "adjacent", None, "adjacent"]


def test_a_model_without_chains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\ndef build(num_classes): return nn.Sequential(nn.Conv2d(3, num_classes, 8))\n"
    (tmp_path / "plain_model.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for section in ("replacement", "learn_drop"):
        content = small(model={"name": "plain_model:build"}, space={section: {}})
        (problem,) = check_space(parse_space(content))
        assert problem.key == f"space.{section}"


UNCUT = """
from torch import nn

class Uncut(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.units = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.head((self.units(images) + images).mean((2, 3)))
"""


def test_learn_drop_is_refused_where_nothing_could_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uncut_model.py").write_text(UNCUT, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    content = small(model={"name": "uncut_model:Uncut"}, space={"learn_drop": {}})
    (problem,) = check_space(parse_space(content))
    assert problem.key == "space.learn_drop"
    assert problem.message.startswith("nothing of uncut_model:Uncut can leave training: behind units.0 the value of")
    assert problem.message.endswith("; leave learn_drop out")
    # Replaced it can be all the same.
    content["space"] = {"replacement": {"units": "units.*", "blocks": ["skip"]}}
    assert check_space(parse_space(content)) == []
    content["space"]["learn_drop"] = {}
    assert [problem.key for problem in check_space(parse_space(content))] == ["space.learn_drop"]
    content["model"] = {"name": "resnet20"}
    content["space"]["replacement"]["units"] = "layer*"
    assert check_space(parse_space(content)) == []


def test_the_data_say_what_a_model_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from torch import nn\n"
        "def build(num_classes): return nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(3)], nn.Flatten(), "
        "nn.Linear(3 * 28 * 28, num_classes))\n"
    )
    (tmp_path / "fixed_size_model.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    content = small(model={"name": "fixed_size_model:build"}, space={"learn_drop": {}})
    for data in ({"name": "fashionmnist"}, {"name": "imagefolder:nowhere", "image_size": 28}):
        assert check_space(parse_space(content | {"data": data})) == []
    assert [problem.key for problem in check_space(parse_space(content))] == ["space.learn_drop"]
    # Grey images that are not at hand are costed as what they are expanded to.
    content |= {"model": {"name": "resnet20"}, "data": {"name": "fashionmnist", "root": str(tmp_path)}}
    summary = summarize(parse_space(content), num_samples=2)
    assert "the costs are for images of 3x28x28" in summary.warnings[0]


def test_a_score_may_be_searched() -> None:
    scores = ["schedule", "param_change"]
    space = parse_space(small(space={"learn_drop": {"score": scores, "threshold": {"low": 0.2, "high": 0.8}}}))
    assert space.searched["learn_drop.score"] == CategoricalDistribution(scores)
    assert space.learn_drop == LearnDrop(score="param_change")
    assert space.to_dict()["space"]["learn_drop"]["score"] == scores
    found = problems_of(small(space={"learn_drop": {"score": ["param_change", "param_chnge"]}}))
    assert "did you mean 'param_change'?" in found["space.learn_drop.score"]
    # What plays no part would only make equal trainings look different.
    idle = {"score": "schedule", "threshold": {"low": 0.2, "high": 0.8}, "patience": [1, 2], "warmup": [0.1, 0.2]}
    found = problems_of(small(space={"learn_drop": idle}))
    assert set(found) == {"space.learn_drop.threshold", "space.learn_drop.patience"}
    assert "with score schedule it plays no part; give one value" in found["space.learn_drop.patience"]


def test_a_space_is_frozen() -> None:
    space: Any = parse_space(SMALL)
    with pytest.raises(AttributeError):
        space.num_classes = 3
    assert isinstance(space, SearchSpace)


@pytest.mark.parametrize("features", ["stored", ["recompute", "stored"]])
def test_features_of_streamed_data_cannot_be_stored(features: Any) -> None:
    content = small(
        data={"name": "imagefolder:photos", "image_size": 32, "stream": True},
        space={"learn_drop": {"features": features}},
    )
    (problem,) = check_space(parse_space(content))
    assert problem.key == "space.learn_drop.features"
    assert "'stored' needs images in memory, but 'imagefolder:photos' is streamed" in problem.message
    content["data"]["stream"] = "auto"
    assert check_space(parse_space(content)) == []
    content |= {"data": {**content["data"], "stream": True}, "space": {"learn_drop": {"features": "auto"}}}
    assert check_space(parse_space(content)) == []
