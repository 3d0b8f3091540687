"""What tests of several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlsearch import LearnDrop, ModelSpec, Policy, Replacement
from rlsearch.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int | str | None
    stdout: str
    stderr: str


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the program's own entry point; starting a process for each would take the suite a minute."""

    def run(*arguments: object, cwd: Path | None = None) -> Done:
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr("sys.argv", ["rlsearch", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Done(ended.value.code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of ResNet-20 with two replaced units and Learn&Drop."""
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    replacements = (Replacement("layer1.1", "scalar"), Replacement("layer2.2", "skip"))
    Policy(ModelSpec("resnet20"), replacements, LearnDrop()).save(path)
    return path
