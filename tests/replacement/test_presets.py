"""The published forms as policies: exact units, counts, and why a model has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlsearch.errors import ModelError
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import apply_policy, learnable_params
from rlsearch.training.models import build_model


def built(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name)


def units_of(policy: Policy) -> list[str]:
    return [item.unit for item in policy.replacements]


def test_v1_of_resnet32_is_the_reference() -> None:
    """Every fourth block is layer1.3, layer2.2, layer3.1; the last one's first convolution fits no predecessor."""
    model = build_model("resnet32")
    policy = Policy.preset("v1", model)
    assert policy == Policy(
        replacements=(Replacement("layer1.3", "scalar"), Replacement("layer2.2", "scalar")),
        provenance={"preset": "v1"},
    )
    apply_policy(model, policy)
    assert learnable_params(model) == 443_870


def test_v1_takes_what_fits_where_nothing_fits_whole() -> None:
    policy = Policy.preset("v1", built("resnet20"))
    assert policy.replacements == (Replacement("layer3.1", "scalar", {"boundary": "keep"}),)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("vit_b_16", [f"encoder.layers.encoder_layer_{index}.self_attention" for index in (3, 7)]),
        ("vit_tiny_patch16_224", ["blocks.3.attn", "blocks.7.attn"]),
        ("swin_t", ["features.5.3.attn"]),
        ("convnext_tiny", ["features.5.1", "features.5.5"]),
        ("mixer_b16_224", ["blocks.3", "blocks.7"]),
        ("vgg16_bn", ["features.37"]),
    ],
)
def test_v1_replaces_attention_alone_where_there_is_any(name: str, units: list[str]) -> None:
    policy = Policy.preset("v1", built(name))
    assert units_of(policy) == units
    assert {(item.block, *item.options) for item in policy.replacements} == {("scalar",)}


def test_v2_puts_one_layer_in_place_of_a_unit_where_one_can_stand_in() -> None:
    options = {"operator": "single", "boundary": "project"}
    policy = Policy.preset("v2", built("resnet32"))
    expected = tuple(Replacement(unit, "project", options) for unit in ("layer1.3", "layer2.2", "layer3.1"))
    assert policy.replacements == expected
    bottlenecks = Policy.preset("v2", built("resnet101"))
    assert {item.options["operator"] for item in bottlenecks.replacements} == {"same"}
    transformer = Policy.preset("v2", built("vit_b_16"))
    forms = {(item.unit.rpartition(".")[2], item.options["operator"]) for item in transformer.replacements}
    assert forms == {("self_attention", "single"), ("mlp", "same")}
    assert len(transformer.replacements) == 4


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_a_model_without_inner_units_is_told_why(preset: str) -> None:
    with pytest.raises(ModelError, match=rf"preset {preset} replaces nothing in ResNet.*layer2.1: is the last unit"):
        Policy.preset(preset, built("resnet18"))


def test_unknown_presets_and_models_without_units() -> None:
    with pytest.raises(ModelError, match=r"unknown preset 'v3'.*v1"):
        Policy.preset("v3", built("resnet20"))
    with pytest.raises(ModelError, match="has no unit"):
        Policy.preset("v1", nn.Sequential(nn.Conv2d(3, 4, 3)), torch.empty(2, 3, 8, 8))
