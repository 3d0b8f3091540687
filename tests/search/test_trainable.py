"""The Trainable without a cluster: one process that trains job after job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlsearch.policy import ModelSpec, Policy, Replacement
from rlsearch.search.trainable import TrialTrainable
from rlsearch.search.worker import Job, WorkerSettings
from rlsearch.training.checkpoint import found_checkpoints, load_checkpoint, load_weights
from rlsearch.training.data import DataSpec, ImageData, load_data
from rlsearch.training.loop import TrainingSpec
from rlsearch.training.trial import Trial
from rlsearch.training.trial_spec import TrialSpec

MODEL = ModelSpec("resnet20")
DATA = DataSpec("digits", limit=120)


@pytest.fixture(scope="module")
def images() -> ImageData:
    return load_data(DATA)


def spec(epochs: int = 2, **training: Any) -> TrialSpec:
    policy = Policy(MODEL, (Replacement("layer1.1", "scalar"), Replacement("layer2.1", "skip")))
    return TrialSpec(MODEL, DATA, TrainingSpec(epochs=epochs, batch_size=32, **training), policy)


@pytest.fixture
def start(tmp_path: Path, images: ImageData) -> Any:
    """Starts a Trainable in this process on its first job."""

    def make(job: Job, cls: type[TrialTrainable] = TrialTrainable, checkpoint_seconds: float = 0.0) -> TrialTrainable:
        settings = WorkerSettings(
            str(tmp_path), packed=2, import_path=str(tmp_path), checkpoint_seconds=checkpoint_seconds
        )

        class Here(cls):  # type: ignore[misc, valid-type]
            def setup(self, config: dict[str, Any]) -> None:
                super().setup(config, settings, images)

        return Here({"job": job})

    return make


def job(folder: Path, number: int, of: TrialSpec) -> Job:
    return Job(number, of, str(folder / "checkpoints" / f"trial-{number:05d}"))


def measured(rows: Any) -> list[dict[str, Any]]:
    """What must not depend on the clock, or on how many trials there are."""
    timed = ("train_seconds", "samples_per_second", "packed")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_a_job_is_trained_to_its_end_and_the_next_one_starts_afresh(start: Any, tmp_path: Path) -> None:
    first, second = job(tmp_path, 0, spec(2)), job(tmp_path, 1, spec(1))
    trainable = start(first)
    results = [trainable.train(), trainable.train()]
    assert [result["done"] for result in results] == [False, True]
    assert [result["epoch"] for result in results] == [1, 2]  # flat: a scheduler reads them
    assert [result["packed"] for result in results] == [2, 2]
    outcome = results[1]["outcome"]
    assert (outcome.state, outcome.reason, len(outcome.epochs)) == ("COMPLETE", None, 2)

    assert trainable.reset_config({"job": second})
    result = trainable.train()
    assert result["done"]
    assert [row["epochs"] for row in result["outcome"].epochs] == [1]
    alone = Trial(second.spec, data=load_data(DATA), device="cpu")
    assert measured([alone.run_epoch().to_dict()]) == measured(result["outcome"].epochs)
    load_weights(Path(second.checkpoints) / "model.safetensors", alone.model)


def test_a_training_that_fails_is_a_result_and_the_process_goes_on(start: Any, tmp_path: Path) -> None:
    trainable = start(job(tmp_path, 0, spec(3, lr=1e30)))
    result = trainable.train()
    while not result["done"]:
        result = trainable.train()
    assert result["outcome"].state == "FAIL"
    assert result["outcome"].reason.startswith("diverged: the ")
    assert "DivergedError" in result["outcome"].detail
    trainable.reset_config({"job": job(tmp_path, 1, spec(1))})
    assert trainable.train()["outcome"].state == "COMPLETE"


GREEDY = """
from torch import nn

from rlsearch import build_model


class Greedy(nn.Module):
    def forward(self, images):
        return images + images.new_empty(2**50).sum()


def build(num_classes):
    return nn.Sequential(Greedy(), build_model("resnet20", num_classes))
