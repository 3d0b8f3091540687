"""States and weights come back as they were, and damaged ones are named."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from rlsearch.errors import ModelError, UserError
from rlsearch.training.checkpoint import (
    found_checkpoints,
    load_checkpoint,
    load_newest,
    load_weights,
    save_checkpoint,
    save_weights,
)


def test_a_state_comes_back(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cut": 3, "averages": [None, 0.5]}
    save_checkpoint(tmp_path / "last.pt", state)
    read = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(read["model"]["weight"], model.weight)
    assert torch.equal(
        read["optimizer"]["state"][0]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"]
    )
    assert (read["cut"], read["averages"]) == (3, [None, 0.5])


def test_weights_come_back(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_weights(tmp_path / "model.safetensors", model)
    other = nn.Conv2d(3, 4, 3)
    load_weights(tmp_path / "model.safetensors", other)
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("length", [0, 3, 500])
def test_truncated_files_are_named(tmp_path: Path, length: int) -> None:
    checkpoint, weights = tmp_path / "last.pt", tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, {"tensor": torch.ones(1000)})
    save_weights(weights, nn.Linear(100, 10))
    for path in (checkpoint, weights):
        path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"last.pt: is no readable checkpoint"):
        load_checkpoint(checkpoint)
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read"):
        load_weights(weights, nn.Linear(100, 10))


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """torch itself reads altered tensors without a word."""
    path, state = tmp_path / "last.pt", {"tensor": torch.arange(50.0), "epochs": [{"accuracy": 0.5}]}
    save_checkpoint(path, state)
    whole = path.read_bytes()
    noticed, rng = 0, random.Random(0)
    for place in rng.sample(range(len(whole)), 300):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            read = load_checkpoint(path)
        except UserError:
            noticed += 1
            continue
        assert torch.equal(read["tensor"], state["tensor"])
        assert read["epochs"] == state["epochs"]
    assert noticed > 100


def test_the_last_two_are_kept_and_the_newest_that_can_be_read_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert load_newest(path) is None
    for epoch in (1, 2, 3):
        save_checkpoint(path, {"epoch": epoch})
    assert [load_checkpoint(file)["epoch"] for file in found_checkpoints(path)] == [3, 2]
    assert load_newest(path) == {"epoch": 3}
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "last.previous.pt"}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"last\.pt: is no readable checkpoint .* going on from the one before"):
        assert load_newest(path) == {"epoch": 2}
    path.unlink()  # killed between the two renames of a save
    assert load_newest(path) == {"epoch": 2}
    found_checkpoints(path)[0].write_bytes(b"")
    with pytest.raises(UserError, match="is no readable checkpoint"):
        load_newest(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="there are no weights"):
        load_weights(tmp_path / "none.safetensors", nn.Linear(1, 1))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.safetensors", nn.Linear(3, 2))
    with pytest.raises(ModelError, match="another model"):
        load_weights(tmp_path / "model.safetensors", nn.Linear(4, 2))


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state": Evil(tmp_path / "ran")}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
