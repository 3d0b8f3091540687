"""A search space that was altered after its trials were trained is refused by everything that shows or uses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_run import SPACE, made_up_records

from rlsearch.results import read_run
from rlsearch.results.tables import read_trials, write_trials

COMMANDS = {"pareto": [], "report": [], "confirm": [], "export": ["--out", "out"]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("params: minimize", "params: maximize"),  # another front
        ("  batch_size: 64", "  batch_size: 32"),
        (
            "objectives:\n  accuracy: maximize\n  params: minimize",
            "objectives:\n  params: minimize\n  accuracy: maximize",
        ),
    ],
)
def test_an_altered_space_ends_with_2(
    run_folder: Path, tmp_path: Path, in_process: Callable[..., Any], command: str, old: str, new: str
) -> None:
    file = run_folder / "space.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    done = in_process(command, run_folder, *COMMANDS[command], cwd=tmp_path)
    assert done.returncode == 2
    assert f"{file}: was changed since its trials were trained" in done.stderr
    assert f"rlsearch repair {run_folder}" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_other_words_for_the_same_space_and_a_run_of_an_earlier_version_are_read(run_folder: Path) -> None:
    before, file = read_run(run_folder), run_folder / "space.yaml"
    file.write_text("# a note\n" + file.read_text().replace("lr: 0.1", "lr: 0.10"))
    assert read_run(run_folder) == before
    write_trials(run_folder / "trials.parquet", read_trials(run_folder / "trials.parquet"))
    file.write_text(file.read_text().replace("params: minimize", "params: maximize"))
    assert read_run(run_folder).objectives["params"] == "maximize"


def test_a_space_that_is_no_plain_content_is_another(make_run: Callable[..., Path]) -> None:
    run = make_run(made_up_records())
    before, file = SPACE["training"], run / "space.yaml"
    assert isinstance(before, dict)
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 2026-11-20"))
    with pytest.raises(ValueError, match="was changed since"):
        read_run(run)
