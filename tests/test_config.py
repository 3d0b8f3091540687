"""Settings are read strictly: types, unknown keys, ranges; everything that is wrong, at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlsearch.config import from_mapping, typed
from rlsearch.errors import ConfigError, Problem, suggestion


@dataclass(frozen=True)
class Settings:
    name: str
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    limit: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def problems(self, key: str) -> list[Problem]:
        return [] if self.count > 0 else [Problem(f"{key}.count", f"must be above 0, got {self.count}")]


def read(content: Any) -> tuple[Settings | None, list[str]]:
    problems: list[Problem] = []
    settings = from_mapping(Settings, content, "top", problems)
    return settings, [problem.key for problem in problems]


def test_right_content() -> None:
    content = {"name": "a", "count": 2, "rate": 1, "flag": True, "limit": None, "extra": {"x": [1]}}
    settings, keys = read(content)
    assert (settings, keys) == (Settings("a", 2, 1.0, True, None, {"x": [1]}), [])
    assert isinstance(settings.rate, float)  # type: ignore[union-attr]
    assert read({"name": "a"}) == (Settings("a"), [])


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"count": 2}, ["top.name"]),
        ({"name": "a", "cuont": 2, "rat": 1}, ["top.cuont", "top.rat"]),
        ({"name": 1, "count": 1.5, "rate": "x", "flag": 1, "limit": "no", "extra": []},
         ["top.name", "top.count", "top.rate", "top.flag", "top.limit", "top.extra"]),
        ({"name": "a", "count": True}, ["top.count"]),
        ({"name": "a", "count": 0}, ["top.count"]),
        ({"name": "a", "count": None}, ["top.count"]),
        ([], ["top"]),
        (None, ["top"]),
    ],
)  # fmt: skip
def test_wrong_content(content: Any, keys: list[str]) -> None:
    assert read(content)[1] == keys


def test_numbers_that_yaml_reads_as_text() -> None:
    problems: list[Problem] = []
    assert typed("1e-3", float, "lr", problems) is None
    assert "write it with a decimal point" in problems[0].message


def test_messages() -> None:
    assert suggestion("treshold", ["threshold", "patience"]) == "; did you mean 'threshold'?"
    assert suggestion("zzz", ["b", "a"]) == "; known: a, b"
    assert suggestion("zzz", []) == ""
    error = ConfigError([Problem("a.b", "is wrong"), Problem("", "cannot be read")], "file.yaml")
    assert str(error) == "file.yaml: 2 problems\n  - a.b: is wrong\n  - cannot be read"
    assert isinstance(error, ValueError)
