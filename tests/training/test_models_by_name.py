"""The models of torchvision and timm by name: exact counts, their kwargs, and what each name costs to import."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from rlsearch.errors import ModelError
from rlsearch.training import timm_models, torchvision_models
from rlsearch.training.models import build_model, default_image_size, known_models

# With 1000 classes: torchvision's and timm's published counts.
COUNTS = {
    "vgg11_bn": 132_868_840,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vit_b_16": 86_567_656,
    "vit_l_16": 304_326_632,
    "convnext_tiny": 28_589_128,
    "swin_t": 28_288_354,
    "regnet_y_400mf": 4_344_144,
    "mobilenet_v2": 3_504_872,
    "densenet121": 7_978_856,
    "efficientnet_b0": 5_288_548,
    "squeezenet1_1": 1_235_496,
    "vit_tiny_patch16_224": 5_717_416,
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "resnet26": 15_995_176,
    "mixer_b16_224": 59_880_472,
}


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, num_classes: int = 10, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_named_models_have_their_published_counts(name: str, count: int) -> None:
    on_meta(name)  # imports
    started = time.perf_counter()
    model = on_meta(name, 1000)
    assert time.perf_counter() - started < 3
    assert num_params(model) == count
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert model.training


def test_the_vit_for_small_images_has_its_count() -> None:
    model = build_model("vit_tiny")
    patches, width, mlp = (32 // 4) ** 2, 192, 768
    attention = 4 * width * width + 4 * width
    block = attention + 2 * width * mlp + mlp + width + 4 * width
    embedding = 3 * 4 * 4 * width + width + width + (patches + 1) * width
    assert num_params(model) == embedding + 12 * block + 2 * width + width * 10 + 10 == 5_362_762
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert num_params(build_model("vit_tiny", image_size=64)) == 5_362_762 + 3 * patches * width


def test_every_name_to_show_can_be_built() -> None:
    assert known_models() == [
        *("resnet20", "resnet32", "resnet56", "resnet110", "vit_tiny"),
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11_bn", "vgg16", "vgg16_bn"),
        *("vit_b_16", "vit_l_16", "convnext_tiny", "swin_t", "regnet_y_400mf", "mobilenet_v2", "densenet121"),
        *("deit_tiny", "deit_small", "deit_base"),
    ]
    for name in known_models():
        assert {tensor.device.type for tensor in on_meta(name).parameters()} == {"meta"}


def test_torchvision_has_all_of_its_classification_models() -> None:
    assert torchvision_models.names() > set(torchvision_models.NAMED)
    assert not {"deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "r3d_18"} & torchvision_models.names()
    assert timm_models.names() > set(timm_models.ALIASES) | set(timm_models.ALIASES.values())


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(("resnet20", 32), ("vit_tiny", 32), ("resnet18", 224), ("vit_b_16", 224), ("regnet_y_16gf", 224)),
        *(("inception_v3", 299), ("efficientnet_b4", 380), ("swin_v2_t", 256), ("mixer_b16_224", 224)),
        *(("deit_tiny", 224), ("deit_base_patch16_384", 384), ("my_nets:tiny", None), ("no_such_net", None)),
    ],
)
def test_a_model_has_a_usual_image_size(name: str, side: int | None) -> None:
    assert default_image_size(name) == side


def test_kwargs_decide_the_image_size() -> None:
    assert default_image_size("vit_b_16", {"image_size": 48}) == 48
    assert default_image_size("deit_tiny", {"img_size": 64}) == 64
    assert default_image_size("resnet18", {"small_stem": True}) == 224


def test_a_vit_takes_the_size_of_its_images() -> None:
    assert on_meta("vit_b_16", image_size=64).encoder.pos_embedding.shape == (1, 17, 768)
    assert on_meta("deit_tiny", img_size=64).pos_embed.shape == (1, 17, 192)


def test_a_vgg_with_a_small_head() -> None:
    torch.manual_seed(0)
    model = build_model("vgg11_bn", num_classes=7, small_head=True).eval()
    assert num_params(model) == 9_225_984 + 512 * 7 + 7
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.training is False
    torch.manual_seed(0)
    plain = build_model("vgg11_bn", num_classes=7)
    for name, tensor in model.features.named_parameters():
        drawn, wanted = tensor.detach(), plain.features.get_parameter(name).detach()
        assert drawn.std(correction=0).item() == pytest.approx(wanted.std(correction=0).item(), rel=0.1), name
        assert drawn.mean().item() == pytest.approx(wanted.mean().item(), abs=3e-3), name
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert all(torch.equal(tensor, plain.features.get_buffer(name)) for name, tensor in model.features.named_buffers())


def test_a_small_head_is_nothing_but_the_head() -> None:
    small, plain = on_meta("vgg16", small_head=True), on_meta("vgg16", small_head=False)
    assert [name for name, _ in small.features.named_parameters()] == [
        name for name, _ in plain.features.named_parameters()
    ]
    assert [name for name, _ in small.classifier.named_parameters()] == ["weight", "bias"]
    assert len(plain.classifier) == 7


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_models_with_auxiliary_classifiers_have_one_output(name: str) -> None:
    model = on_meta(name)
    assert isinstance(model(torch.empty(2, 3, 299, 299, device="meta")), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_b_16", {"imagesize": 32}, "'imagesize' is unknown; did you mean 'image_size'"),
        ("vit_b_16", {"image_size": 3.5}, "'image_size' must be a whole number, got 3.5"),
        ("vit_b_16", {"image_size": 30}, "cannot be built with kwargs {'image_size': 30}: Input shape indivisible"),
        ("vit_b_16", {"patch_size": 8}, "'patch_size' is decided by the model's name"),
        ("vit_b_16", {"dropout": "much"}, "'dropout' must be a number, got 'much'"),
        ("vit_b_16", {"norm_layer": "x", "dropout": True}, "'norm_layer' is unknown.*; 'dropout' must be a number"),
        ("vit_tiny", {"image_size": 30}, "cannot be built .*indivisible"),
        ("vit_tiny", {"depth": 3}, "'depth' is unknown; known: attention_dropout, dropout, image_size, patch_size"),
        ("vgg16", {"small_stem": True}, "'small_stem' is unknown"),
        ("vgg16", {"small_head": 1}, "'small_head' must be true or false, got 1"),
        ("vgg16", {"small_head": True, "dropout": 0.1}, "'dropout' has no place in a small_head"),
        ("resnet18", {"small_head": True}, "'small_head' is unknown"),
        ("densenet121", {"growth_rate": 8}, "cannot be built .*multiple values"),
        ("inception_v3", {"aux_logits": True}, "'aux_logits' must be left out"),
        ("deit_tiny", {"pretrained": True, "checkpoint_path": "a"}, "pretrained, checkpoint_path cannot be given here"),
        ("deit_tiny", {"image_size": 64}, "'deit_tiny' cannot be built .*unexpected keyword argument 'image_size'"),
    ],
)
def test_bad_kwargs_are_named(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        on_meta(name, **kwargs)


def test_whole_numbers_are_numbers() -> None:
    assert on_meta("vit_b_16", dropout=0).encoder.dropout.p == 0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vgg16bn", "vgg16_bn"),
        ("vit-tiny", "vit_tiny"),
        ("efficientnet_b9", "efficientnet_b"),
        ("mixer_b16_225", "mixer_b16_"),
    ],
)
def test_misspelt_names_are_understood(name: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"unknown model '{name}'; did you mean '{meant}"):
        build_model(name)


def test_without_timm_a_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("rlsearch.training.models._has_timm", lambda: False)
    timm_models.names.cache_clear()
    try:
        with pytest.raises(ModelError, match=r'unknown model \'mixer_b16_224\'.*pip install "rlsearch\[timm\]"'):
            build_model("mixer_b16_224")
        with pytest.raises(ModelError, match=r"'deit_tiny' is one of timm, which is not installed"):
            build_model("deit_tiny")
    finally:
        timm_models.names.cache_clear()


def test_a_name_imports_no_more_than_it_needs() -> None:
    code = """
import sys, torch
from rlsearch.training.models import build_model, default_image_size, known_models
def imported():
    return [name for name in ("torchvision", "timm") if name in sys.modules]
known_models(), default_image_size("swin_t")
with torch.device("meta"):
    build_model("resnet20")
    first = imported()
    build_model("vit_tiny"), build_model("swin_t"), build_model("maxvit_t")
    print(first, imported())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['torchvision']"
