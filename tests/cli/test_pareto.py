"""``rlsearch pareto`` and ``rlsearch report`` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsearch import cli
from rlsearch.results import read_run, select, summary
from rlsearch.results.where import parse_where

Outcome = tuple[int, str, str]


@pytest.fixture
def rlsearch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process; gives the exit code, what was printed, and what went to stderr."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["rlsearch", *map(str, arguments)])
        # The command line puts the working folder on the path; that must not outlive the test.
        monkeypatch.syspath_prepend(".")
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return run


def test_json_is_the_summary(rlsearch: Callable[..., Outcome], run_folder: Path) -> None:
    code, out, err = rlsearch("pareto", run_folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == summary(read_run(run_folder))


def test_where_and_select_reach_the_summary(rlsearch: Callable[..., Outcome], run_folder: Path) -> None:
    text = "accuracy>=0.95 and params<=0.9x"
    code, out, _ = rlsearch("pareto", run_folder, "--json", "--where", text, "--select", "memory")
    expected = summary(read_run(run_folder), "memory", parse_where(text))
    assert code == 0
    assert json.loads(out) == expected
    assert expected != summary(read_run(run_folder))


def test_the_table_names_the_pick(rlsearch: Callable[..., Outcome], run_folder: Path) -> None:
    code, out, _ = rlsearch("pareto", run_folder)
    assert code == 0
    assert f"★ trial {select(read_run(run_folder)).trial} is the knee" in out
    assert "baseline" in out
    assert "skip control (trial 1)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--select", "acuracy"], "unknown objective 'acuracy'; did you mean 'accuracy'?"),
        (["--where", "acuracy>=1"], "unknown metric; did you mean 'accuracy'?"),
        (["--where", "accuracy=>1"], "must be METRIC, one of"),
        (["--where", "accuracy>=1.5"], "none of the 21 complete trials meets accuracy>=1.5"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_bad_options_end_with_2_and_one_message(
    rlsearch: Callable[..., Outcome], run_folder: Path, arguments: list[str], message: str, form: list[str]
) -> None:
    code, out, err = rlsearch("pareto", run_folder, *arguments, *form)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_that_holds_no_run_ends_with_2(rlsearch: Callable[..., Outcome], tmp_path: Path) -> None:
    for command in ("pareto", "report"):
        code, out, err = rlsearch(command, tmp_path)
        assert (code, out) == (2, "")
        assert "space.yaml: is missing" in err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_table_ends_with_2_and_is_named(rlsearch: Callable[..., Outcome], run_folder: Path) -> None:
    path = run_folder / "trials.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    for command in ("pareto", "report"):
        code, out, err = rlsearch(command, run_folder)
        assert (code, out) == (2, "")
        assert f"{path}: is damaged" in err


def test_a_run_without_a_complete_trial_ends_with_2(
    rlsearch: Callable[..., Outcome], make_record: Any, make_run: Any
) -> None:
    folder = make_run([make_record(0, state="FAIL", reason="diverged", accuracy=None)])
    for arguments in (["pareto"], ["pareto", "--json"], ["report"]):
        code, out, err = rlsearch(*arguments, folder)
        assert (code, out) == (2, "")
        assert "no trial is complete, so there is no front: 1 FAIL (reasons: diverged × 1)" in err


def test_report_writes_its_files_and_says_where(rlsearch: Callable[..., Outcome], run_folder: Path) -> None:
    code, out, _ = rlsearch("report", run_folder)
    assert code == 0
    paths = {"report": "report.html", "front": "front.png", "units": "units.png"}
    assert out.split("written: ")[1:] == [f"{run_folder / name}\n" for name in paths.values()]
    code, out, _ = rlsearch("report", run_folder, "--json", "--select", "params")
    assert json.loads(out) == {name: str(run_folder / path) for name, path in paths.items()}
    assert "the best params on the front" in (run_folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["pareto", "report"])
def test_help_has_an_example(rlsearch: Callable[..., Outcome], command: str) -> None:
    code, out, _ = rlsearch(command, "--help")
    assert code == 0
    assert f"Example: rlsearch {command} runs/digits" in out
