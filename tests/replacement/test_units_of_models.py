"""The units of the models that are known by name, in full: names, roles, chains and sources, in forward order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import nn

from rlsearch.errors import ModelError
from rlsearch.replacement import Unit, find_units
from rlsearch.training.models import build_model

Chain = tuple[str, list[str], list[str]]


def chain(name: str, count: int, *roles: str, prefix: str = "", start: int = 0) -> Chain:
    """A chain of ``count`` elements, numbered from ``start``."""
    return name, [f"{name}.{prefix}{index}" for index in range(start, start + count)], list(roles)


def stages(counts: Sequence[int], *roles: str) -> list[Chain]:
    return [chain(f"layer{stage}", count, *roles) for stage, count in enumerate(counts, start=1)]


def bare(name: str, indices: Sequence[int]) -> Chain:
    """A chain of layers, which have no roles."""
    return name, [f"{name}.{index}" for index in indices], []


def neighbours(names: Sequence[str]) -> dict[str, tuple[str, str] | None]:
    inner = {names[i]: (names[i - 1], names[i + 1]) for i in range(1, len(names) - 1)}
    return dict.fromkeys(names) | inner


def expected(chains: Sequence[Chain], lacking: Sequence[str] = ()) -> list[tuple[str, str, str, object]]:
    """Name, chain, role and sources of all units; ``lacking`` names those that an element does not have."""
    units = []
    for name, elements, roles in chains:
        paths = {"block": elements} | {role: [f"{element}.{role}" for element in elements] for role in roles}
        of_role = {role: [unit for unit in names if unit not in lacking] for role, names in paths.items()}
        sources = {role: neighbours(names) for role, names in of_role.items()}
        for index in range(len(elements)):
            units += [
                (paths[role][index], name, role, sources[role][paths[role][index]])
                for role in paths
                if paths[role][index] not in lacking
            ]
    return units


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name)


VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG16_BN = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
HEAD = bare("classifier", (0, 3, 6))
TIMM_VIT = [chain("blocks", 12, "attn", "mlp")]
BOTTLENECK = ("conv1", "conv2", "conv3")
CASES: dict[str, list[Chain]] = {
    "resnet20": stages((3, 3, 3), "conv1", "conv2"),
    "resnet32": stages((5, 5, 5), "conv1", "conv2"),
    "resnet18": stages((2, 2, 2, 2), "conv1", "conv2"),
    "resnet34": stages((3, 4, 6, 3), "conv1", "conv2"),
    "resnet50": stages((3, 4, 6, 3), *BOTTLENECK),
    "resnet101": stages((3, 4, 23, 3), *BOTTLENECK),
    "resnet152": stages((3, 8, 36, 3), *BOTTLENECK),
    "resnet26": stages((2, 2, 2, 2), *BOTTLENECK),
    "vgg11_bn": [bare("features", (0, 4, 8, 11, 15, 18, 22, 25)), HEAD],
    "vgg16": [bare("features", VGG16), HEAD],
    "vgg16_bn": [bare("features", VGG16_BN), HEAD],
    "vit_tiny": [chain("encoder.layers", 12, "self_attention", "mlp", prefix="encoder_layer_")],
    "vit_b_16": [chain("encoder.layers", 12, "self_attention", "mlp", prefix="encoder_layer_")],
    "vit_l_16": [chain("encoder.layers", 24, "self_attention", "mlp", prefix="encoder_layer_")],
    "vit_tiny_patch16_224": TIMM_VIT,
    "deit_tiny": TIMM_VIT,
    "mixer_b16_224": [chain("blocks", 12, "mlp_tokens", "mlp_channels")],
    "swin_t": [chain(f"features.{stage}", count, "attn", "mlp") for stage, count in ((1, 2), (3, 2), (5, 6), (7, 2))],
    "convnext_tiny": [
        chain(f"features.{stage}", count, "block.0", "block.3", "block.5")
        for stage, count in ((1, 3), (3, 3), (5, 9), (7, 3))
    ],
    "regnet_y_400mf": [
        ("trunk_output.block1.block1-0.f", [f"trunk_output.block1.block1-0.f.{part}" for part in "ab"], ["0"]),
        *(
            chain(f"trunk_output.block{stage}", count, "f.a", "f.b", "f.se", "f.c", prefix=f"block{stage}-")
            for stage, count in ((2, 3), (3, 6), (4, 6))
        ),
    ],
    "mobilenet_v2": [chain("features", 17, "conv.0", "conv.1", "conv.2", start=1)],
}
# The first block of MobileNetV2 does not widen its input: its second layer is the last of the others'.
LACKING = ("features.1.conv.1", "features.1.conv.2")


@pytest.mark.parametrize("name", CASES)
def test_units_of(name: str) -> None:
    units = find_units(on_meta(name))
    found = [(unit.name, unit.chain, unit.role, unit.sources) for unit in units]
    assert found == expected(CASES[name], LACKING if name == "mobilenet_v2" else ())


def by_name(model: str, *names: str) -> list[Unit]:
    units = {unit.name: unit for unit in find_units(on_meta(model))}
    return [units[name] for name in names]


def test_attention_has_the_shape_of_its_one_input() -> None:
    layer = "encoder.layers.encoder_layer_3"
    assert by_name("vit_b_16", layer, f"{layer}.self_attention", f"{layer}.mlp") == [
        Unit(
            name=layer + suffix,
            chain="encoder.layers",
            role=role,
            sources=(f"encoder.layers.encoder_layer_2{suffix}", f"encoder.layers.encoder_layer_4{suffix}"),
            num_params=count,
            input_shape=(197, 768),
            output_shape=(197, 768),
        )
        for suffix, role, count in (
            ("", "block", 7_087_872),
            (".self_attention", "self_attention", 4 * 768 * 768 + 4 * 768),
            (".mlp", "mlp", 2 * 768 * 3072 + 3072 + 768),
        )
    ]


def test_roles_have_shapes_of_their_own() -> None:
    units = by_name("mixer_b16_224", "blocks.1.mlp_tokens", "blocks.1.mlp_channels")
    assert [(unit.input_shape, unit.output_shape) for unit in units] == [((768, 196),) * 2, ((196, 768),) * 2]
    units = by_name("resnet32", "layer2.0.conv1", "layer2.0.conv2")
    assert [(unit.input_shape, unit.output_shape) for unit in units] == [
        ((16, 32, 32), (32, 16, 16)),
        ((32, 16, 16), (32, 16, 16)),
    ]
    assert [unit.num_params for unit in units] == [9 * 16 * 32, 9 * 32 * 32]


@pytest.mark.parametrize(("name", "key"), [("vit_tiny", "image_size"), ("deit_tiny", "img_size")])
def test_the_size_that_a_model_declares_is_its_input(name: str, key: str) -> None:
    with torch.device("meta"):
        model = build_model(name, **{key: 48})  # type: ignore[arg-type]
    patches = {"vit_tiny": 12 * 12, "deit_tiny": 3 * 3}[name]
    assert find_units(model)[0].input_shape == (patches + 1, 192)


def test_densenet_has_no_units_and_says_why() -> None:
    with pytest.raises(ModelError) as caught:
        find_units(on_meta("densenet121"))
    assert str(caught.value).splitlines() == [
        "DenseNet has no unit to replace: none of its nn.Sequential or nn.ModuleList holds two or more consecutive "
        "children of one class that run and have parameters, norm layers left out",
        "what was looked at:",
        "  - features (Sequential): Conv2d, BatchNorm2d, ReLU, MaxPool2d, _DenseBlock, _Transition, _DenseBlock, "
        "_Transition, _DenseBlock, _Transition, ... (12 in all)",
        "  - features.denseblock1 (_DenseBlock): 6 _DenseLayer, but this is no nn.Sequential or nn.ModuleList",
        "  - features.transition1 (_Transition) and 2 more: BatchNorm2d, ReLU, Conv2d, AvgPool2d",
        "  - features.denseblock2 (_DenseBlock): 12 _DenseLayer, but this is no nn.Sequential or nn.ModuleList",
        "  - features.denseblock3 (_DenseBlock): 24 _DenseLayer, but this is no nn.Sequential or nn.ModuleList",
        "  - features.denseblock4 (_DenseBlock): 16 _DenseLayer, but this is no nn.Sequential or nn.ModuleList",
        "put the blocks that repeat one after the other into an nn.Sequential; where each block takes the outputs of "
        "all the blocks before it, as in a DenseNet, none has a like neighbour to borrow from: choose a model of "
        "repeated blocks, as resnet50 or vit_b_16",
    ]


@pytest.mark.parametrize("name", ["resnet152", "vit_l_16"])
def test_large_models_are_looked_at_in_seconds(name: str) -> None:
    model = on_meta(name)
    find_units(model)  # imports
    started = time.perf_counter()
    find_units(model)
    assert time.perf_counter() - started < 3
