"""Two processes with a part of every batch each train, step for step, what one process trains from whole batches."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlsearch import DataSpec, LearnDrop, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec
from rlsearch.errors import DivergedError
from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint
from rlsearch.training.distributed import (
    Group,
    find_store,
    join,
    largest_share,
    loopback_environment,
    open_store,
    share,
)
from rlsearch.training.trial import Trial

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
]

DATA = DataSpec("digits", limit=120, flip=True, crop=1)
CPU = torch.device("cpu")
EPOCHS = 5
HOST = "127.0.0.1"
TIMES = ("train_seconds", "samples_per_second")
REPLACED = (Replacement("units.1", "scalar", {"update_every": 2}), Replacement("units.3", "skip"))


def drop(score: str, threshold: float, features: str = "recompute") -> LearnDrop:
    return LearnDrop(score, threshold, patience=1, warmup=0.0, max_fraction=1.0, features=features)


def case(model: str = "make_without_batch_norm", batch_size: int = 32, **policy: Any) -> TrialSpec:
    training = TrainingSpec(epochs=EPOCHS, batch_size=batch_size, lr=0.05, warmup_epochs=0.0)
    return TrialSpec(ModelSpec(f"tiny_net:{model}"), DATA, training, Policy(**policy))


# 108 images are trained on: in batches of 32, of 39, or of 35 and a rest of 3, which both processes take whole.
CASES = {
    "plain": case(),
    "odd batches": case(batch_size=39),
    "a rest of one image and a half a process": case(batch_size=35),
    "replaced units": case(replacements=REPLACED),
    "schedule": case(learn_drop=drop("schedule", 0.5)),
    "schedule, replaced units": case(learn_drop=drop("schedule", 0.5), replacements=REPLACED),
    "schedule, stored": case(batch_size=39, learn_drop=drop("schedule", 0.5, "stored")),
    "auto": case(learn_drop=drop("schedule", 0.5, "auto")),
    "param_change": case(learn_drop=drop("param_change", 0.87)),
    "grad_change": case(learn_drop=drop("grad_change", 0.95)),
}
BATCH_NORM = case("make_with_dropout", learn_drop=drop("schedule", 0.5))

Steps = list[dict[str, Tensor]]


def watched(trial: Trial) -> Steps:
    """The parameters after every step from now on."""
    steps: Steps = []
    named = dict(trial.model.named_parameters())
    trial._optimizer.register_step_post_hook(
        lambda *_: steps.append({name: parameter.detach().clone() for name, parameter in named.items()})
    )
    return steps


def trained(spec: TrialSpec, group: Group | None, epochs: int = EPOCHS) -> dict[str, Any]:
    trial = Trial(spec, device="cpu", group=group)
    steps = watched(trial)
    rows, stored = [], []
    for _ in range(epochs):
        rows.append(trial.run_epoch().to_dict())
        stored.append(trial.features_in)
    found = {"steps": steps, "rows": rows, "state": trial.state_dict(), "stored": stored, "drawn": torch.rand(4)}
    if group is not None:
        wrapped = trial._step._plain._forward._wrapped
        found["waited for"] = sum(parameter.numel() for parameter in wrapped.parameters())
    return found


def poisoned(group: Group) -> str:
    """A loss that is no number in the second process alone ends both trainings."""
    trial = Trial(CASES["plain"], device="cpu", group=group)
    if group.rank == 1:
        trial.model.register_forward_hook(lambda module, args, output: output * math.nan)
    try:
        trial.run_epoch()
    except DivergedError as error:
        return str(error)
    return "nothing was raised"


def resumed(group: Group, folder: Path) -> dict[str, Any]:
    """Both processes go on from what the first one saved."""
    spec = BATCH_NORM
    trial = Trial(spec, device="cpu", group=group)
    for _ in range(2):
        trial.run_epoch()
    path = folder / "last.pt"
    if group.rank == 0:
        save_checkpoint(path, trial.state_dict())
    dist.barrier()
    again = Trial(spec, device="cpu", group=group)
    again.load_state_dict(load_checkpoint(path))
    rows = [again.run_epoch().to_dict() for _ in range(EPOCHS - 2)]
    return {"rows": rows, "state": again.state_dict()}


def stalled(group: Group) -> float:
    """Seconds until the first process notices that the second one does nothing any more."""
    started = time.monotonic()
    if group.rank == 0:
        trial = Trial(CASES["plain"], device="cpu", group=group)
        with pytest.raises(RuntimeError):
            trial.run_epoch()
    else:
        time.sleep(6)
    return time.monotonic() - started


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(loopback_environment())
    store = find_store(HOST, port)
    group = join(dist.PrefixStore("cases", store), rank, 2, CPU)
    found: dict[str, Any] = {name: trained(spec, group) for name, spec in CASES.items()}
    found["batch norm"] = trained(BATCH_NORM, group)
    found["poisoned"] = poisoned(group)
    found["resumed"] = resumed(group, Path(folder))
    found["local size"] = group.local_size
    dist.destroy_process_group()
    found["stalled"] = stalled(join(dist.PrefixStore("stalled", store), rank, 2, CPU, timeout_seconds=2))
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, by case."""
    folder: Path = tmp_path_factory.mktemp("processes")
    _store, port = open_store(HOST)
    with warnings.catch_warnings():
        mp.spawn(work, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(ours: Steps, theirs: Steps) -> None:
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, tensor in other.items():
            assert torch.allclose(one[name], tensor, rtol=1e-4, atol=1e-5), (step, name)


@pytest.mark.parametrize("name", [name for name in CASES if name != "auto"])
def test_two_processes_train_as_one_step_for_step(name: str, results: list[dict[str, Any]]) -> None:
    alone = trained(CASES[name], None)
    for found in (result[name] for result in results):
        assert_close(found["steps"], alone["steps"])
        assert found["stored"] == alone["stored"]
        for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
            apart = {"memory", "memory_predicted", "step_memory", *TIMES}
            if "stored" in name:  # each process fills a cache of its own
                apart |= {"train_flops", "forward_flops", "forward_share"}
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - apart:
                expected = pytest.approx(theirs[key], rel=1e-3) if isinstance(theirs[key], float) else theirs[key]
                assert ours[key] == expected, key
            assert ours["memory"] < theirs["memory"]  # that of one device, with half of a batch


def test_what_is_compared_drops_and_stores(results: list[dict[str, Any]]) -> None:
    """The comparison above is of something."""
    for name in ("schedule", "schedule, replaced units", "schedule, stored", "param_change", "grad_change"):
        assert results[0][name]["rows"][-1]["dropped_units"] > 0, name
        assert any(row["left"] for row in results[0][name]["rows"][:-1]), name
    assert results[0]["schedule, stored"]["stored"] == ["device"] * 4 + [None]  # in the end it is given back
    assert results[0]["local size"] == 2


@pytest.mark.parametrize("name", CASES)
def test_only_what_learns_is_waited_for(name: str, results: list[dict[str, Any]]) -> None:
    for found in (result[name] for result in results):
        assert found["waited for"] == found["rows"][-2]["learnable_params"]  # the last epoch cuts nothing more


def test_filling_a_cache_in_every_process_counts_as_spent(results: list[dict[str, Any]]) -> None:
    alone = trained(CASES["schedule, stored"], None)["rows"]
    together = results[0]["schedule, stored"]["rows"]
    more = {key: together[-1][key] - alone[-1][key] for key in ("forward_flops", "train_flops")}
    assert 0 < more["forward_flops"] == pytest.approx(more["train_flops"])


@pytest.mark.parametrize("name", [*CASES, "batch norm"])
def test_both_processes_have_the_same_model_to_the_bit(name: str, results: list[dict[str, Any]]) -> None:
    first, second = (result[name]["state"] for result in results)
    for state in (first, second):
        assert state["model"].keys() == first["model"].keys()
        for key, tensor in state["model"].items():
            assert torch.equal(tensor, first["model"][key]), key
        assert state["dropper"] is None or state["dropper"]["cut"] == first["dropper"]["cut"]
        assert state["inputs"] == first["inputs"]
    for ours, theirs in zip(*(result[name]["rows"] for result in results), strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}


def test_each_process_drops_out_at_random_for_itself(results: list[dict[str, Any]]) -> None:
    first, second = (result["batch norm"]["drawn"] for result in results)
    assert not torch.equal(first, second)


def test_with_batch_norm_the_model_learns_as_well(results: list[dict[str, Any]]) -> None:
    alone = trained(BATCH_NORM, None)["rows"][-1]
    together = results[0]["batch norm"]["rows"][-1]
    assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=0.2)
    assert together["left"] == alone["left"]


