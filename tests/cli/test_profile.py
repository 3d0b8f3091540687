"""``rlsearch profile``: its numbers, its tables, and its words for mistakes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from rich.table import Table

from rlsearch import Policy, Replacement, build_model
from rlsearch.cli.profile_content import profile_content
from rlsearch.cli.profile_picture import profile_figure, write_picture
from rlsearch.cli.profile_table import layers_table, policy_tables, units_table
from rlsearch.errors import ConfigError, SurgeryError
from rlsearch.training.cost import CostModel

SETTING = {"input_shape": [3, 32, 32], "batch_size": 8, "optimizer": "sgd"}
SAVINGS = ["params_saved", "memory_saved", "forward_flops_saved", "step_flops_saved"]


def costs_of(name: str, **kwargs: Any) -> CostModel:
    with torch.device("meta"):
        model = build_model(name, **kwargs)
    return CostModel(model, (3, 32, 32), 8)


@pytest.fixture(scope="module")
def resnet56() -> CostModel:
    return costs_of("resnet56")


def content_of(costs: CostModel, policy: Policy | None = None, pattern: str | None = None) -> dict[str, Any]:
    return profile_content("some", SETTING, costs, policy, pattern, lambda _: None)


def shown(table: Table, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_saving_is_the_difference_of_two_costs(resnet56: CostModel) -> None:
    content = content_of(resnet56, pattern="layer1.1*")
    assert [unit["name"] for unit in content["units"]] == ["layer1.1", "layer1.1.conv1", "layer1.1.conv2"]
    baseline = resnet56.cost(Policy())
    for unit, options in ((content["units"][0], {"operator": "single"}), (content["units"][1], {})):
        saving = unit["blocks"]["scalar"]["single"] if options else unit["blocks"]["scalar"]
        cost = resnet56.cost(Policy(replacements=(Replacement(unit["name"], "scalar", options),)))
        assert saving["fits"] is True
        assert [saving[key] for key in SAVINGS] == [
            baseline.params - cost.params,
            baseline.memory - cost.memory,
            baseline.forward_flops - cost.forward_flops,
            baseline.step_flops - cost.step_flops,
        ]
    assert content["units"][0]["blocks"]["skip"]["params_saved"] == content["units"][0]["params"] == 4_672
    assert content["units"][0]["sources"] == ("layer1.0", "layer1.2")
    assert "single" not in content["units"][0]["blocks"]["skip"]
    # A role is one layer already.
    assert content["units"][1]["blocks"]["angle"]["single"]["fits"] is False
    assert "single layer already" in content["units"][1]["blocks"]["angle"]["single"]["reason"]


def test_what_does_not_fit_says_why(resnet56: CostModel) -> None:
    (unit,) = content_of(resnet56, pattern="layer1.0")["units"]
    block = unit["blocks"]["scalar"]
    assert set(block) == {"fits", "reason", "single"}
    assert block["fits"] is False
    assert "layer1.0: is the first unit of its chain layer1" in block["reason"]


def test_equal_units_and_equal_blocks_are_shown_once(resnet56: CostModel) -> None:
    lines = shown(units_table(content_of(resnet56)), width=120)
    header = next(index for index, line in enumerate(lines) if line.startswith("unit "))
    assert [line.strip() for line in lines[header - 2 : header]] == ["scalar", "angle"]
    assert lines[header].split()[2:] == [
        "params",
        "skip",
        "constant",
        "coupled",
        "channel",
        "lowrank",
        "project",
        "single",
    ]
    rows = [line.rstrip() for line in lines[header + 2 : lines.index("layer2.…")]]
    split_at = lines[header].index(" n ")
    assert [row[:split_at].rstrip() for row in rows] == [
        "layer1.…",
        "  0",
        "  1 … 7",
        "  8",
        "  0.conv1",
        "  1 … 7 .conv1",
        "  8.conv1",
        "  0.conv2",
        "  1 … 7 .conv2",
        "  8.conv2",
    ]
    assert rows[2].split()[3:8] == ["7", "4.7k", "0.5/5.1/3.8", "0.5/0.1/1.3", "0.5/0.1/0"]
    assert rows[1].split()[1:] == ["1", "4.7k", "0.5/5.1/3.8", *["–"] * 6]
    assert rows[5].split()[4:10] == ["7", "2.3k", "0.3/1.3/1.9", "0.3/0/0.6", "0.3/0/0", "0.3/0/0"]
    assert rows[5].split()[10:12] == ["0.2/0/0", "0.2/0/0"]
    # layer2.0, layer3.0 and their first convolutions change the number of channels.
    assert any(line.startswith("Left out: 4 units in which nothing fits") for line in lines)


def test_a_deep_transformer_stays_readable() -> None:
    table = units_table(content_of(costs_of("vit_tiny")))
    lines = shown(table, width=120)
    header = next(index for index, line in enumerate(lines) if line.startswith("unit "))
    labels = [line[: lines[header].index(" n ")].strip() for line in lines[header + 2 :]]
    ends = ["", ".self_attention", ".mlp"]
    assert labels[: labels.index("")] == [
        "encoder.layers.encoder_l",
        "ayer_…",
        *(label for end in ends for label in (f"0{end}", f"1 … 10 {end}".rstrip(), f"11{end}")),
    ]


def test_a_policy_is_shown_beside_the_baseline(resnet56: CostModel) -> None:
    lazy = {"update_every": 4, "sources": "nearest"}
    policy = Policy(
        replacements=(
            *(Replacement(f"layer1.{index}.conv1", "scalar", lazy) for index in (2, 3, 5)),
            Replacement("layer2.3", "skip"),
        )
    )
    content = content_of(resnet56, policy, pattern="layer3.*")
    assert [(unit["name"], unit["sources"]) for unit in content["policy"]["units"]] == [
        ("layer1.2.conv1", ("layer1.1.conv1", "layer1.4.conv1")),
        ("layer1.3.conv1", ("layer1.1.conv1", "layer1.4.conv1")),
        ("layer1.5.conv1", ("layer1.4.conv1", "layer1.6.conv1")),
        ("layer2.3", None),
    ]
    cost = resnet56.cost(policy)
    assert content["policy"]["cost"]["params"] == cost.params == 855_770 - 3 * (2_304 - 2) - 18_560
    listing, beside = (shown(table) for table in policy_tables(content, "it"))
    assert [" ".join(line.split()) for line in listing[-2:]] == [
        "layer1.{2, 3, 5}.conv1 3 scalar (update_every: 4, sources: nearest)",
        "layer2.{3} 1 skip",
    ]
    row = next(line for line in beside if line.split()[:2] == ["learnable", "parameters"])
    assert row.split()[2:] == ["855,770", f"{cost.params:,}", "3.0", "%"]


def test_names_are_not_cut_within_a_number(resnet56: CostModel) -> None:
    content = content_of(resnet56, Policy(), pattern="layer1.1")
    names = ["layers.layer_10.mlp", "layers.layer_11.mlp", "layers.layer_12.mlp"]
    described = {"chain": "layers", "role": "mlp", "block": "skip", "options": {}, "sources": None}
    content["policy"]["units"] = [{"name": name, **described} for name in names]
    listing = shown(policy_tables(content, "it")[0])
    assert listing[-1].split() == ["layers.layer_{10,", "11,", "12}.mlp", "3", "skip"]


def test_mistakes_are_named(resnet56: CostModel) -> None:
    with pytest.raises(ConfigError, match=r"--units: no unit's name matches 'layer9\*'"):
        content_of(resnet56, pattern="layer9*")
    with pytest.raises(SurgeryError, match="layer9"):
        content_of(resnet56, Policy(replacements=(Replacement("layer9.0", "skip"),)))


def test_the_command_prints_json(in_process: Callable[..., Any], policy: Path) -> None:
    done = in_process("profile", "resnet20", "--policy", policy, "--units", "layer[12].1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert (content["model"], content["params"]) == ("resnet20", 272_474)
    assert [unit["name"] for unit in content["units"]] == ["layer1.1", "layer2.1"]
    assert content["units"][0]["sources"] == ["layer1.0", "layer1.2"]
    assert content["policy"]["cost"]["params"] == 272_474 - 18_560 - 4_608 + 2


def test_the_command_prints_tables(in_process: Callable[..., Any]) -> None:
    done = in_process("profile", "resnet20", "--preset", "v1", "--units", "layer1.1", "--image-size", 16)
    assert done.returncode == 0, done.stderr
    assert "272,474 parameters; images of 3×16×16" in done.stdout
    assert "the preset v1 replaces" in done.stdout
    assert "the preset v1 beside the baseline" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet20", "--preset", "v1", "--policy", "{policy}"], ["--preset", "cannot stand beside --policy"]),
        (["resnet20", "--preset", "v7"], ["unknown preset 'v7'"]),
        (["factories:no_image"], ["no image size could be guessed", "give --image-size"]),
    ],
)
def test_the_command_ends_with_2_and_one_message(
    in_process: Callable[..., Any], arguments: list[str], words: list[str], policy: Path, tmp_path: Path
) -> None:
    factory = (
        "from torch import nn\ndef no_image(num_classes):\n    return nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))\n"
    )
    (tmp_path / "factories.py").write_text(factory)
    done = in_process("profile", *(item.format(policy=policy) for item in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_the_layers_make_up_the_whole(resnet56: CostModel) -> None:
    layers, cost = content_of(resnet56, pattern="layer1.1")["layers"], resnet56.cost(Policy())
    assert [layer["name"] for layer in layers] == [segment.name for segment in resnet56.segments]
    assert sum(layer["params"] for layer in layers) == cost.params
    assert sum(layer["forward_flops"] for layer in layers) == cost.forward_flops
    assert sum(layer["step_flops"] for layer in layers) == cost.step_flops
    batch = 4 * 8 * 3 * 32 * 32
    share = sum(layer["peak_share"] for layer in layers) + batch / cost.memory
    assert share == pytest.approx(1, abs=0.02)
    rows = shown(layers_table(content_of(resnet56, pattern="layer1.1")))
    assert [row.split()[:2] for row in rows[4:7]] == [["stem", "1"], ["layer1.0", "…"], ["layer2.0", "1"]]


def test_the_picture_shows_every_layer_and_every_cut(resnet56: CostModel, tmp_path: Path) -> None:
    content, cuts = content_of(resnet56, pattern="layer1.1"), resnet56.at_cuts(Policy())
    cost = resnet56.cost(Policy())
    assert (cuts[0].memory, cuts[0].memory_stored) == (cost.memory, cost.memory)
    assert (cuts[0].step_flops, cuts[0].step_flops_stored) == (cost.step_flops, cost.step_flops)
    assert all(cut.step_flops_stored < cut.step_flops for cut in cuts[1:])
    figure = profile_figure(content, cuts)
    bars, _, _, memory, _ = figure.axes
    assert [text.get_text() for text in bars.get_yticklabels()] == [layer["name"] for layer in content["layers"]]
    assert [list(line.get_ydata()) for line in memory.lines] == [
        [cut.memory / 1e6 for cut in cuts],
        [cut.memory_stored / 1e6 for cut in cuts],
    ]
    write_picture(tmp_path / "cost.png", content, cuts)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    # No label lies on another: each has a row of its own, higher than its letters.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in bars.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
