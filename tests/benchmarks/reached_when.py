"""What two searches of `end_to_end.py` have reached, and when: figures, a table for people, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from replay import Judge, first_reaching

from rlsearch import Policy, TrainingSpec, hypervolume

OURS, STOCK = "ours", "stock"
NAMES = {OURS: "rlsearch", STOCK: "plain script"}
COLORS = {OURS: "#1b6ca8", STOCK: "#c8553d"}
SHARES = (0.80, 0.90, 0.95, 1.00)
KINDS = ("judged", "measured")

Row: TypeAlias = dict[str, Any]
"""A trial: ``seconds`` from its search's start to its end, policy, lr, objectives, ``train_seconds``."""


def compare_trainings(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Prints whether both sides train alike.

    Args:
        found: by policy and side, the accuracies of some seeds.

    Returns:
        the mean accuracies.
    """
    figures: dict[str, Any] = {}
    for name, accuracies in found.items():
        means = {side: statistics.mean(values) for side, values in accuracies.items()}
        count = len(accuracies[OURS])
        error = (sum(statistics.variance(values) for values in accuracies.values()) / count) ** 0.5
        apart = abs(means[OURS] - means[STOCK]) / error if error else 0.0
        told = ", ".join(f"{NAMES[side]} {100 * mean:.2f} %" for side, mean in means.items())
        verdict = ": NOT THE SAME TRAINING" if apart > 3 else ""
        print(f"accuracy, {name}, {count} seeds: {told}, {apart:.1f} standard errors apart{verdict}")
        figures[name] = {**means, "standard_errors_apart": apart}
    return figures


def compare_searches(sides: dict[str, list[Row]], judge: Judge, training: TrainingSpec) -> dict[str, Any]:
    """Prints one pair of searches.

    Args:
        sides: the rows of each, in the order of their ends.
        judge: gives both their hypervolumes.
        training: of the space.

    Returns:
        by side what it was; by kind of accuracy (``judged``, ``measured``) who reached what share of the plain script's
        last hypervolume after how many trials and seconds, None for never, and the ratio of seconds to all of it; and
        the ``curves``.
    """
    traced = {side: traces(rows, judge, training) for side, rows in sides.items()}
    figures: dict[str, Any] = {side: _described(sides[side], traced[side]) for side in sides}
    print(f"{'':<40}" + "".join(f"{NAMES[side]:>18}" for side in sides))
    for name in figures[OURS]:
        print(f"{name.replace('_', ' '):<40}" + "".join(f"{figures[side][name]:>18.6g}" for side in sides))
    for kind in KINDS:
        level = traced[STOCK][kind][-1]
        reached = {
            f"{share:.0%}": {side: _reached(traced[side][kind], sides[side], share * level) for side in sides}
            for share in SHARES
        }
        for share, found in reached.items():
            told = "".join(f"{_told(found[side]):>18}" for side in sides)
            print(f"{f'{share} of {level:.4f}, {kind} accuracies':<40}{told}")
        ours, stock = (reached["100%"][side] for side in (OURS, STOCK))
        assert stock is not None
        ratio = stock[1] / ours[1] if ours else None
        print(f"{f'ratio of seconds, {kind} accuracies':<40}{'never' if ratio is None else f'{ratio:.2f}':>18}")
        figures[kind] = {"level": level, "reached": reached, "ratio": ratio}
    figures["curves"] = {side: ([r["seconds"] for r in sides[side]], traced[side]["judged"]) for side in sides}
    return figures


def traces(rows: Sequence[Row], judge: Judge, training: TrainingSpec) -> dict[str, list[float]]:
    """The hypervolume after each row: by accuracies without noise, and by measured ones; costs are exact in both."""
    points: dict[str, list[list[float]]] = {kind: [[1.0] * 4] for kind in KINDS}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row in rows:
        losses = judge.losses(Policy.from_dict(row["policy"]), replace(training, lr=row["lr"]))
        points["judged"].append(losses)
        points["measured"].append([1 - row["accuracy"], *losses[1:]])
        for kind, trace in found.items():
            trace.append(hypervolume(points[kind], np.ones(4)))
    return found


def draw(pairs: Sequence[dict[str, Any]], path: Path) -> None:
    """Hypervolume over seconds, a curve a search, and the level that both were to reach."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for pair in pairs:
        is_first = pair is pairs[0]
        judged = pair["judged"]
        label = "the plain script's last hypervolume" if is_first else None
        axes.axhline(judged["level"], color="#555555", linestyle="--", linewidth=1, label=label)
        for side, color in COLORS.items():
            seconds, values = pair["curves"][side]
            label = f"{NAMES[side]}, {len(values)} trials" if is_first else None
            axes.step([seconds[0], *seconds], [0, *values], where="post", color=color, label=label, linewidth=1.8)
            reached = judged["reached"]["100%"][side]
            if reached:
                axes.plot(reached[1], judged["level"], "o", color=color)
                place = {"xytext": (-6, 6), "textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{reached[1]:.0f} s", (reached[1], judged["level"]), color=color, **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    seconds = [second for pair in pairs for times, _ in pair["curves"].values() for second in times]
    is_short = max(seconds) < 10 * min(seconds)
    axes.xaxis.set_minor_formatter(ScalarFormatter() if is_short else NullFormatter())
    axes.set_xlabel("wall-clock seconds since the start of the search's process")
    axes.set_ylabel("hypervolume of the front")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _described(rows: Sequence[Row], traced: dict[str, list[float]]) -> dict[str, float]:
    """One search in numbers."""
    return {
        "trials": len(rows),
        "seconds": rows[-1]["seconds"],
        "seconds_to_first_result": rows[0]["seconds"],
        "seconds_per_trial": rows[-1]["seconds"] / len(rows),
        "seconds_per_trial_after_the_first": (rows[-1]["seconds"] - rows[0]["seconds"]) / max(1, len(rows) - 1),
        "seconds_of_a_training_median": statistics.median(row["train_seconds"] for row in rows),
        "hypervolume": traced["judged"][-1],
        "hypervolume_by_measured_accuracies": traced["measured"][-1],
    }


def _reached(trace: Sequence[float], rows: Sequence[Row], level: float) -> tuple[int, float] | None:
    """After how many trials and seconds a hypervolume was reached; None where it never was."""
    trials = first_reaching(trace, level)
    return None if trials > len(rows) else (int(trials), rows[int(trials) - 1]["seconds"])


def _told(reached: tuple[int, float] | None) -> str:
    return "never" if reached is None else f"{reached[0]} in {reached[1]:.0f} s"
