"""Which units bear replacing: from probes and from all trials of a run, as numbers, picture, page and JSON."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlsearch.errors import RunFolderError
from rlsearch.policy import LearnDrop, Policy, Replacement
from rlsearch.results import read_run, select, summary
from rlsearch.results.report import report_html, write_report
from rlsearch.results.tables import Run, epochs_path, write_epochs
from rlsearch.results.unit_effects import LEAST_TRIALS, UnitEffect, trained_in_full, unit_effects
from rlsearch.results.unit_effects_chart import unit_effects_chart
from rlsearch.results.unit_words import effects_note, unit_labels, unit_stages
from rlsearch.results.units_figure import units_png

EFFECTS = {"layer1.1": 0.0, "layer1.2": -0.05, "layer1.10": -0.01, "layer2.1": -0.02}
RARE = "layer2.2"


def replacing(*units: str, learn_drop: LearnDrop | None = None) -> Policy:
    return Policy(replacements=tuple(Replacement(unit, "scalar") for unit in units), learn_drop=learn_drop)


@pytest.fixture
def probed(make_record: Any, make_run: Any) -> Path:
    """Three baselines, a probe of each unit, 40 trials in full of which Learn&Drop and a low rate cost much."""
    source = random.Random(0)
    records, early = [], {}
    for trial, accuracy in enumerate((0.96, 0.95, 0.97)):
        origin = "baseline repeat" if trial else "baseline"
        records.append(make_record(trial, accuracy=accuracy, origin=origin, seed=trial))
        early[trial] = (0.5, 0.52, 0.54)[trial]
    for unit in (*EFFECTS, RARE):
        trial = len(records)
        probe = {"state": "PRUNED", "origin": "sensitivity", "fidelity": 1, "reason": "probe: …"}
        early[trial] = 0.52 + 2 * EFFECTS.get(unit, 0.01)
        records.append(make_record(trial, replacing(unit), accuracy=early[trial], **probe))
    for index in range(40):
        units = source.sample(list(EFFECTS), source.randint(0, 3)) + [RARE] * (index == 0)
        has_drop, lr = source.random() < 0.5, source.choice([0.01, 0.1])
        accuracy = 0.96 + sum(EFFECTS.get(unit, 0.0) for unit in units) + source.gauss(0, 0.003)
        accuracy -= 0.1 * has_drop + 0.2 * (lr < 0.1)
        policy = replacing(*units, learn_drop=LearnDrop(threshold=source.uniform(0.2, 0.8)) if has_drop else None)
        training = json.dumps({"epochs": 3, "lr": lr, "optimizer": "sgd"})
        records.append(make_record(len(records), policy, accuracy=accuracy, training=training, dropped_units=0))
    folder: Path = make_run(records)
    for trial, accuracy in early.items():
        write_epochs(epochs_path(folder, trial), [{"epoch": 1, "epochs": 3, "accuracy": accuracy}])
    return folder


def by_name(run: Run) -> dict[str, UnitEffect]:
    return {effect.unit: effect for effect in unit_effects(run)}


def test_the_model_tells_each_units_effect_in_the_models_order(probed: Path) -> None:
    found = by_name(read_run(probed))
    assert list(found) == ["layer1.1", "layer1.2", "layer1.10", "layer2.1", RARE]
    for unit, effect in EFFECTS.items():
        assert found[unit].change == pytest.approx(effect, abs=0.004)
        assert 0 < (found[unit].sd or 0) < 0.003


def test_a_unit_that_few_trials_replaced_has_none(probed: Path) -> None:
    rare = by_name(read_run(probed))[RARE]
    assert (rare.trials, rare.change, rare.sd) == (1, None, None)
    assert rare.probe is not None


def test_a_probe_is_compared_with_the_baselines_after_as_many_epochs(probed: Path) -> None:
    probe = by_name(read_run(probed))["layer1.2"].probe
    assert probe is not None
    assert (probe.epoch, probe.block) == (1, "scalar")
    assert probe.change == pytest.approx(-0.1)
    assert probe.sd == pytest.approx(0.02 * math.sqrt(1 + 1 / 3))
    # One seed tells no spread; nor do two that agree.
    alone = replace(read_run(probed), records=tuple(r for r in read_run(probed).records if r.trial not in (1, 2)))
    assert (by_name(alone)["layer1.2"].probe or probe).sd is None
    write_epochs(epochs_path(probed, 1), [{"epoch": 1, "epochs": 3, "accuracy": 0.5}])
    agreeing = replace(alone, records=tuple(r for r in read_run(probed).records if r.trial != 2))
    assert (by_name(agreeing)["layer1.2"].probe or probe).sd is None


def test_a_probe_without_a_result_or_a_baseline_is_none(probed: Path) -> None:
    write_epochs(epochs_path(probed, 4), [{"epoch": 1, "epochs": 3, "accuracy": math.nan}])
    epochs_path(probed, 5).unlink()
    found = by_name(read_run(probed))
    assert found["layer1.2"].probe is None
    assert found["layer1.10"].probe is None
    assert found["layer1.1"].probe is not None
    for trial in range(3):
        epochs_path(probed, trial).unlink()
    assert {effect.probe for effect in unit_effects(read_run(probed))} == {None}


def test_a_damaged_table_of_a_probe_is_named(probed: Path) -> None:
    path = epochs_path(probed, 4)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match=r"trial-00004\.parquet: is damaged"):
        unit_effects(read_run(probed))


def test_the_model_is_made_of_trials_in_full_whether_or_not_they_keep_constraints(
    make_record: Any, make_run: Any
) -> None:
    policy = replacing("layer1.1")
    records = [
        make_record(0),
        make_record(1, policy, state="INFEASIBLE", reason="constraint: params"),
        make_record(2, policy, state="INFEASIBLE", reason="out_of_memory", fidelity=2),
        make_record(3, policy, state="PRUNED", reason="raced out after epoch 1: …", fidelity=1),
        make_record(4, policy, state="FAIL", reason="diverged", accuracy=math.nan),
        make_record(5, policy, fidelity=9, training=json.dumps({"epochs": 9})),
    ]
    run = read_run(make_run(records))
    assert [record.trial for record in trained_in_full(run)] == [0, 1, 5]
    assert by_name(run)["layer1.1"] == UnitEffect("layer1.1", 2)


def test_a_search_too_short_to_tell_says_so(make_record: Any, make_run: Any) -> None:
    records = [make_record(0), *(make_record(trial, replacing("layer1.1")) for trial in range(1, 1 + LEAST_TRIALS))]
    run = read_run(make_run(records))
    assert unit_effects(run) == (UnitEffect("layer1.1", LEAST_TRIALS),)
    assert units_png(run) is None
    assert unit_effects_chart(unit_effects(run)) is None
    assert "Too few trials that replaced a layer" in report_html(run, select(run))
    assert set(write_report(run)) == {"report", "front"}


def test_a_search_that_replaces_nothing_has_no_such_part(make_record: Any, make_run: Any) -> None:
    run = read_run(make_run([make_record(0), make_record(1, Policy(learn_drop=LearnDrop()))]))
    assert unit_effects(run) == ()
    assert unit_effects(replace(run, records=())) == ()
    assert units_png(run) is None
    assert "Which layers bear replacing" not in report_html(run, select(run))
    assert summary(run)["unit_effects"] == []


def test_the_report_the_picture_and_the_summary_show_it(probed: Path) -> None:
    run = read_run(probed)
    written = write_report(run)
    assert written["units"] == probed / "units.png"
    with Image.open(written["units"]) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    content = written["report"].read_text(encoding="utf-8")
    assert "<h2>Which layers bear replacing</h2>" in content
    assert "linear model of the 43 trials" in content
    assert "one training each (scalar) up to epoch 1" in content
    told = json.loads(json.dumps(summary(run), allow_nan=False))["unit_effects"]
    assert [entry["unit"] for entry in told] == [effect.unit for effect in unit_effects(run)]
    assert told[1].keys() == {"unit", "trials", "change", "sd", "probe"}
    assert told[1]["probe"] == {
        "change": pytest.approx(-0.1),
        "sd": pytest.approx(0.0231, abs=1e-4),
        "epoch": 1,
        "block": "scalar",
    }


def test_the_chart_has_a_bar_and_a_diamond_a_unit(probed: Path) -> None:
    effects = unit_effects(read_run(probed))
    bars, diamonds = unit_effects_chart(effects).data
    assert (bars.type, diamonds.type, diamonds.marker.symbol) == ("bar", "scatter", "diamond")
    assert "by the model" in bars.text[0]
    assert "replaced alone by scalar, after epoch 1" in diamonds.text[1]
    assert list(bars.y) == [0, 1, 2, 3]
    assert list(bars.x) == [100 * (effect.change or 0) for effect in effects[:4]]
    assert list(bars.error_x.array) == [100 * (effect.sd or 0) for effect in effects[:4]]
    assert list(diamonds.y) == [0, 1, 2, 3, 4]
    assert diamonds.x[1] == pytest.approx(-10)
    # What is told apart from nothing is darker.
    assert bars.marker.color[0] != bars.marker.color[1] == bars.marker.color[3]
    (word,) = unit_effects_chart(effects).layout.annotations
    assert (word.y, word.text) == (4, "<i>1 trial replaced it: too few</i>")


def test_probes_alone_make_a_picture_too(probed: Path) -> None:
    run = read_run(probed)
    short = replace(run, records=run.records[:8])
    (diamonds,) = unit_effects_chart(unit_effects(short)).data
    assert len(diamonds.x) == 5
    png = units_png(short)
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
    assert "Too few trials were trained to the end" in effects_note(short, unit_effects(short))


def test_names_of_units_are_text(probed: Path) -> None:
    effects = [replace(effect, unit=f"<b>{effect.unit}</b>") for effect in unit_effects(read_run(probed))]
    figure = unit_effects_chart(effects)
    texts = [*figure.layout.yaxis.ticktext, *(text for trace in figure.data for text in trace.text)]
    assert all("<b>" not in text and "&lt;b&gt;" in text for text in texts)


@pytest.mark.parametrize(
    ("names", "shared", "labels"),
    [
        (["layer1.0", "layer2.1"], "", ["layer1.0", "layer2.1"]),
        (["layer1.0", "layer1.1"], "", ["layer1.0", "layer1.1"]),  # no numbers alone
        (["enc.layers.l_1.mlp", "enc.layers.l_2.mlp"], "enc.layers", ["l_1.mlp", "l_2.mlp"]),
        (["enc.layers.l_1"], "", ["enc.layers.l_1"]),
    ],
)
def test_what_all_names_share_is_said_once(names: list[str], shared: str, labels: list[str]) -> None:
    assert unit_labels([UnitEffect(name, 1) for name in names]) == (shared, labels)


@pytest.mark.parametrize(
    ("labels", "starts"),
    [
        (["layer1.0", "layer1.1", "layer1.10", "layer2.0", "layer2.1", "layer2.2"], [3]),
        (["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.conv2"], [3]),
        (["stages.0.blocks.1", "stages.0.blocks.2", "stages.1.blocks.1", "stages.1.blocks.2"], [2]),
        ([f"encoder_layer_{index}.{role}" for index in range(3) for role in ("mlp", "self_attention")], []),
        (["a.x", "b.y", "c.z"], []),  # every row another one: no stages
    ],
)
def test_where_stages_begin(labels: list[str], starts: list[int]) -> None:
    assert unit_stages(labels) == starts
