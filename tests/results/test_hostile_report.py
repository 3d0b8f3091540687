"""The report of a run whose files say anything at all: text, and never more of a page than a harmless one has."""

from __future__ import annotations

import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_run import SPACE, record, write_run

from rlsearch.policy import Policy, Replacement
from rlsearch.results import page, read_run, select
from rlsearch.results.report import report_html, write_report

PIECES = [
    *(
        "</script>",
        "<script>",
        "<!--",
        "-->",
        "]]>",
        "<img src=x onerror=alert(1)>",
        "javascript:",
        "</style>",
        "</title>",
    ),
    *(
        '"',
        "'",
        "`",
        "&",
        "&lt;",
        "\\",
        "\\u003c",
        "\u2028",
        "${x}",
        "$\\frac{",
        "$$",
        "=1+1",
        "+1",
        "-1",
        "@x",
        "\t",
        "%",
    ),
    *("<a href='http://a.example'>", "</pre>", "é", "\U0001f600", "{", "}", "http://a.example/x.js", "url(http://a)"),
]
WORDS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), min_size=1, max_size=6).map("".join)
# What a policy calls a name; anything else is refused when the policy is read.
NAMES = WORDS.filter(lambda word: word.isprintable() and 0 < len(word) < 200)


class Elements(HTMLParser):
    """Tags with their attributes, but for what JSON data hold; scripts by their text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.data: list[str] = []
        self._kind: str | None = None
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))
        self._kind = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self._kind = None

    def handle_data(self, data: str) -> None:
        if self._kind in ("script", "style"):
            self.found.append(data)
        if self._kind == "application/json":
            self.data.append(data)


def run_with(folder: Path, name: str, word: str) -> Path:
    policy = Policy(replacements=(Replacement(f"layer1.{name}", name, {name: word}), Replacement(name, "skip", {})))
    space = SPACE | {"model": {"name": word, word: word}, "data": {"name": word}, f"x{word}": [word]}
    reason = word.encode(errors="replace").decode()
    records = [
        record(0, training=json.dumps({word: 1})),
        record(1, policy, params=5, training=json.dumps({word: word}), device=reason, reason=reason),
        record(2, policy, params=6, accuracy=0.97),
        record(3, policy, params=7, accuracy=0.98, origin="skip control"),
        record(4, policy, state="FAIL", reason=reason, accuracy=None),
        *(
            record(trial, policy if trial % 2 else None, seed=trial, params=9, origin="sampler")
            for trial in range(5, 12)
        ),
    ]
    return write_run(folder, records, space)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES, WORDS)
def test_the_page_has_the_elements_of_a_harmless_one(name: str, word: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hostile = read_run(run_with(Path(folder, "hostile"), name, word))
        harmless = read_run(run_with(Path(folder, "harmless"), "name", "word"))
        pages = [Elements(report_html(run, select(run))) for run in (hostile, harmless)]
    assert pages[0].found == pages[1].found
    for data in pages[0].data:
        assert not set("<>&") & set(data)
        assert {"data", "layout"} <= json.loads(data).keys()


@pytest.mark.filterwarnings("ignore:Glyph")  # no font has them all
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES, WORDS)
def test_all_files_are_written(name: str, word: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = run_with(Path(folder, "run"), f"$\\frac{{{name}$", word)
        assert set(write_report(read_run(run))) == {"report", "front", "units"}
        content = (run / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)
    assert policy is not None
    assert content.index(policy[0]) < content.index("<script")


def test_text_cannot_leave_a_chart() -> None:
    import plotly.graph_objects as go

    figure = go.Figure(go.Scatter(x=[1], y=[2], name="</script><script>alert(1)</script>&<!--"))
    made = page.chart(figure, "a-chart")
    assert made.count("<script") == made.count("</script>") == 1
    (data,) = Elements(made).data
    assert json.loads(data)["data"][0]["name"] == "</script><script>alert(1)</script>&<!--"
