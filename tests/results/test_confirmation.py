"""What trainings with new seeds say: means, intervals, chances, and where a run shows them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from rlsearch.errors import RunFolderError
from rlsearch.policy import Policy, Replacement
from rlsearch.results import read_run, select, summary
from rlsearch.results.confirmation import confirmations, estimate, front_chances
from rlsearch.results.confirmed import ConfirmedTraining, read_confirmed, write_confirmed
from rlsearch.results.confirmed_words import (
    confirmed_line,
    confirmed_section,
    describe_change,
    describe_confirmation,
    describe_mean,
)
from rlsearch.results.console import render_front
from rlsearch.results.report import report_html
from rlsearch.results.tables import Run, TrialRecord

TWO = {"accuracy": "maximize", "params": "minimize"}
# Trainings of three seeds with about the spread that small sets have.
SPREAD = np.array([-0.006, 0.001, 0.005])


def of(accuracies: Any, params: float) -> Any:
    """One policy's trainings (seeds, 2): noisy accuracies, and parameters that are exact."""
    return np.stack([np.asarray(accuracies), np.full(len(accuracies), params)], axis=1)


def trainings(record: TrialRecord, accuracies: dict[int, float | None], **costs: Any) -> list[ConfirmedTraining]:
    """Rows of one trial by seed; None diverged."""
    values = {"params": record.params, "memory": record.memory, "train_flops": record.train_flops} | costs
    return [
        ConfirmedTraining(record.trial, record.policy_hash, seed, test_accuracy=accuracy, **values)
        if accuracy is not None
        else ConfirmedTraining(record.trial, record.policy_hash, seed, reason="diverged: the loss became nan")
        for seed, accuracy in accuracies.items()
    ]


@pytest.fixture
def run(make_record: Any) -> Run:
    """A front of three on which validation and test disagree: trial 2 is far better on the test split."""
    skip = Policy(replacements=(Replacement("layer1.2", "skip"),))
    records = (
        make_record(0, accuracy=0.95, params=100),
        make_record(1, skip, accuracy=0.94, params=70),
        make_record(2, skip, accuracy=0.90, params=60),
        make_record(3, skip, accuracy=0.89, params=65),
    )
    rows = [
        *trainings(records[0], {1: 0.93, 2: 0.95, 3: 0.94}),
        *trainings(records[1], {1: 0.91, 2: 0.94, 3: 0.925}),
        *trainings(records[2], {1: 0.94, 2: 0.955, 3: 0.95}),
    ]
    return Run(Path("run"), TWO, records=records, confirmed=tuple(rows))


