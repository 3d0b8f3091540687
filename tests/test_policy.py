"""policy.json: what is written is what is read, and every mistake is named at once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsearch import LearnDrop, ModelSpec, Policy, Replacement
from rlsearch.errors import ConfigError
from rlsearch.policy import FEATURES, SCORES

NAMES = st.text("abcdefgh0123456789._", min_size=1, max_size=12)
FRACTIONS = st.floats(0, 1)
REPLACEMENTS = st.builds(
    Replacement, NAMES, st.sampled_from(["skip", "scalar"]), st.dictionaries(NAMES, st.integers() | NAMES, max_size=2)
)
POLICIES = st.builds(
    Policy,
    model=st.none() | st.builds(ModelSpec, NAMES, st.integers(1, 1000), st.just({}), st.none() | NAMES),
    replacements=st.lists(REPLACEMENTS, max_size=5, unique_by=lambda item: item.unit).map(
        lambda items: tuple(sorted(items, key=lambda item: item.unit))
    ),
    learn_drop=st.none()
    | st.builds(
        LearnDrop,
        threshold=st.floats(1e-6, 1),
        patience=st.integers(1, 9),
        warmup=FRACTIONS,
        max_fraction=FRACTIONS,
        score=st.sampled_from(SCORES),
        features=st.sampled_from(FEATURES),
    ),
    provenance=st.dictionaries(NAMES, st.integers(), max_size=2),
)


@given(POLICIES)
def test_a_policy_survives_json(policy: Policy) -> None:
    read = Policy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert read == policy
    assert read.hash == policy.hash


@given(POLICIES, st.randoms())
def test_the_hash_is_of_what_is_trained(policy: Policy, random: object) -> None:
    shuffled = list(policy.replacements)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert replace(policy, replacements=tuple(shuffled), provenance={"run": "another"}).hash == policy.hash
    assert replace(policy, replacements=(*policy.replacements, Replacement("zz", "skip"))).hash != policy.hash


def test_saving_and_loading(tmp_path: Path) -> None:
    policy = Policy(ModelSpec("resnet32"), (Replacement("layer1.2", "scalar", {"init": "half"}),), LearnDrop())
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    assert json.loads((tmp_path / "policy.json").read_text()) == {
        "schema": "rlsearch.policy/1",
        "model": {"name": "resnet32", "num_classes": 10, "kwargs": {}},
        "replacements": [{"unit": "layer1.2", "block": "scalar", "options": {"init": "half"}}],
        "learn_drop": {
            "score": "param_change",
            "threshold": 0.65,
            "patience": 2,
            "interval": 1,
            "warmup": 0.3,
            "max_fraction": 0.9,
            "features": "auto",
        },
        "provenance": {},
    }


def test_every_mistake_is_named_at_once() -> None:
    content = {
        "schema": "rlsearch.policy/1",
        "replacments": [],
        "model": {"name": 3, "num_classes": 0},
        "replacements": [{"unit": "a", "block": "skip"}, {"unit": "a", "block": "skip"}, {"unit": "b", "blok": "skip"}],
        "learn_drop": {"treshold": 0.1, "patience": 0, "features": "storde", "warmup": True},
    }
    with pytest.raises(ConfigError) as caught:
        Policy.from_dict(content, "mine.json")
    assert {problem.key for problem in caught.value.problems} == {
        "replacments",
        "model.name",
        "replacements[1].unit",
        "replacements[2].blok",
        "replacements[2].block",
        "learn_drop.treshold",
        "learn_drop.warmup",
    }
    assert "did you mean 'threshold'?" in str(caught.value)
    assert str(caught.value).startswith("mine.json: 7 problems")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"threshold": 0}, "learn_drop.threshold"),
        ({"threshold": float("inf")}, "learn_drop.threshold"),
        ({"patience": 0}, "learn_drop.patience"),
        ({"interval": 0}, "learn_drop.interval"),
        ({"warmup": 1.5}, "learn_drop.warmup"),
        ({"max_fraction": -0.1}, "learn_drop.max_fraction"),
        ({"score": "param_chnage"}, "learn_drop.score"),
        ({"features": "store"}, "learn_drop.features"),
    ],
)
def test_ranges(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy.from_dict({"schema": "rlsearch.policy/1", "learn_drop": settings})
    assert [problem.key for problem in caught.value.problems] == [key]


NO_COUNTS: list[Any] = [0, -1, 1.5, 2.0, True, "2", None, math.nan, math.inf]
NO_SHARES: list[Any] = [-0.1, 1.1, True, "0.5", None, math.nan, math.inf, -math.inf]
WRONG: dict[str, list[Any]] = {
    "threshold": [0, 0.0, *NO_SHARES],
    "patience": NO_COUNTS,
    "interval": NO_COUNTS,
    "warmup": NO_SHARES,
    "max_fraction": NO_SHARES,
    "score": ["", "param_chnage", 3, None, ["schedule"]],
    "features": ["", "store", True, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_made_in_python_are_checked_as_those_of_a_file(name: str, value: Any) -> None:
    (problem,) = LearnDrop(**{name: value}).problems("mine")
    assert problem.key == f"mine.{name}"
    assert str(value) in problem.message


def test_settings_at_the_ends_of_their_ranges_are_fine() -> None:
    assert LearnDrop(threshold=1, patience=1, interval=1, warmup=0, max_fraction=1).problems() == []
    assert LearnDrop(threshold=1e-9, patience=99, interval=99, warmup=1.0, max_fraction=0.0).problems() == []


@pytest.mark.parametrize(
    ("score", "near"),
    [
        ("param_chnage", "param_change"),
        ("param_change_perlr", "param_change_per_lr"),
        ("gradient_change", "grad_change"),
        ("scheduled", "schedule"),
    ],
)
def test_an_unknown_score_suggests_the_near_one(score: str, near: str) -> None:
    (problem,) = LearnDrop(score=score).problems()
    assert str(problem) == f"learn_drop.score: unknown score {score!r}; did you mean {near!r}?"


@pytest.mark.parametrize("length", [0, 1, 40, 200])
def test_a_truncated_policy_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "policy.json"
    Policy(ModelSpec("resnet32"), (Replacement("layer1.2", "skip"),), LearnDrop()).save(path)
    path.write_text(path.read_text()[:length])
    with pytest.raises(ConfigError, match="truncated"):
        Policy.load(path)


def test_unreadable_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Policy.load(tmp_path / "binary.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="a mapping"):
        Policy.load(tmp_path / "list.json")
