"""Everything in a run's folder follows from its study again, whatever has happened to it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from studied_run import rows, studied_run

from rlsearch.errors import RunFolderError
from rlsearch.results import front, read_run
from rlsearch.results.tables import epochs_path, read_epochs
from rlsearch.run_lock import run_lock
from rlsearch.search.outcome import Outcome
from rlsearch.search.repair import Repaired, repair_run
from rlsearch.search.study import RunStudy


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A run with trials that a kill has left open."""
    return studied_run(tmp_path / "run")


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = studied_run(tmp_path_factory.mktemp("repaired") / "run")
    repair_run(folder)
    return folder


@pytest.fixture
def run(repaired: Path, tmp_path: Path) -> Path:
    """A run that was repaired."""
    return Path(shutil.copytree(repaired, tmp_path / "run"))


def test_a_whole_run_has_nothing_to_mend(run: Path) -> None:
    assert repair_run(run) == Repaired(4, (), ())
    assert {"report.html", "front.png"} <= {path.name for path in run.iterdir()}


def test_open_trials_are_closed_or_queued(torn: Path) -> None:
    study = RunStudy.open(torn / "study.db")
    study._keep(study._trial_id(5), Outcome("COMPLETE", rows(2, 0.8, 10)))
    told = repair_run(torn)
    assert told.mended == (
        "trial 4: was left running; a resume takes it up again",
        "trial 5: had ended as COMPLETE, and was not closed",
        "tensorboard/trial-00005: is missing",
    )
    assert told.lost == ("checkpoints/trial-00005/model.safetensors: is missing; trial 5 cannot be exported",)
    assert [record.trial for record in read_run(torn).records] == [0, 1, 2, 3, 5]
    assert len(read_epochs(epochs_path(torn, 5))) == 2


DAMAGES = {
    "trials.parquet": "is damaged",
    "epochs/trial-00002.parquet": "is damaged",
    "space.yaml": "space.yaml: ",
    "checkpoints/trial-00001/model.safetensors": "cannot be exported",
    "tensorboard/trial-00003/events.out.tfevents.rlsearch": "tensorboard/trial-00003: is damaged",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_cut_short_is_written_anew_or_told(run: Path, name: str) -> None:
    before, members = read_run(run).records, [item.trial for item in front(read_run(run))]
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    told = repair_run(run)
    (line,) = told.mended + told.lost
    assert DAMAGES[name] in line
    assert read_run(run).records == before
    assert [item.trial for item in front(read_run(run))] == members
    assert repair_run(run).mended == ()


@pytest.mark.parametrize(
    "name", ["trials.parquet", "space.yaml", "epochs", "tensorboard", "epochs/trial-00003.parquet"]
)
def test_what_was_deleted_is_written_anew(run: Path, name: str) -> None:
    before = read_run(run).records
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    assert repair_run(run).mended
    assert read_run(run).records == before
    assert len(read_epochs(epochs_path(run, 3))) == 2
    assert (run / "tensorboard" / "trial-00003" / "result").is_dir()
    assert repair_run(run).mended == ()


def test_an_altered_search_space_is_noticed_and_mended(run: Path) -> None:
    before, file = read_run(run), run / "space.yaml"
    file.write_text(file.read_text().replace("params: minimize", "params: maximize"))
    with pytest.raises(RunFolderError, match=r"space\.yaml: was changed since .* `rlsearch repair"):
        read_run(run)
    assert repair_run(run).mended == ("space.yaml: was not what the study was made for",)
    assert read_run(run) == before


def test_flipped_bits_never_make_a_wrong_table(run: Path) -> None:
    before, table = read_run(run).records, run / "trials.parquet"
    content, rng = table.read_bytes(), random.Random(0)
    for place in rng.sample(range(len(content)), 8):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        table.write_bytes(flipped)
        repair_run(run)
        assert read_run(run).records == before


def test_what_belongs_to_no_trial_and_what_a_kill_has_left_is_removed(run: Path) -> None:
    shutil.copy(epochs_path(run, 1), epochs_path(run, 77))
    (run / ".trials.parquet.abc12_x9").write_bytes(b"half")
    (run / ".study.db.abc12_x9-journal").write_bytes(b"half")
    (run / ".vimrc.settings").touch()  # somebody's own
    assert set(repair_run(run).mended) == {
        "epochs/trial-00077.parquet: the study has no such trial",
        ".trials.parquet.abc12_x9: left by a process that was killed",
        ".study.db.abc12_x9-journal: left by a process that was killed",
    }
    assert [path.name for path in run.glob(".*")] == [".vimrc.settings"]


def test_a_run_in_use_or_without_its_study_is_refused(run: Path) -> None:
    with run_lock(run), pytest.raises(RunFolderError, match="in use"):
        repair_run(run)
    study = run / "study.db"
    study.write_bytes(study.read_bytes()[:5000])
    with pytest.raises(RunFolderError, match=r"study.db: is damaged .* restore it from a copy"):
        repair_run(run)
    assert json.loads((run / "versions.json").read_text())
