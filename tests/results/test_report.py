"""report.html and front.png: whole, offline, and safe whatever a run's files say."""

from __future__ import annotations

import base64
import io
import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlsearch.errors import RunFolderError, UserError
from rlsearch.policy import Policy, Replacement
from rlsearch.results import front, read_run, select
from rlsearch.results.charts import front_chart, hypervolume_chart, units_chart
from rlsearch.results.figures import front_png, groups, run_title
from rlsearch.results.report import report_html, write_report
from rlsearch.results.selection import normalised_hypervolume, policy_of

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """The text of each table row, the elements with their attributes, and the scripts."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.charts: list[str] = []
        self._of_script: dict[str, str | None] = {}
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self._of_script = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            (self.charts if self._of_script.get("type") == "application/json" else self.scripts).append(data)
        elif "style" not in self._open:
            self.text += data
            if "td" in self._open or "th" in self._open:
                self.rows[-1][-1] += data if "small" not in self._open else f" [{data}]"


@pytest.fixture
def report(run_folder: Path) -> Page:
    run = read_run(run_folder)
    return Page(report_html(run, select(run)))


def test_write_report_writes_its_files(run_folder: Path) -> None:
    written = write_report(read_run(run_folder))
    assert written == {
        "report": run_folder / "report.html",
        "front": run_folder / "front.png",
        "units": run_folder / "units.png",
    }
    with Image.open(written["front"]) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert written["report"].read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert {path.name for path in run_folder.iterdir()} == {
        *("space.yaml", "trials.parquet", "epochs", "report.html", "front.png", "units.png")
    }


def test_the_report_loads_nothing(report: Page) -> None:
    metas = [attributes for tag, attributes in report.elements if tag == "meta"]
    policies = [item["content"] for item in metas if item.get("http-equiv") == "Content-Security-Policy"]
    # The two scripts of the page itself run, by their digests; what holds a chart's data is no script to a browser.
    digests = [f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in report.scripts]
    assert policies == [
        f"default-src 'none'; script-src {' '.join(digests)}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    ]
    assert len(digests) == 2
    assert all(not name.startswith("on") for _, attributes in report.elements for name in attributes)
    assert all(tag not in ("link", "img", "iframe", "object", "embed", "base", "form") for tag, _ in report.elements)
    assert all(not {"src", "href", "action"} & attributes.keys() for _, attributes in report.elements)
    assert any("plotly.js" in script for script in report.scripts)


def test_the_front_and_the_controls_are_in_the_table(run_folder: Path, report: Page) -> None:
    run = read_run(run_folder)
    heads = [index for index, row in enumerate(report.rows) if row[:1] == ["trial"]]
    rows = report.rows[heads[0] + 1 : heads[1]]
    numbers = [int(row[0].replace("★", "")) for row in rows]
    others = [record.trial for record in front(run) if record.trial != 0]
    assert numbers == [0, *others, *({1, 2} - set(others))]
    assert rows[0][:3] == ["0", "97.41 %", "466,906"]
    (picked,) = [row for row in rows if "★" in row[0]]
    assert int(picked[0].replace("★", "")) == select(run).trial
    assert re.fullmatch(r"[\d,]+ \[[−+±][\d.]+ %\]", picked[2])
    assert any("[skip control" in row[-1] for row in rows)


def test_failures_and_every_trial_are_in_the_report(report: Page) -> None:
    failures = [row[:3] for row in report.rows if len(row) == 4 and row[1] in ("FAIL", "PRUNED", "INFEASIBLE")]
    assert failures == [["7", "FAIL", "diverged"], ["11", "INFEASIBLE", "out_of_memory"], ["15", "PRUNED", "raced out"]]
    heads = [index for index, row in enumerate(report.rows) if row[:2] == ["trial", "state"]]
    assert [int(row[0]) for row in report.rows[heads[-1] + 1 :]] == list(range(24))
    assert "max_fraction: 0.5" in report.text
    assert "skip control (trial 1)" in report.text


def test_what_a_file_says_is_text_and_nothing_else(make_record: Any, make_run: Any) -> None:
    def written_with(word: str) -> str:
        policy = Policy(replacements=(Replacement(f"layer1.{word}", word, {word: word}),))
        space = {"objectives": {"accuracy": "maximize", "params": "minimize"}, "model": {"name": word}, word: word}
        records = [
            make_record(0, training=json.dumps({word: 1})),
            make_record(1, policy, params=5, training=json.dumps({word: word})),
            make_record(2, policy, state="FAIL", reason=word, accuracy=None),
        ]
        run = read_run(make_run(records, space))
        return report_html(run, select(run))

    content = written_with(EVIL)
    evil, harmless = Page(content), Page(written_with("harmless"))
    assert "alert(1)" in evil.text
    assert evil.elements == harmless.elements
    assert evil.scripts == harmless.scripts
    assert len(evil.charts) == len(harmless.charts) > 2
    assert all(json.loads(chart)["data"] for chart in evil.charts)
    for raw in ("<script>alert", "<img src=x", "</script><script>alert"):
        assert raw not in content


def test_labels_that_plotly_reads_as_html_are_escaped(make_record: Any, make_run: Any) -> None:
    policy = Policy(replacements=(Replacement("<a href='javascript:1'>unit</a>", "<b>block</b>"),))
    run = read_run(make_run([make_record(0), make_record(1, policy, params=5)]))
    for figure in (front_chart(run, select(run)), units_chart(run, select(run))):
        labels = [label for trace in figure.data for label in (trace.name, *trace.x, *(trace.text or ()))]
        assert any("&lt;b&gt;block" in str(label) for label in labels)
        assert not any("<" in str(label).replace("<br>", "") for label in labels)


def test_the_groups_of_the_picture_part_the_trials(run_folder: Path) -> None:
    run = read_run(run_folder)
    pick = select(run)
    drawn = {group.label: [record.trial for record in group.records] for group in groups(run, pick)}
    members = {record.trial for record in front(run)}
    complete = {record.trial for record in run.records if record.state == "COMPLETE"}
    assert drawn.pop(f"pick: trial {pick.trial}") == [pick.trial]
    assert drawn.pop("end-to-end baseline") == [0]
    assert sorted(trial for trials in drawn.values() for trial in trials) == sorted(complete - {0})
    assert set(drawn["on the front"]) | set(drawn.get("control on the front", [])) == members - {0}
    assert set(drawn.get("control", [])) | set(drawn.get("control on the front", [])) == {1, 2}


def test_the_units_picture_shows_each_replacement_of_the_front(run_folder: Path) -> None:
    run = read_run(run_folder)
    pick = select(run)
    shown = {
        (trace.name, unit, int(label.removeprefix("★ ").split()[1].rstrip(",")))
        for trace in units_chart(run, pick).data
        for unit, label in zip(trace.x, trace.y, strict=True)
    }
    assert shown == {
        (item.block, item.unit, record.trial) for record in front(run) for item in policy_of(record).replacements
    }


def test_the_hypervolume_ends_at_that_of_the_run(run_folder: Path) -> None:
    run = read_run(run_folder)
    (trace,) = hypervolume_chart(run).data
    assert trace.x[-1] == run.records[-1].trial
    assert trace.y[-1] == normalised_hypervolume(run)
    assert list(trace.y) == sorted(trace.y)


@pytest.mark.parametrize(
    "objectives",
    [
        {"accuracy": "maximize"},
        {"train_seconds": "minimize", "samples_per_second": "maximize"},
        dict.fromkeys(("params", "memory", "train_flops", "forward_flops", "train_seconds"), "minimize")
        | {"accuracy": "maximize"},
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_any_set_of_objectives_with_a_baseline_or_without(
    make_record: Any, make_run: Any, objectives: dict[str, str], first: int
) -> None:
    records = [make_record(trial, accuracy=0.9 + trial / 100, params=500 - trial) for trial in range(first, first + 2)]
    run = read_run(make_run(records, {"objectives": objectives}))
    pick = select(run)
    assert Page(report_html(run, pick)).rows
    with Image.open(io.BytesIO(front_png(run, pick))) as image:
        assert image.format == "PNG"


def test_a_damaged_epochs_table_is_named(run_folder: Path) -> None:
    run = read_run(run_folder)
    path = run_folder / "epochs" / "trial-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match=r"trial-00000\.parquet: is damaged"):
        report_html(run, select(run))
    path.unlink()
    assert report_html(run, select(run))


def test_a_wrong_key_and_a_run_without_results_are_refused(make_record: Any, make_run: Any, run_folder: Path) -> None:
    with pytest.raises(UserError, match="unknown objective 'speed'"):
        write_report(read_run(run_folder), "speed")
    run = read_run(make_run([make_record(0, state="FAIL", accuracy=None)]))
    with pytest.raises(RunFolderError, match="no trial is complete"):
        write_report(run)
    assert not (run.folder / "report.html").exists()


def test_the_title_shows_no_path(make_record: Any, make_run: Any) -> None:
    space = {
        "objectives": {"accuracy": "maximize"},
        "model": {"name": "resnet20"},
        "data": {"name": "parquet:/a/b/cifar10/"},
    }
    assert run_title(read_run(make_run([make_record(0)], space))) == "resnet20 on cifar10"
    bare = {"objectives": {"accuracy": "maximize"}}
    assert run_title(read_run(make_run([make_record(0)], bare))) == "run"