@pytest.mark.parametrize("values", [[0.91, 0.93, 0.92], [0.5, 0.6], [0.9, 0.91, 0.93, 0.92, 0.95]])
def test_the_interval_is_students(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert found.interval == pytest.approx(expected)


def test_the_interval_of_three_by_the_printed_table() -> None:
    # The 97.5 % point of t with two degrees of freedom is 4.303 in every table.
    assert estimate([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 / 3**0.5, abs=1e-3)


def test_one_value_has_no_interval() -> None:
    assert estimate([0.5]) == (found := estimate([0.5]))
    assert (found.mean, found.sd, found.half_width, found.interval, found.num) == (0.5, None, None, None, 1)


def test_policies_well_apart_are_on_the_front_or_not() -> None:
    chances = front_chances([of(0.95 + SPREAD, 100), of(0.80 + SPREAD, 100), of(0.94 + SPREAD, 50)], TWO)
    assert chances.tolist() == pytest.approx([1, 0, 1], abs=0.05)
    assert chances[1] < 0.001


def test_equal_policies_share_the_front() -> None:
    # At equal cost one of the two is on top in every draw, and each as often as the other.
    chances = front_chances([of(0.9 + SPREAD, 100)] * 2, TWO)
    assert chances.sum() == pytest.approx(1)
    assert chances[0] == pytest.approx(0.5, abs=0.02)


def test_the_chance_of_one_against_another_is_the_t_tests() -> None:
    left, right = 0.904 + SPREAD, 0.900 + 2 * SPREAD
    chances = front_chances([of(left, 100), of(right, 100)], TWO)
    t_value = stats.ttest_ind(left, right, equal_var=True).statistic
    assert chances[0] == pytest.approx(stats.t.cdf(t_value, len(left) + len(right) - 2), abs=0.015)


@pytest.mark.parametrize("times", [1, 4])
def test_the_spread_is_pooled_and_more_trainings_narrow_the_mean(times: int) -> None:
    # The first policy's own trainings agree by chance; the other's say how far that can be believed.
    same, other = np.full(3 * times, 0.904), np.tile(0.9 + SPREAD, times)
    pooled = (np.var(same, ddof=1) + np.var(other, ddof=1)) / 2
    t_value = (same.mean() - other.mean()) / np.sqrt(2 * pooled / len(same))
    expected = stats.t.cdf(t_value, 2 * len(same) - 2)
    assert front_chances([of(same, 100), of(other, 100)], TWO)[0] == pytest.approx(expected, abs=0.015)


def test_exact_costs_stay_exact_and_those_that_vary_do_not() -> None:
    # The cheapest by a hair is on the front whatever its accuracy.
    assert front_chances([of(0.95 + SPREAD, 100), of(0.10 + SPREAD, 99.999)], TWO)[1] == 1
    # Three times 0.1 is more than 0.3 by a last bit: an exact cost is not averaged, so that equals stay equal.
    thirds = [of(np.full(count, 0.9), 0.1) for count in (3, 2)]
    assert front_chances(thirds, TWO).tolist() == [1, 1]
    # FLOPs that differ from seed to seed, as with Learn&Drop, are drawn: neither is surely the cheaper one.
    flops = {"accuracy": "maximize", "train_flops": "minimize"}
    varied = [np.stack([np.full(3, 0.9), cost + 100 * SPREAD], axis=1) for cost in (50.1, 50.0)]
    assert 0.2 < front_chances(varied, flops)[0] < 0.5


def test_the_same_trainings_give_the_same_chances() -> None:
    values = [of(0.91 + SPREAD, 100), of(0.9 + SPREAD, 100), of(0.9 - SPREAD, 90)]
    assert front_chances(values, TWO).tolist() == front_chances(values, TWO).tolist()


def test_differences_are_paired_by_seed(run: Run) -> None:
    found = confirmations(run)
    paired = stats.ttest_rel([0.91, 0.94, 0.925], [0.93, 0.95, 0.94]).confidence_interval()
    assert found[1].difference is not None
    assert found[1].difference.interval == pytest.approx((paired.low, paired.high))
    assert found[0].difference is None
    # Seeds that the baseline lacks say nothing about the difference.
    more = replace(run, confirmed=(*run.confirmed, *trainings(run.records[1], {4: 0.5})))
    again = confirmations(more)[1]
    assert again.difference == found[1].difference
    assert again.accuracy is not None
    assert again.accuracy.num == 4


def test_what_is_confirmed(run: Run) -> None:
    first = run.records[3]
    for rows, known in (
        ([], False),
        (trainings(first, {1: 0.9}), False),
        (trainings(first, {1: 0.9, 2: 0.91}), True),
        (trainings(first, {1: 0.9, 2: 0.91, 3: None}), False),
        (trainings(first, {1: None}), False),
    ):
        found = confirmations(replace(run, confirmed=(*run.confirmed, *rows))).get(3)
        assert (found is not None and found.is_confirmed) is known
        assert found is None or (found.chance is not None) is known
        assert found is None or describe_confirmation(found)
    assert confirmations(replace(run, confirmed=())) == {}


def test_without_a_baseline_there_are_no_differences(run: Run) -> None:
    rest = replace(run, records=run.records[1:], confirmed=run.confirmed[3:])
    found = confirmations(rest)
    assert [item.difference for item in found.values()] == [None, None]
    assert confirmed_line(rest) == "confirmed on the test split: trials 1, 2 (3 new seeds each): all of the front"


def test_a_cost_that_was_not_measured_leaves_no_chance(run: Run) -> None:
    rows = [replace(row, params=None) if row.trial == 1 else row for row in run.confirmed]
    found = confirmations(replace(run, confirmed=tuple(rows)))
    assert [item.chance for item in found.values()] == [None, None, None]
    assert all(item.accuracy is not None for item in found.values())


def test_the_pick_goes_by_confirmed_accuracy_only_where_all_of_the_front_is_confirmed(run: Run) -> None:
    assert select(run, "accuracy") == (2, "the best accuracy on the front; its accuracy as confirmed on the test split")
    knee = select(run)
    assert knee.trial == 2
    assert knee.why.endswith("scaled to [0, 1]); its accuracy as confirmed on the test split")
    partly = replace(run, confirmed=run.confirmed[:-2])
    assert (
        select(partly, "accuracy")
        == select(replace(run, confirmed=()), "accuracy")
        == (0, "the best accuracy on the front")
    )
    assert "confirmed" not in select(partly).why
    diverged = (*run.confirmed[:-1], *trainings(run.records[2], {3: None}))
    assert select(replace(run, confirmed=diverged), "accuracy").trial == 0
    # Without accuracy among the objectives nothing of it decides.
    costs = replace(run, objectives={"params": "minimize", "memory": "minimize"})
    assert "confirmed" not in select(costs, "params").why


def test_the_summary_has_an_entry_a_member_and_nothing_else_changes(run: Run) -> None:
    before = summary(replace(run, confirmed=()), "params")
    content = json.loads(json.dumps(summary(run, "params"), allow_nan=False))
    assert [item["confirmed"] for item in before["front"]] == [None, None, None]
    assert before["baseline"]["confirmed"] is None
    entries = [item.pop("confirmed") for item in content["front"]]
    assert [entry["seeds"] for entry in entries] == [[1, 2, 3]] * 3
    assert set(entries[0]) == {"seeds", "diverged", "accuracy", "difference", "front_probability"}
    assert entries[1]["accuracy"]["mean"] == pytest.approx(0.925)
    low, high = entries[1]["accuracy"]["interval"]
    assert low < 0.925 < high
    assert all(0 <= entry["front_probability"] <= 1 for entry in entries)
    assert content["baseline"].pop("confirmed")["difference"] is None
    for item in (*before["front"], before["baseline"]):
        item.pop("confirmed")
    why = content.pop("selected"), before.pop("selected")
    assert [item["trial"] for item in why] == [2, 2]
    assert content == before


def test_the_words() -> None:
    assert describe_mean(estimate([0.96, 0.97, 0.965])) == "96.50 ± 1.24 %"
    assert describe_mean(estimate([0.9651])) == "96.51 %"
    assert describe_mean(None) == "–"
    assert describe_change(estimate([-0.01, -0.0025])) == "−0.62"
    assert describe_change(estimate([0.001, -0.001])) == "±0.00"


def test_the_terminal_shows_what_is_confirmed_and_what_is_not(run: Run) -> None:
    console = Console(file=io.StringIO(), width=120)
    partly = replace(run, confirmed=run.confirmed[:-2])
    render_front(partly, console)
    text = " ".join(console.file.getvalue().split())
    assert "P(front)" in text
    assert "0 95.00 % 100 94.00 %" in text
    assert "confirmed on the test split: trials 0, 1 (3 new seeds each); not confirmed: 2 (1 training)" in text
    # Where there is no room beside the policies, it has a table of its own.
    narrow = Console(file=io.StringIO(), width=80)
    render_front(partly, narrow)
    lines = [" ".join(line.split()) for line in narrow.file.getvalue().splitlines()]
    assert max(map(len, narrow.file.getvalue().splitlines())) <= 80
    assert "trial on test P(front)" in lines
    assert any("1 92.50 % 1.00" in line for line in lines)
    plain = Console(file=io.StringIO(), width=120)
    render_front(replace(run, confirmed=()), plain)
    assert "P(front)" not in plain.file.getvalue()
    assert "confirmed" not in plain.file.getvalue()


def test_the_table_survives_the_disk_and_damage_is_noticed(run: Run, make_run: Any) -> None:
    folder = make_run(list(run.records), {"objectives": TWO})
    path = folder / "confirmed.parquet"
    write_confirmed(path, reversed(run.confirmed))
    assert tuple(read_confirmed(path)) == run.confirmed == read_run(folder).confirmed
    with pytest.raises(ValueError, match="once with each seed"):
        write_confirmed(path, [*run.confirmed, run.confirmed[0]])
    whole = path.read_bytes()
    for broken in (whole[:-30], whole[: len(whole) // 2], b"", whole.replace(b"PAR1", b"PAR2")):
        path.write_bytes(broken)
        with pytest.raises(RunFolderError, match=r"confirmed\.parquet: is damaged .*move it away"):
            read_run(folder)
    write_confirmed(path, [replace(run.confirmed[0], policy_hash="another")])
    with pytest.raises(RunFolderError, match="its trial 0 has another policy than this run's"):
        read_run(folder)
    path.unlink()
    assert read_run(folder).confirmed == ()


@pytest.mark.parametrize("values", [{}, {"test_accuracy": 0.5, "reason": "diverged"}, {"test_accuracy": 1.5}])
def test_a_row_has_an_accuracy_or_a_reason(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="accuracy"):
        ConfirmedTraining(0, "hash", 1, **values)


def test_the_page_and_the_card_show_it(run: Run, make_run: Any) -> None:
    folder = make_run(list(run.records), {"objectives": TWO})
    plain = read_run(folder)
    assert "Confirmed with new seeds" not in report_html(plain, select(plain))
    assert confirmed_section(plain, 1) == ""
    write_confirmed(folder / "confirmed.parquet", run.confirmed)
    shown = read_run(folder)
    page = report_html(shown, select(shown))
    assert "Confirmed with new seeds" in page
    assert '<td class="number">92.50<small>± 3.73</small></td>' in page
    assert "Confirmed: on the test split 94.83 ± 1.90 % over 3 trainings" in page
    card = confirmed_section(shown, 1)
    assert (
        "- this policy: on the test split 92.50 ± 3.73 % over 3 trainings with new seeds, −1.50 ± 1.24 points" in card
    )
    assert "- the end-to-end baseline: on the test split 94.00" in card
