"""The folder of one search: its files, who may write to it, and how its tables follow the study."""

from __future__ import annotations

import contextlib
import difflib
import json
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlsearch._version import __version__
from rlsearch.errors import ConfigError, RunFolderError
from rlsearch.files import check_inside, write_atomic
from rlsearch.results.tables import TrialRecord, epochs_path, read_epochs, read_trials, write_epochs, write_trials
from rlsearch.results.tensorboard import is_whole, write_trial
from rlsearch.run_lock import LOCK_FILE, run_lock
from rlsearch.search.database import SQLITE
from rlsearch.search.study_file import STUDY_FILES
from rlsearch.yaml_file import read_yaml

_SPACE, _VERSIONS = "space.yaml", "versions.json"
# What `rlsearch.files.replacing` writes to before it renames.
_LEFTOVER = re.compile(r"\..+\.(db|html|json|parquet|png|pt|rlsearch|safetensors|yaml)\.[a-z0-9_]{8}(-journal)?")
# What SQLite ends a journal with that names another.
_JOURNAL_MARK = bytes.fromhex("d9d505f920a163d7")
_PACKAGES = ("torch", "torchvision", "ray", "optuna", "numpy")


class RunFolder:
    """The paths of a run, and its tables.

    Attributes:
        path: the folder, absolute.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        # As the study has it, once it was written or compared: the table of trials says which space they are of.
        self._space: Mapping[str, Any] | None = None

    @property
    def study_path(self) -> Path:
        """The file of the study; that of SQLite where there is none."""
        found = [file for name in STUDY_FILES.values() if (file := self.path / name).is_file()]
        return found[0] if found else self.path / STUDY_FILES[SQLITE]

    @property
    def trials_path(self) -> Path:
        """The table of trials."""
        return self.path / "trials.parquet"

    def checkpoints(self, number: int) -> Path:
        """Where the state of a running trial and the weights of a complete one lie."""
        return self.path / "checkpoints" / f"trial-{number:05d}"

    def check_free(self) -> None:
        """Whether a new search may be started here; nothing is written.

        Raises:
            RunFolderError: the folder holds a search, or anything else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path}: is a file; give another --run-dir")
        if self.study_path.exists():
            raise RunFolderError(
                f"{self.path}: holds a search already; go on with it by `rlsearch resume {self.path}`, "
                "or give another --run-dir"
            )
        names = {entry.name for entry in self.path.iterdir() if not _LEFTOVER.fullmatch(entry.name)}
        others = sorted(names - {LOCK_FILE})
        if others:
            raise RunFolderError(
                f"{self.path}: is not empty ({', '.join(others[:3])}) and holds no run; give another --run-dir"
            )

    def check_run(self) -> None:
        """Whether there is a search here that can be resumed, and nothing that would reach out of the folder.

        Raises:
            RunFolderError: there is none, or something would.
        """
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path}: there is no such folder; give the --run-dir of a search")
        if not self.study_path.is_file():
            raise RunFolderError(f"{self.study_path}: is missing, so there is no run to resume; restore it from a copy")
        check_inside(self.path)
        _check_journal(self.path / f"{STUDY_FILES[SQLITE]}-journal")

    def holds_search(self) -> bool:
        """Whether a search has begun here; ``space.yaml`` is written once the study is whole."""
        return self.study_path.is_file() and (self.path / _SPACE).is_file()

    def discard_start(self) -> None:
        """Deletes what a search leaves that could not even begin, so that the same command can start again."""
        for name in (*STUDY_FILES.values(), _SPACE, _VERSIONS):
            (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The right to write to this folder, for as long as the block runs; makes the folder.

        Raises:
            RunFolderError: the folder cannot be made, or as `rlsearch.run_lock.run_lock`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot be made ({error.strerror}); give a --run-dir in a folder that you may write to"
            ) from None
        with run_lock(self.path):
            yield

    def write_space(self, space: Mapping[str, Any]) -> None:
        """Writes the resolved search space, and the versions of what runs it."""
        self._space = space
        write_atomic(self.path / _SPACE, _to_yaml(space).encode())
        self.write_versions("start")

    def restore_space(self, space: Mapping[str, Any]) -> str | None:
        """Writes ``space.yaml`` as the study has it, where it is otherwise; what was wrong with it."""
        self._space = space
        file, expected = self.path / _SPACE, _to_yaml(space)
        if not file.exists():
            wrong = f"{_SPACE}: is missing"
        else:
            try:
                if _to_yaml(read_yaml(file)) == expected:
                    return None
                wrong = f"{_SPACE}: was not what the study was made for"
            except ConfigError as error:
                wrong = f"{_SPACE}: cannot be read ({error.problems[0]})"
        write_atomic(file, expected.encode())
        return wrong

    def remove_leftovers(self) -> list[str]:
        """Deletes the temporary files that killed processes have left; what they were."""
        found = [path for path in self.path.rglob(".*") if path.is_file() and _LEFTOVER.fullmatch(path.name)]
        for path in found:
            path.unlink()
        return [f"{path.relative_to(self.path)}: left by a process that was killed" for path in found]

    def check_space(self, space: Mapping[str, Any]) -> None:
        """Whether ``space.yaml`` still says what the study was made for; written anew where it is missing.

        Raises:
            RunFolderError: it was changed; the message shows the difference.
        """
        self._space = space
        file, expected = self.path / _SPACE, _to_yaml(space)
        if not file.exists():
            write_atomic(file, expected.encode())
            return
        try:
            found = _to_yaml(read_yaml(file))
        except ConfigError as error:
            told = f"cannot be read ({error.problems[0]}); delete it: a resume writes it anew"
            raise RunFolderError(f"{file}: {told}") from None
        if found != expected:
            changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), "study", "space.yaml", "", "", 0)
            raise RunFolderError(
                f"{file}: is no longer what this search was started with; undo the change (or delete the file: a "
                f"resume writes it anew), and start another search for another space:\n" + "\n".join(changes)
            )

    def write_versions(self, event: str) -> None:
        """Adds what runs the search now to ``versions.json``."""
        file = self.path / _VERSIONS
        try:
            history = json.loads(file.read_text(encoding="utf-8"))["history"]
        except (OSError, ValueError, KeyError, TypeError):
            history = []  # it is there for people; a search does not end because of it
        packages = {name: metadata.version(name) for name in _PACKAGES}
        now = {"event": event, "at": _now(), "rlsearch": __version__, "python": platform.python_version(), **packages}
        write_atomic(file, (json.dumps({"history": [*history, now]}, indent=2) + "\n").encode())

    def write_trial(self, record: TrialRecord, epochs: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> None:
        """Writes what belongs to one trial that has ended."""
        if epochs:
            write_epochs(epochs_path(self.path, record.trial), epochs)
        write_trial(self.path / "tensorboard", record, epochs, objectives)
        weights = self.checkpoints(record.trial)
        if record.state in ("COMPLETE", "INFEASIBLE"):
            for file in weights.glob("*"):
                if file.name != "model.safetensors":  # checkpoints, and what a lost process has left
                    file.unlink(missing_ok=True)
        else:
            shutil.rmtree(weights, ignore_errors=True)

    def write_trials(self, records: Sequence[TrialRecord]) -> None:
        """Writes the table of trials."""
        write_trials(self.trials_path, records, self._space)

    def follow(
        self, records: Sequence[TrialRecord], epochs_of: Any, objectives: Sequence[str], *, thorough: bool = False
    ) -> list[str]:
        """Makes tables and TensorBoard say what the study says; what they say already is left alone.

        Args:
            records: of the study.
            epochs_of: from a trial's number to its epochs.
            objectives: of the search.
            thorough: read TensorBoard's files to their ends too, which takes some milliseconds a trial.

        Returns:
            what was mended, a line each.
        """
        known, mended = self._known_records(records)
        for record in records:
            wrong = self._wrong_epochs(record)
            if wrong is None and thorough and not is_whole(self.path / "tensorboard", record):
                wrong = f"tensorboard/trial-{record.trial:05d}: is damaged"
            if wrong is None and known is not None and known.get(record.trial) != record:
                wrong = f"trial {record.trial}: the table of trials did not have it as the study has it"
            if wrong is not None:
                mended.append(wrong)
            if wrong is not None or known is None:
                self.write_trial(record, epochs_of(record.trial), objectives)
        self.write_trials(records)
        numbers = {record.trial for record in records}
        for stray in (self.path / "epochs").glob("trial-*.parquet"):
            if re.fullmatch(r"trial-\d{5,}", stray.stem) and int(stray.stem.removeprefix("trial-")) not in numbers:
                stray.unlink()
                mended.append(f"epochs/{stray.name}: the study has no such trial")
        return mended

    def _known_records(self, records: Sequence[TrialRecord]) -> tuple[dict[int, TrialRecord] | None, list[str]]:
        """The table of trials by number, None where it cannot be read; and what is wrong with it as a whole."""
        try:
            known = {record.trial: record for record in read_trials(self.trials_path)}
        except RunFolderError as error:
            return None, [_short(error)] if records else []
        strays = sorted(known.keys() - {record.trial for record in records})
        return known, [f"{self.trials_path.name}: the study has no trial {number}" for number in strays]

    def _wrong_epochs(self, record: TrialRecord) -> str | None:
        """What is wrong with the table of a trial's epochs, or with TensorBoard's view of it; None where nothing is."""
        if not (self.path / "tensorboard" / f"trial-{record.trial:05d}" / "result").is_dir():
            return f"tensorboard/trial-{record.trial:05d}: is missing"
        path = epochs_path(self.path, record.trial)
        if not record.fidelity:
            return None
        try:
            found = len(read_epochs(path))
        except RunFolderError as error:
            return _short(error)
        return None if found == record.fidelity else f"epochs/{path.name}: has {found} of {record.fidelity} epochs"


def _check_journal(path: Path) -> None:
    """Whether SQLite may undo what a killed search was writing, as it does when it opens the study.

    A journal may name the journal of a group of databases. SQLite deletes the file of that name, whatever it is, and a
    study never has one.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_JOURNAL_MARK)))
        if file.read() == _JOURNAL_MARK:
            raise RunFolderError(f"{path}: names another file, which SQLite would delete; delete {path.name}")


def _short(error: RunFolderError) -> str:
    """A damaged table in words, without what would help: it is written anew."""
    return str(error).partition(";")[0]


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _to_yaml(space: Any) -> str:
    return yaml.safe_dump(space, sort_keys=False, allow_unicode=True)
