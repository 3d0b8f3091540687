"""Makes everything in a run's folder say what its study says, and tells what of it did not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlsearch.errors import ModelError
from rlsearch.results import candidates, read_run
from rlsearch.results.report import write_report
from rlsearch.results.tables import TrialRecord
from rlsearch.search.database import Told, unheard
from rlsearch.search.run_folder import RunFolder
from rlsearch.search.study import RunStudy
from rlsearch.search.unsaved import settle
from rlsearch.training.checkpoint import read_weights


@dataclass(frozen=True)
class Repaired:
    """What `repair_run` found.

    Attributes:
        trials: how many have ended.
        mended: what was wrong and is no longer, a line each.
        lost: what no study can bring back (weights), a line each.
    """

    trials: int
    mended: tuple[str, ...]
    lost: tuple[str, ...]


def repair_run(run_dir: str | Path, told: Told = unheard) -> Repaired:
    """Makes tables, TensorBoard, ``space.yaml`` and the report of a run follow from its study again.

    Args:
        run_dir: the run's folder; no search may be going on in it.
        told: hears what it waits for, where the study's database is locked or away.

    Raises:
        UserError: there is no run, it is in use, or the study itself is damaged.
        OSError: a file cannot be written.
    """
    folder = RunFolder(run_dir)
    folder.check_run()
    with folder.locked(), (study := RunStudy.open(folder.study_path, told)).held():
        mended = settle(study, folder.path)
        wrong = folder.restore_space(study.space)
        mended += [] if wrong is None else [wrong]
        records = study.records()
        mended += folder.follow(records, study.epochs, list(study.objectives), thorough=True)
        mended += folder.remove_leftovers()
        run = read_run(folder.path)
        if candidates(run):
            write_report(run)
    return Repaired(len(records), tuple(mended), tuple(_lost(folder, records)))


def _lost(folder: RunFolder, records: list[TrialRecord]) -> list[str]:
    """The complete trials whose weights cannot be read."""
    found = []
    for record in records:
        if record.state != "COMPLETE":
            continue
        path = folder.checkpoints(record.trial) / "model.safetensors"
        if not path.exists():
            found.append(f"{path.relative_to(folder.path)}: is missing; trial {record.trial} cannot be exported")
            continue
        try:
            read_weights(path)
        except ModelError as error:
            told = str(error).removeprefix(f"{path}: ").partition(";")[0]
            found.append(f"{path.relative_to(folder.path)}: {told}; trial {record.trial} cannot be exported")
    return found
