"""YAML that was made to do harm ends with a clear error, quickly."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from made_up_run import made_up_records, write_run

from rlsearch.errors import ConfigError, RunFolderError
from rlsearch.results import read_run
from rlsearch.search.space import load_space
from rlsearch.yaml_file import read_yaml

SECONDS = 10.0  # on a busy machine; each takes less than two
LEVELS = range(1, 30)


def doubled(first: str, inner: str) -> str:
    """Each level holds ten aliases of the one before."""
    aliases = "{aliases}"
    rows = [inner.format(level=level, aliases=",".join([f"*a{level - 1}"] * 10)) for level in LEVELS]
    assert aliases not in "".join(rows)
    return "".join([first, *rows])


BOMBS = {
    "a billion laughs": (doubled("a0: &a0 [x, x]\n", "a{level}: &a{level} [{aliases}]\n"), "aliases written out"),
    "merged maps": (doubled("a0: &a0 {x: 1}\n", "a{level}: &a{level} {{<<: [{aliases}]}}\n"), "aliases written out"),
    "itself": ("model: &a [*a]\n", "refers to itself"),
    "deep lists": ("[" * 200_000, "nested deeper than 40 levels"),
    "deep maps": ("".join(f"{' ' * level}a:\n" for level in range(600)), "nested deeper than 40 levels"),
    "deep dashes": ("- " * 100_000, "nested deeper than 40 levels"),
    "huge": ("#" * (2**18 + 1), "larger than 256 KiB"),
    "many values": ("- a\n" * 60_000, "more than 10,000 values"),
    "many anchors": ("".join(f"- &a{index} x\n" for index in range(15_000)), "more than 10,000 values"),
    "one key again and again": ("a: 1\n" * 4_900, "and 4,799 more"),
    "unknown keys": ("".join(f"k{index}: 1\n" for index in range(4_900)), "unknown key"),
    "a long number": (f"model: 0x{'f' * 200_000}", "more than 400 characters"),
    "a long time": (f"model: {':'.join(['1'] * 100_000)}", "more than 400 characters"),
    "a number that cannot be shown": (f"model: 0x{'f' * 390}", "model: must be a mapping"),
    "a long text": (f"model: '{'x' * 250_000}'", "more than 4096 characters"),
    "a long value in a message": (f"model: [{'abcdefgh, ' * 9_000}]", "must be a mapping"),
    "a tag of Python's": ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a zero": ("model: \x00", "is not valid YAML"),
    "half a character": (
        'model: {name: resnet20}\ndata: {name: digits}\nspace: {"\\ud800": 1}\n',
        "space.\ud800: unknown",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_search_space(tmp_path: Path, bomb: str) -> None:
    text, told = BOMBS[bomb]
    path, started = tmp_path / "space.yaml", time.monotonic()
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_space(path)
    assert time.monotonic() - started < SECONDS
    assert told in str(error.value)
    assert len(str(error.value)) < 15_000


@pytest.mark.parametrize(
    "bomb", ["a billion laughs", "deep lists", "huge", "a tag of Python's", "one key again and again"]
)
def test_the_space_of_a_run(tmp_path: Path, bomb: str) -> None:
    run, started = write_run(tmp_path / "run", made_up_records()), time.monotonic()
    (run / "space.yaml").write_text(BOMBS[bomb][0])
    with pytest.raises(RunFolderError, match=r"space\.yaml: cannot be read"):
        read_run(run)
    assert time.monotonic() - started < SECONDS


def test_what_is_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {x: 1, y: 2}, x: 3}\nd: " + "[" * 35 + "]" * 35)
    content = read_yaml(path)
    assert content["b"] == [[1, 2], [1, 2]]
    assert content["c"] == {"x": 3, "y": 2}