def test_no_number_in_one_process_ends_the_training_in_all(results: list[dict[str, Any]]) -> None:
    assert [result["poisoned"].split(";")[0] for result in results] == ["the training loss became nan"] * 2


def test_a_resume_goes_on_as_if_nothing_had_happened(results: list[dict[str, Any]]) -> None:
    for result in results:
        straight = result["batch norm"]
        for key, tensor in straight["state"]["model"].items():
            assert torch.equal(tensor, result["resumed"]["state"]["model"][key]), key
        for ours, theirs in zip(result["resumed"]["rows"], straight["rows"][2:], strict=True):
            assert {k: v for k, v in ours.items() if k not in TIMES} == {
                k: v for k, v in theirs.items() if k not in TIMES
            }


def test_a_process_that_stalls_is_not_waited_for_for_ever(results: list[dict[str, Any]]) -> None:
    assert 1.5 < results[0]["stalled"] < 5.5


@given(count=st.integers(1, 5000), size=st.integers(1, 64))
def test_shares_make_up_the_batch(count: int, size: int) -> None:
    shares = [share(count, rank, size) for rank in range(size)]
    assert sum(one.images for one in shares) == pytest.approx(count)
    # The mean over the processes weighs every image as the mean over the batch does.
    weights = [0.0] * count
    for one in shares:
        length = one.part.stop - one.part.start
        assert length >= min(2, count)
        for image in range(one.part.start, one.part.stop):
            weights[image] += one.scale / length / size
    assert weights == pytest.approx([1 / count] * count)
    assert largest_share(count, size) == max(one.part.stop - one.part.start for one in shares)
