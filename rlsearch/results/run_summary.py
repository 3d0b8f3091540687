"""What ``rlsearch pareto --json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlsearch.results.confirmation import Estimate, confirmations
from rlsearch.results.departures import departures_of
from rlsearch.results.noise import baseline_noise
from rlsearch.results.racing import racing_figures
from rlsearch.results.selection import (
    baseline,
    counts,
    front,
    normalised_hypervolume,
    policy_of,
    select,
    values_of,
)
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.results.unit_effects import unit_effects
from rlsearch.results.where import Condition


def summary(run: Run, key: str = "knee", where: Sequence[Condition] = ()) -> dict[str, Any]:
    """The front, the baseline and the pick, in plain types.

    Raises:
        UserError: as `rlsearch.results.select`.
        RunFolderError: as `rlsearch.results.select`, or a table of epochs is damaged.
    """
    selected = select(run, key, where)
    reference = baseline(run)
    return {
        "objectives": dict(run.objectives),
        "baseline": None
        if reference is None
        else {"trial": reference.trial, "values": values_of(run, reference), "packed": reference.packed}
        | {"confirmed": confirmed_entry(run, reference.trial)},
        "front": [
            {
                "trial": record.trial,
                "policy": policy_of(record).to_dict(),
                "values": values_of(run, record),
                "learn_drop": _learn_drop(run, record),
                "packed": record.packed,
                "confirmed": confirmed_entry(run, record.trial),
            }
            for record in front(run, where)
        ],
        "counts": counts(run),
        "hypervolume": normalised_hypervolume(run),
        "selected": {"trial": selected.trial, "why": selected.why},
        "racing": _racing(run),
        "noise": _noise(run),
        "unit_effects": [asdict(effect) for effect in unit_effects(run)],
    }


def _racing(run: Run) -> dict[str, Any] | None:
    """The rungs of a run whose trials were raced."""
    found = racing_figures(run)
    return None if found is None else {"rungs": [asdict(rung) for rung in found]}


def _noise(run: Run) -> dict[str, Any] | None:
    """The baseline's accuracies by seed; None where it was trained with one."""
    found = baseline_noise(run)
    if found is None:
        return None
    return {"seeds": list(found.seeds), "accuracies": list(found.accuracies), "sd": found.sd}


def confirmed_entry(run: Run, trial: int) -> dict[str, Any] | None:
    """What `rlsearch confirm` found about a trial; None where it was not trained again."""
    found = confirmations(run).get(trial)
    if found is None:
        return None
    return {
        "seeds": list(found.seeds),
        "diverged": found.num_diverged,
        "accuracy": _estimate(found.accuracy),
        "difference": _estimate(found.difference),
        "front_probability": found.chance,
    }


def _estimate(found: Estimate | None) -> dict[str, Any] | None:
    """A mean in plain types, with the 95 % interval where there is one."""
    if found is None:
        return None
    ends = found.interval
    return {"mean": found.mean, "sd": found.sd, "interval": None if ends is None else list(ends), "n": found.num}


def _learn_drop(run: Run, record: TrialRecord) -> dict[str, Any] | None:
    """What Learn&Drop did in a trial; None where its policy has none. The names and cuts need the trial's epochs."""
    if policy_of(record).learn_drop is None:
        return None
    found = departures_of(run, record)
    return {
        "forward_share": record.forward_share,
        "mean_learnable_params": record.mean_learnable_params,
        "step_memory": record.step_memory,
        "dropped_units": record.dropped_units,
        "layers": None if found is None else list(found.layers),
        "cuts": None if found is None else [asdict(cut) | {"left": list(cut.left)} for cut in found.cuts],
    }
