"""Where a model starts: files and named weights, the width of the classifier, and files that must be refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from rlsearch.errors import ModelError
from rlsearch.training.models import build_model
from rlsearch.training.weights import _head_names


def safetensors_file(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def torch_file(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


def wrapped_torch_file(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": state}, folder / "w.pth")
    return folder / "w.pth"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The weights of a resnet20 with 10 classes, unlike any that the seed of these tests would give."""
    torch.manual_seed(1234)
    return build_model("resnet20").state_dict()


@pytest.mark.parametrize("write", [safetensors_file, torch_file, wrapped_torch_file])
def test_a_local_file_is_loaded_whole(
    write: Callable[[dict[str, Tensor], Path], Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build_model("resnet20", weights=str(write(state, tmp_path)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_classifier_of_another_width_keeps_its_random_start(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = safetensors_file(state, tmp_path)
    torch.manual_seed(5)
    fresh = build_model("resnet20", num_classes=3)
    torch.manual_seed(5)
    model = build_model("resnet20", num_classes=3, weights=str(file))
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert torch.equal(model.fc.bias, fresh.fc.bias)
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, state[name]), name


def test_all_that_does_not_fit_is_listed(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {name: value for name, value in state.items() if name != "bn1.bias"}
    changed |= {"layer9.weight": torch.zeros(1), "conv1.weight": torch.zeros(16, 1, 3, 3)}
    with pytest.raises(ModelError) as caught:
        build_model("resnet20", weights=str(safetensors_file(changed, tmp_path)))
    assert str(caught.value).splitlines()[1:] == [
        "  - layer9.weight is unknown to the model",
        "  - conv1.weight has shape (16, 1, 3, 3), the model needs (16, 3, 3, 3)",
        "  - bn1.bias is missing",
    ]


def test_only_the_classifier_may_have_another_width(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = state | {"fc.weight": torch.zeros(10, 32), "layer3.2.conv2.weight": torch.zeros(10, 64, 3, 3)}
    with pytest.raises(
        ModelError, match=r"layer3.2.conv2.weight has shape \(10, 64, 3, 3\)(.|\n)*fc.weight .*\(10, 32\)"
    ):
        build_model("resnet20", weights=str(safetensors_file(changed, tmp_path)))


def test_a_long_list_is_cut(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="and 158 more"):
        build_model("resnet32", weights=str(safetensors_file({"a": torch.zeros(1)}, tmp_path)))


def test_weights_without_batch_counters_are_taken(state: dict[str, Tensor], tmp_path: Path) -> None:
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    model = build_model("resnet20", weights=str(torch_file(old, tmp_path)))
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert model.bn1.num_batches_tracked == 0


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "was_run")}, tmp_path / "w.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(tmp_path / "was_run"), protocol=2))
    for name in ("w.pt", "plain.pth"):
        with pytest.raises(ModelError, match=f"{name} holds more than tensors"):
            build_model("resnet20", weights=str(tmp_path / name))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("write", [safetensors_file, torch_file])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(
    write: Callable[[dict[str, Tensor], Path], Path], share: float, state: dict[str, Tensor], tmp_path: Path
) -> None:
    file = write(state, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=f"weights file .*{file.name} .*(truncated|corrupt)"):
        build_model("resnet20", weights=str(file))


def test_other_content_and_missing_files_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="must hold a state_dict"):
        build_model("resnet20", weights=str(tmp_path / "w.pt"))
    with pytest.raises(ModelError, match=r"gone.safetensors does not exist"):
        build_model("resnet20", weights="gone.safetensors")


def test_large_and_small_stem_weights_do_not_mix(tmp_path: Path) -> None:
    state = build_model("resnet18", num_classes=10).state_dict()
    with pytest.raises(ModelError, match=r"conv1.weight has shape \(64, 3, 7, 7\), the model needs \(64, 3, 3, 3\)"):
        build_model("resnet18", weights=str(safetensors_file(state, tmp_path)), small_stem=True)


def test_named_weights_come_from_the_cache_and_never_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"'DEFAULT' of model 'resnet18' \(45 MB\) are not on this machine.*download"):
        build_model("resnet18", weights="DEFAULT")
    cached = build_model("resnet18", num_classes=1000).state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(cached, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        model = build_model("resnet18", num_classes=4, weights=name)
        assert model.fc.out_features == 4
        assert torch.equal(model.layer4[1].conv2.weight, cached["layer4.1.conv2.weight"])
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"or read from .*remove the file if it is damaged"):
        build_model("resnet18", weights="DEFAULT")


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1", "googlenet"])
def test_named_weights_of_other_models_start_all_but_the_classifier(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file as torchvision has it: with 1000 classes, and with GoogLeNet's auxiliary classifiers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    aux = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    cached = torchvision.models.get_model(name, weights=None, **aux).state_dict()
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(cached, tmp_path / "hub" / "checkpoints" / Path(url).name)
    model = build_model(name, num_classes=4, weights="IMAGENET1K_V1")
    differing = {key for key, value in model.state_dict().items() if not torch.equal(value, cached[key])}
    head = {"mobilenet_v2": "classifier.1", "squeezenet1_1": "classifier.1", "googlenet": "fc"}[name]
    assert differing <= {f"{head}.weight", f"{head}.bias"}
    assert f"{head}.weight" in differing


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *(
            ("vit_tiny", "heads.head"),
            ("vit_b_16", "heads.head"),
            ("convnext_tiny", "classifier.2"),
            ("swin_t", "head"),
        ),
        *(("regnet_y_400mf", "fc"), ("densenet121", "classifier"), ("vgg16", "classifier.6"), ("deit_tiny", "head")),
    ],
)
@pytest.mark.parametrize("num_classes", [10, 768])
def test_the_classifier_is_told_by_its_width(name: str, head: str, num_classes: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes)
    assert _head_names(model, num_classes) == {f"{head}.weight", f"{head}.bias"}


def test_values_that_are_not_finite_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = safetensors_file(state | {"conv1.weight": torch.full((16, 3, 3, 3), torch.nan)}, tmp_path)
    with pytest.raises(ModelError, match=r"conv1.weight holds values that are not finite"):
        build_model("resnet20", weights=str(file))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", "IMAGENET1K_V3", "did you mean 'IMAGENET1K_V1'.*a local file is given by its path"),
        ("resnet20", "DEFAULT", "this model has no named weights; give a file"),
    ],
)
def test_unknown_named_weights(name: str, weights: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, weights=weights)
