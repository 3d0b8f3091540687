"""Which layers left when: out of a trial's epochs, into words, JSON, tables and charts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsearch.policy import LearnDrop, Policy
from rlsearch.results import Run, read_run, select, summary, write_epochs
from rlsearch.results.departures import Cut, Departures, departures, departures_of, describe_departures
from rlsearch.results.dropping_charts import departures_chart, dropping_chart
from rlsearch.results.report import report_html
from rlsearch.results.selection import Selection, front, policy_of
from rlsearch.results.tables import epochs_path

LAYERS = ("stem", "a", "b", "c", "head")
MEMORY = (100, 90, 90, 60)


def rows(*cuts: int) -> list[dict[str, Any]]:
    """Epochs after each of which so many layers of `LAYERS` have left, the memory of a step each."""
    return [
        {
            "epoch": epoch,
            "accuracy": 0.2 * epoch,
            "step_memory": memory,
            "left": list(LAYERS[before:cut]),
            "learning": list(LAYERS[cut:]) if epoch == 1 or cut > before else [],
        }
        for epoch, (before, cut, memory) in enumerate(zip((0, *cuts), cuts, MEMORY, strict=False), start=1)
    ]


def test_layers_that_leave_after_the_first_epoch_are_known_too() -> None:
    found = departures(rows(1, 1, 3, 3))
    assert found == Departures(LAYERS, 4, (Cut(1, ("stem",), 100, 90), Cut(3, ("a", "b"), 90, 60)))
    assert found.num_left == 3
    assert found.last_epochs == (1, 3, 3, 4, 4)


def test_a_cut_that_no_epoch_followed_has_no_memory_after_it() -> None:
    found = departures(rows(0, 2))
    assert found is not None
    assert found.cuts == (Cut(2, ("stem", "a"), 90, None),)


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ((0, 0, 0, 0), "none of 5 layers left"),
        ((0, 2, 2, 2), "2 of 5 layers left, after epoch 2"),
        ((1, 2, 4, 4), "4 of 5 layers left, after epochs 1 to 3"),
        ((0,), "none of 5 layers left"),
    ],
)
def test_in_words(cuts: tuple[int, ...], expected: str) -> None:
    found = departures(rows(*cuts))
    assert found is not None
    assert describe_departures(found) == expected


def test_without_learn_drop_there_is_nothing_to_tell() -> None:
    assert departures([]) is None
    assert departures([{"epoch": 1, "learning": [], "left": []}]) is None
    assert departures([{"epoch": 1, "learning": None, "left": None}]) is None


def test_a_trial_whose_epochs_are_gone_tells_nothing(run_folder: Path) -> None:
    run = read_run(run_folder)
    record = run.records[2]
    assert departures_of(run, record) is not None
    assert departures_of(run, run.records[0]) is None
    epochs_path(run_folder, 2).unlink()
    assert departures_of(run, record) is None


@pytest.fixture
def small(make_record: Any, make_run: Any) -> Run:
    """The baseline, and two trials with Learn&Drop on the front; of the second nothing left."""
    policy = Policy(learn_drop=LearnDrop(threshold=0.3))
    saved = {"forward_share": 0.713, "mean_learnable_params": 312_114.4, "step_memory": 60, "dropped_units": 2}
    records = [
        make_record(0, accuracy=0.9, params=100),
        make_record(1, policy, accuracy=0.8, params=50, **saved),
        make_record(2, policy, accuracy=0.7, params=40, step_memory=100),
    ]
    folder = make_run(records, {"objectives": {"accuracy": "maximize", "params": "minimize"}})
    write_epochs(epochs_path(folder, 1), rows(1, 1, 3, 3))
    write_epochs(epochs_path(folder, 2), rows(0, 0, 0, 0))
    return read_run(folder)


def test_the_summary_tells_what_left_when(small: Run) -> None:
    told = {item["trial"]: item["learn_drop"] for item in summary(small)["front"]}
    assert told[0] is None
    assert told[1] == {
        "forward_share": 0.713,
        "mean_learnable_params": 312_114.4,
        "step_memory": 60,
        "dropped_units": 2,
        "layers": list(LAYERS),
        "cuts": [
            {"epoch": 1, "left": ["stem"], "memory_before": 100, "memory_after": 90},
            {"epoch": 3, "left": ["a", "b"], "memory_before": 90, "memory_after": 60},
        ],
    }
    assert told[2]["cuts"] == []
    epochs_path(small.folder, 1).unlink()
    gone = {item["trial"]: item["learn_drop"] for item in summary(small)["front"]}[1]
    assert gone == told[1] | {"layers": None, "cuts": None}


def test_the_chart_shows_a_cell_a_layer_and_epoch(small: Run) -> None:
    found = departures_of(small, small.records[1])
    assert found is not None
    cells, memory, accuracy = dropping_chart(rows(1, 1, 3, 3), found).data
    assert list(cells.y) == list(LAYERS)
    assert list(cells.x) == [1, 2, 3, 4]
    assert [list(row) for row in cells.z] == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert list(memory.y) == pytest.approx([value / 2**20 for value in MEMORY])
    assert list(accuracy.y) == pytest.approx([20, 40, 60, 80])


def test_the_chart_of_the_front_has_a_row_a_trial(small: Run) -> None:
    told = [(record, departures_of(small, record)) for record in small.records[1:]]
    (cells,) = departures_chart(told, Selection(2, "")).data  # type: ignore[arg-type]
    assert list(cells.y) == ["trial 1, 80.00 %", "★ trial 2, 70.00 %"]
    assert [list(row) for row in cells.z] == [[1, 3, 3, 4, 4], [4, 4, 4, 4, 4]]


def test_the_report_shows_the_pick_and_then_the_front(run_folder: Path, small: Run) -> None:
    content = report_html(small, Selection(1, "the one"))
    sentence = "★ trial 1, 80.00 %: 3 of 5 layers left, after epochs 1 to 3; forward compute 71.3 % of end-to-end; "
    assert f"{sentence}312,114 parameters learned on average." in content
    assert 'id="dropping-chart"' in content
    assert 'id="departures-chart"' in content
    # A pick without Learn&Drop: the first of the front that has it.
    assert "<p>trial 1, 80.00 %: 3 of 5 layers left" in report_html(small, Selection(0, "the one"))
    # One alone needs no second chart, and none no section.
    two = report_html(replace(small, records=small.records[:2]), Selection(1, "the one"))
    assert 'id="dropping-chart"' in two
    assert 'id="departures-chart"' not in two
    assert "dropping-chart" not in report_html(replace(small, records=small.records[:1]), Selection(0, "the one"))
    run = read_run(run_folder)
    dropped = [record for record in front(run) if policy_of(record).learn_drop is not None]
    assert report_html(run, select(run)).count(" layers left, after ") >= len(dropped) > 0


def test_names_of_layers_are_text_in_the_charts(small: Run) -> None:
    evil = "<b>x</b>"
    found = departures([rows(0)[0] | {"learning": [evil, "head"]}])
    assert found is not None
    figure = dropping_chart(rows(0), found)
    assert figure.data[0].y[0] == "&lt;b&gt;x&lt;/b&gt;"
    figure = departures_chart([(small.records[1], found)], Selection(1, ""))
    assert figure.data[0].x[0] == "&lt;b&gt;x&lt;/b&gt;"