"""


def test_memory_that_runs_out_makes_a_trial_infeasible(start: Any, tmp_path: Path) -> None:
    # A petabyte asked of torch's real allocator, in the forward pass.
    (tmp_path / "greedy_model.py").write_text(GREEDY)
    model = ModelSpec("greedy_model:build")
    greedy = dataclasses.replace(spec(1), model=model, policy=Policy(model))
    trainable = start(job(tmp_path, 0, greedy))
    outcome = trainable.train()["outcome"]
    assert outcome.state == "INFEASIBLE"
    assert outcome.reason.startswith("out_of_memory: ")
    trainable.reset_config({"job": job(tmp_path, 1, spec(1))})
    assert trainable.train()["outcome"].state == "COMPLETE"


def test_a_user_error_in_a_worker_names_itself(start: Any, tmp_path: Path) -> None:
    unknown = dataclasses.replace(spec(1), model=ModelSpec("resnet21"))
    outcome = start(job(tmp_path, 0, unknown)).train()["outcome"]
    assert outcome.state == "FAIL"
    assert outcome.reason.startswith("ModelError: ")
    assert "resnet21" in outcome.reason


def test_a_killed_job_goes_on_from_its_checkpoint_as_if_nothing_had_happened(start: Any, tmp_path: Path) -> None:
    straight = start(job(tmp_path, 0, spec(3)))
    while not (result := straight.train())["done"]:
        pass
    killed = job(tmp_path, 1, spec(3))
    start(killed).train()
    assert [row["epoch"] for row in load_checkpoint(Path(killed.checkpoints) / "last.pt")["epochs"]] == [1]
    again = start(killed)
    assert again.train()["epoch"] == 2
    assert measured(again.train()["outcome"].epochs) == measured(result["outcome"].epochs)


@pytest.mark.parametrize("damage", ["truncated", "of another policy"])
def test_a_checkpoint_that_cannot_be_used_is_noted_and_training_starts_again(
    start: Any, tmp_path: Path, damage: str
) -> None:
    damaged = job(tmp_path, 0, spec(2))
    start(damaged).train()
    path = Path(damaged.checkpoints) / "last.pt"
    if damage == "truncated":
        for file in found_checkpoints(path):
            file.write_bytes(file.read_bytes()[:1000])
    else:
        damaged = dataclasses.replace(damaged, spec=dataclasses.replace(damaged.spec, policy=Policy(MODEL)))
    again = start(damaged)
    assert again.train()["epoch"] == 1
    outcome = again.train()["outcome"]
    assert outcome.state == "COMPLETE"
    assert outcome.reason.startswith("started again, its checkpoint could not be used: ")


def test_a_trial_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(start: Any, tmp_path: Path) -> None:
    straight = start(job(tmp_path, 0, spec(3)))
    while not (result := straight.train())["done"]:
        pass
    killed = job(tmp_path, 1, spec(3))
    first = start(killed)
    first.train(), first.train()
    path = Path(killed.checkpoints) / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a single bit of some weight
    path.write_bytes(content)
    again = start(killed)
    assert again.train()["epoch"] == 2
    outcome = again.train()["outcome"]
    assert outcome.state == "COMPLETE"
    assert outcome.reason.startswith(
        "went on from the checkpoint before the last, which could not be used: UserError: "
    )
    assert measured(outcome.epochs) == measured(result["outcome"].epochs)


def test_short_trials_write_no_checkpoint(start: Any, tmp_path: Path) -> None:
    short = job(tmp_path, 0, spec(2))
    start(short, checkpoint_seconds=600.0).train()
    assert list(Path(short.checkpoints).iterdir()) == []


def test_a_run_folder_that_the_node_does_not_see_fails_the_trial(start: Any, tmp_path: Path) -> None:
    trainable = start(job(tmp_path, 0, spec(1)))
    trainable._settings = dataclasses.replace(trainable._settings, folder=str(tmp_path / "elsewhere"))
    outcome = trainable.train()["outcome"]
    assert outcome.state == "FAIL"
    assert "shared" not in outcome.state
    assert "storage that all nodes share" in outcome.reason
