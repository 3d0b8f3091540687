"""`rlsearch train`: what it takes for a policy and for a model, what it says, and what a restart takes up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from rlsearch import LearnDrop, ModelSpec, Policy, Replacement, build_model
from rlsearch.cli.train_spec import TrainOptions, training_spec
from rlsearch.cli.train_words import nothing_left, said
from rlsearch.errors import ConfigError
from rlsearch.export import load_exported
from rlsearch.learn_drop import Dropper, feature_store
from rlsearch.training.data import DataSpec, load_data
from rlsearch.training.device_data import DeviceData
from rlsearch.training.loop import evaluate

SMALL = ("--data", "digits", "--set", "data.limit=100", "--set", "training.batch_size=32", "--device", "cpu")
# Layers leave after several epochs, and nothing is measured that chance could change.
DROP = "score=schedule,warmup=0,features=stored"
CPU = torch.device("cpu")


def options(subject: str, *, settings: tuple[str, ...] = ("data.limit=100",), **given: Any) -> TrainOptions:
    return TrainOptions(subject, **{"data": "digits", "settings": settings} | given)


def problems_of(chosen: TrainOptions) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        training_spec(chosen)
    assert caught.value.source == "rlsearch train"
    return {problem.key: problem.message for problem in caught.value.problems}


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("train_seconds", "samples_per_second")} for row in rows]


def test_a_models_name_is_trained_as_it_is_with_the_classes_of_the_data(tmp_path: Path) -> None:
    spec, images = training_spec(options("resnet20", epochs=3, seed=5))
    assert (spec.model, spec.policy, spec.seed) == (ModelSpec("resnet20"), Policy(ModelSpec("resnet20")), 5)
    assert (spec.training.epochs, spec.training.lr, spec.data.limit) == (3, 0.1, 100)
    assert len(images.train.labels) == 90
    for split in ("train", "test"):
        for name in "abc":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(10):
                Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)).save(folder / f"{index}.png")
    spec, _ = training_spec(
        options("resnet18", data=f"imagefolder:{tmp_path}", settings=("model.kwargs.small_stem=true",))
    )
    assert (spec.model.num_classes, spec.policy.model, spec.model.kwargs) == (3, spec.model, {"small_stem": 1})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("off", None),
        ("default", LearnDrop()),
        ("", LearnDrop()),
        ("threshold=3e-1", LearnDrop(threshold=0.3)),
        ("score=schedule, patience=3,features=auto", LearnDrop("schedule", patience=3, features="auto")),
    ],
)
def test_learn_drop_as_it_is_typed(given: str | None, expected: LearnDrop | None) -> None:
    spec, _ = training_spec(options("resnet20", learn_drop=given))
    assert spec.policy.learn_drop == expected


def test_learn_drop_changes_a_policys_own_settings(tmp_path: Path) -> None:
    own = Policy(ModelSpec("resnet20"), (Replacement("layer1.1", "skip"),), LearnDrop(threshold=0.4, interval=3))
    own.save(tmp_path / "policy.json")

    def drop(given: str | None) -> LearnDrop | None:
        spec, _ = training_spec(options(str(tmp_path / "policy.json"), learn_drop=given))
        assert spec.policy.replacements == own.replacements
        return spec.policy.learn_drop

    assert drop(None) == own.learn_drop
    assert drop("threshold=0.2") == LearnDrop(threshold=0.2, interval=3)
    assert drop("default") == LearnDrop()
    assert drop("off") is None


def test_everything_that_is_wrong_is_told_at_once() -> None:
    wrong = "treshold=0.1,patience=two,score=param_chnge,interval=1,interval=2,stored"
    found = problems_of(options("resnet20", learn_drop=wrong, settings=("trainig.lr=1", "training.epohcs=3")))
    assert "did you mean 'threshold'?" in found["learn_drop.treshold"]
    assert found["learn_drop.patience"] == "must be a whole number, got 'two'"
    assert "did you mean 'param_change'?" in found["learn_drop.score"]
    assert "stands twice" in found["learn_drop.interval"]
    assert "as in threshold=" in found["--learn-drop"]
    assert "got 'stored'" in found["--learn-drop"]
    assert "did you mean 'training'?" in found["trainig"]
    assert "did you mean 'epochs'?" in found["training.epohcs"]
    assert len(found) == 7
    assert problems_of(options("resnet20", learn_drop="warmup=2")) == {
        "learn_drop.warmup": "must be in [0, 1], got 2.0"
    }


def test_an_unknown_name_is_told_as_file_and_as_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (told,) = problems_of(options("resnet23")).values()
    assert "there is no file 'resnet23'" in told
    assert "unknown model 'resnet23'; did you mean 'resnet" in told
    (tmp_path / "best").mkdir()
    Policy(ModelSpec("resnet20")).save(tmp_path / "best" / "policy.json")
    (told,) = problems_of(options("best")).values()
    assert f"did you mean '{Path('best') / 'policy.json'}'?" in told
    # A folder of a model's name is in nobody's way, and what is known is told by its own words.
    (tmp_path / "resnet20").mkdir()
    assert training_spec(options("resnet20"))[0].model.name == "resnet20"
    with pytest.raises(ValueError, match="'widht' is unknown") as caught:
        training_spec(options("resnet20", settings=("model.kwargs.widht=2",)))
    assert "there is no file" not in str(caught.value)


def test_options_that_do_not_go_together(policy: Path) -> None:
    assert "give one, as in --data digits" in problems_of(options("resnet20", data=None, settings=()))["--data"]
    assert "the policy names no data" in problems_of(options(str(policy), data=None, settings=()))["--data"]
    found = problems_of(options(str(policy), settings=("model.kwargs.small_stem=true",)))
    assert "stands in the policy's file" in found["--set model"]
    assert "is itself a model's name" in problems_of(options("resnet20", model="mine:make"))["--model"]


def test_a_model_with_learn_drop_from_start_to_end(in_process: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "trained"
    given = ("train", "resnet20", "--learn-drop", DROP, *SMALL, "--epochs", 4, "--out", out)
    done = in_process(*given)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("epoch 1/4: accuracy ")
    assert lines[0].endswith(", stem to layer1.1 (3 layers) left training; features stored in memory")
    assert lines[3].endswith(" images/s, 8 of 11 layers have left")
    assert lines[4].startswith("4 epochs in ")
    assert lines[5].startswith("8 of 11 layers (73%) left training: stem to layer1.1 (3 layers) after epoch 1, ")
    rows = json.loads((out / "metrics.json").read_text())
    assert lines[6] == f"forward operations: {rows[-1]['forward_share']:.1%} of end-to-end training's"
    assert rows[-1]["forward_share"] < 1
    assert lines[7].startswith("memory of a step (predicted): ")
    assert lines[8:] == [f"weights: {out / 'model.safetensors'}", f"picture: {out / 'dropping.png'}"]
    assert (out / "dropping.png").read_bytes().startswith(b"\x89PNG")
    _check_weights(out, rows[-1]["accuracy"])
    _check_calling_again(in_process, given, out, rows)


def _check_weights(out: Path, accuracy: float) -> None:
    """The model is whole, of the original architecture, and is the one that was measured."""
    model = build_model("resnet20")
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    content = json.loads((out / "policy.json").read_text())["provenance"]
    assert (content["data"]["limit"], content["input_shape"], content["training"]["epochs"]) == (100, [3, 8, 8], 4)
    images = DeviceData(load_data(DataSpec(**content["data"])), CPU)
    for ours in (model, load_exported(out)):
        found = evaluate(ours, images.validation_batches(512), precision="fp32", device=CPU)
        assert found.accuracy == accuracy


def _check_calling_again(
    in_process: Callable[..., Any], given: tuple[object, ...], out: Path, rows: list[dict[str, Any]]
) -> None:
    weights = (out / "model.safetensors").read_bytes()
    again = in_process(*given, "--json")
    assert (again.returncode, json.loads(again.stdout)) == (0, rows[-1])
    assert again.stderr == f"going on after epoch 4 of {out / 'checkpoint.pt'}\n"
    assert (out / "model.safetensors").read_bytes() == weights
    for change in (("--seed", 3), ("--learn-drop", "off")):
        other = in_process(*given, *change)
        assert (other.returncode, other.stdout) == (2, "")
        assert "it is of another training, with another" in other.stderr
    assert json.loads((out / "metrics.json").read_text()) == rows


def test_torchvisions_own_model_takes_the_weights(in_process: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "trained"
    done = in_process("train", "resnet18", "--learn-drop", DROP, *SMALL, "--epochs", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "left training" in done.stdout
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)


def test_a_policy_goes_on_where_it_was(in_process: Callable[..., Any], policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    given = ("train", policy, *SMALL, "--epochs", 2, "--out", out)
    done = in_process(*given)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2: accuracy" in done.stdout
    model = load_exported(out)
    assert model.layer1[1].conv1.weight.shape == build_model("resnet20").layer1[1].conv1.weight.shape
    trained = Policy.load(out / "policy.json")
    assert trained.hash == Policy.load(policy).hash
    assert trained.provenance["data"]["name"] == "digits"


@pytest.mark.parametrize("damage", ["missing", "truncated", "one epoch ahead", "one epoch behind"])
def test_a_restart_needs_no_metrics_but_the_checkpoints(
    in_process: Callable[..., Any], tmp_path: Path, damage: str
) -> None:
    out, straight = tmp_path / "trained", tmp_path / "straight"
    given = ("train", "resnet20", *SMALL, "--set", "data.limit=60")
    assert in_process(*given, "--epochs", 3, "--out", straight).returncode == 0
    expected = json.loads((straight / "metrics.json").read_text())
    interrupted = _interrupted_after_two(in_process, given, out)
    metrics = out / "metrics.json"
    if damage == "missing":
        metrics.unlink()
    else:
        kept = {"truncated": 2, "one epoch ahead": 3, "one epoch behind": 1}[damage]
        text = json.dumps((interrupted + expected)[:kept] if kept != 3 else expected)
        metrics.write_text(text[:-20] if damage == "truncated" else text)
    done = in_process(*given, "--epochs", 3, "--out", out)
    assert (done.returncode, done.stderr) == (0, f"going on after epoch 2 of {out / 'checkpoint.pt'}\n")
    assert without_times(json.loads(metrics.read_text())) == without_times(expected)
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def _interrupted_after_two(
    in_process: Callable[..., Any], given: tuple[object, ...], out: Path
) -> list[dict[str, Any]]:
    """Ends the training by Ctrl-C in its third epoch."""
    from rlsearch.training.trial import Trial

    run_epoch = Trial.run_epoch

    def interrupting(trial: Trial) -> Any:
        if trial.epochs_done == 2:
            raise KeyboardInterrupt
        return run_epoch(trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "run_epoch", interrupting)
        done = in_process(*given, "--epochs", 3, "--out", out)
    assert done.returncode == 130
    rows: list[dict[str, Any]] = json.loads((out / "metrics.json").read_text())
    assert len(rows) == 2
    return rows


def test_warnings_are_shown_once_and_beside_the_json(
    in_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 0)
    monkeypatch.setattr(feature_store, "available_disk_bytes", lambda folder: 0)
    others = logging.StreamHandler()  # as a library might set one up
    monkeypatch.setattr(logging.getLogger(), "handlers", [others])
    given = ("train", "resnet20", "--learn-drop", "score=schedule,warmup=0,features=stored,max_fraction=0.2")
    done = in_process(*given, *SMALL, "--epochs", 2, "--out", tmp_path / "trained", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["epoch"] == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: stored features need ")
    assert logging.getLogger("rlsearch").handlers == []
    assert logging.getLogger("rlsearch").propagate


def test_a_users_model_that_the_command_names_may_run(
    in_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from rlsearch import build_model\ndef make(num_classes): return build_model('resnet20', num_classes)\n"
    (tmp_path / "train_named_net.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = in_process("train", "train_named_net:make", *SMALL, "--epochs", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "weights: out/model.safetensors" in done.stdout


def test_model_code_of_a_policy_runs_only_when_it_is_named(
    in_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "open('ran', 'w').close()\nfrom rlsearch import build_model\nmake = lambda num_classes: build_model('resnet20')"
    )
    (tmp_path / "code_of_a_policy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Policy(ModelSpec("code_of_a_policy:make")).save("policy.json")
    given = ("train", "policy.json", *SMALL, "--epochs", 1, "--out", "out")
    refused = in_process(*given)
    assert (refused.returncode, "add --model code_of_a_policy:make" in refused.stderr) == (2, True)
    assert not Path("ran").exists()
    assert in_process(*given, "--model", "code_of_a_policy:make").returncode == 0
    assert Path("ran").exists()


def test_a_policy_for_another_model_is_refused(in_process: Callable[..., Any], policy: Path, tmp_path: Path) -> None:
    content = json.loads(policy.read_text())
    content["model"]["name"] = "resnet18"
    content["replacements"][0]["unit"] = "layer1.9"
    (tmp_path / "policy.json").write_text(json.dumps(content))
    done = in_process("train", tmp_path / "policy.json", *SMALL, "--out", tmp_path / "out")
    assert (done.returncode, "layer1.9" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_layers_in_words() -> None:
    assert said(["stem"]) == "stem"
    assert said(["stem", "layer1.0"]) == "stem and layer1.0"
    assert said(["stem", "layer1.0", "layer1.1"]) == "stem to layer1.1 (3 layers)"


@pytest.mark.parametrize(
    ("settings", "averages", "told"),
    [
        ({"score": "schedule"}, None, "try more epochs, or a lower warmup or interval, or a higher max_fraction"),
        ({}, [None, None, None], "nothing was measured in 9 epochs; try more epochs, or a lower interval"),
        (
            {},
            [0.83, 0.9, 0.7],
            "of 0, which must leave first, was at last 0.83 of its greatest, and the lowest that of 2, 0.7; ",
        ),
        ({}, [0.83, 0.9, 0.7], "the threshold is 0.5. Try more epochs, or threshold=0.9: with a higher one"),
        (
            {},
            [0.97, 0.98, 0.99],
            "was at last 0.97 of its greatest; the threshold is 0.5. Try more epochs, or threshold=1:",
        ),
        ({}, [1.0, 1.0, 1.0], "or score=schedule: its parameters have not begun to settle"),
        ({}, [0.4, 0.9, 0.7], "or a lower patience, interval or warmup, or a higher max_fraction"),
    ],
)
def test_why_nothing_left(settings: dict[str, Any], averages: list[float | None] | None, told: str) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dropper = Dropper(model, optimizer, 9, LearnDrop(**{"threshold": 0.5} | settings), units=["0", "1", "2", "3"])
    if averages is not None:
        dropper.load_state_dict(dropper.state_dict() | {"averages": averages, "greatest": [1.0] * 3})
    assert told in nothing_left(dropper, 9)
