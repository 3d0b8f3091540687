"""Which trials of a run are on the front, and which of them is the pick.

Only a trial that is COMPLETE and has a finite value in every objective is a candidate. The baseline is one like any
other: nothing keeps it off the front, and nothing keeps it from being the pick. Its repeats are none: they are the same
policy with another seed, and tell the noise (`rlsearch.results.noise`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rlsearch.errors import RunFolderError, UserError, suggestion
from rlsearch.policy import Policy
from rlsearch.results import pareto
from rlsearch.results.confirmation import confirmations
from rlsearch.results.noise import REPEAT
from rlsearch.results.tables import STATES, Run, TrialRecord
from rlsearch.results.where import Condition

REFERENCE_FACTOR = 1.1
"""The hypervolume's reference for a minimised objective, in multiples of the baseline's value."""


class Selection(NamedTuple):
    """The pick: the number of a trial on the front, and why it is that one."""

    trial: int
    why: str


def candidates(run: Run, where: Sequence[Condition] = ()) -> list[TrialRecord]:
    """The trials that may be on the front: COMPLETE, finite in every objective, and meeting ``where``; by number."""
    reference = baseline(run)
    return [
        record
        for record in run.records
        if record.state == "COMPLETE"
        and record.origin != REPEAT
        and _is_measured(run, record)
        and all(condition.holds(record, reference) for condition in where)
    ]


def baseline(run: Run) -> TrialRecord | None:
    """The untouched end-to-end model, if it was trained to the end.

    A constraint that the baseline itself misses (``params: "<= 0.8x"``) makes it INFEASIBLE and keeps it off the
    front, but what it measured is still what all others are compared with.
    """
    for record in run.records:
        if record.origin == "baseline" and record.state in ("COMPLETE", "INFEASIBLE") and _is_measured(run, record):
            return record
    return None


def front(run: Run, where: Sequence[Condition] = ()) -> list[TrialRecord]:
    """The candidates that no other candidate dominates, the best in the first objective first.

    With ``where`` it is the front among the trials that meet it.
    """
    members = candidates(run, where)
    losses = losses_of(run, members)
    on_front = np.flatnonzero(pareto.pareto_front(losses))
    return [members[index] for index in sorted(on_front, key=lambda index: (losses[index, 0], members[index].trial))]


def losses_of(run: Run, records: Sequence[TrialRecord]) -> pareto.Floats:
    """The loss matrix (records, objectives) of ``records``, whose objectives must be finite."""
    values = [[record.metric(name) for name in run.objectives] for record in records]
    return pareto.to_losses(np.array(values, dtype=np.float64), run.directions)


def normalised_hypervolume(run: Run, without: Container[int] = ()) -> float | None:
    """The share, in [0, 1], of the objective space that the candidates dominate; None while there is no baseline.

    Trials ``without`` are left out of what dominates, never of the scale: values with and without them compare.

    Each objective becomes a loss with the reference 1, so that the number compares runs with one baseline only:

    - a minimised one is divided by 1.1 times the baseline's value: what costs more than that adds nothing;
    - ``accuracy`` is 1 - accuracy;
    - another maximised one (``samples_per_second``) is 1 / (1 + value / baseline): 1 at nothing, ½ at the baseline.
    """
    reference = baseline(run)
    if reference is None:
        return None
    columns = []
    members = [record for record in candidates(run) if record.trial not in without]
    for name, direction in run.objectives.items():
        values = np.array([record.metric(name) for record in members], dtype=np.float64)
        # A baseline of 0 (no cost at all) leaves the metric's own unit as the scale.
        scale = abs(float(reference.metric(name) or 0)) or 1.0
        if direction == "minimize":
            losses = values / (REFERENCE_FACTOR * scale)
        elif name == "accuracy":
            losses = 1 - values
        else:
            losses = 1 / (1 + np.maximum(values, 0) / scale)
        columns.append(np.clip(losses, 0, 1))
    return pareto.hypervolume(np.stack(columns, axis=1), np.ones(len(columns)))


def select(run: Run, key: str = "knee", where: Sequence[Condition] = ()) -> Selection:
    """The pick: a trial on the front.

    Where accuracy is an objective and every trial of the front is confirmed (`rlsearch confirm`), the accuracies that
    decide are the confirmed ones: means over several trainings, on the test split. The front stays the search's own.

    Args:
        run: the run.
        key: ``knee`` (`rlsearch.results.pareto.knee`), or an objective whose best trial is wanted; of several that are
            equal in it, the one nearest to the ideal point, and then the lowest number.
        where: conditions that the pick must meet.

    Raises:
        UserError: an unknown key, or no trial meets ``where``.
        RunFolderError: no trial of the run is complete.
    """
    if key != "knee" and key not in run.objectives:
        raise UserError(f"--select: unknown objective {key!r}{suggestion(key, ['knee', *run.objectives])}")
    members = sorted(_front_or_error(run, where), key=lambda record: record.trial)
    if len(members) == 1:
        return Selection(members[0].trial, "the only trial on the front")
    confirmed = _as_confirmed(run, members)
    losses = losses_of(run, members if confirmed is None else confirmed)
    by_what = "" if confirmed is None else "; its accuracy as confirmed on the test split"
    if key == "knee":
        index = pareto.knee(losses)
        distance = pareto.distances_to_ideal(losses)[index]
        return Selection(
            members[index].trial,
            f"the knee: of the {len(members)} trials on the front the nearest to the ideal point "
            f"(distance {distance:.2f}, with every objective scaled to [0, 1]){by_what}",
        )
    column = losses[:, list(run.objectives).index(key)]
    best = np.flatnonzero(column == column.min())
    index = best[np.argmin(pareto.distances_to_ideal(losses)[best])]
    equals = "" if len(best) == 1 else f"; of {len(best)} equal ones the nearest to the ideal point"
    return Selection(members[index].trial, f"the best {key} on the front{equals}{by_what}")


def counts(run: Run) -> dict[str, int]:
    """How many trials ended in each state, in the order of `STATES`; a state without a trial is there with 0."""
    found = Counter(record.state for record in run.records)
    return {state: found[state] for state in STATES}


def values_of(run: Run, record: TrialRecord) -> dict[str, float | int | None]:
    """The objectives of a trial by name."""
    return {name: record.metric(name) for name in run.objectives}


def record_of(run: Run, trial: int) -> TrialRecord:
    """The record of a trial by its number.

    Raises:
        UserError: the run has no such trial.
    """
    for record in run.records:
        if record.trial == trial:
            return record
    known = f"it has {len(run.records)} ended trials" if run.records else "no trial of it has ended"
    raise UserError(f"--trial: {run.folder} has no trial {trial}; {known}")


def policy_of(record: TrialRecord) -> Policy:
    """The policy of a trial.

    Raises:
        RunFolderError: the table holds none.
    """
    try:
        return _parsed(record.policy)
    except ValueError as error:
        raise RunFolderError(f"trial {record.trial}: its policy cannot be read: {error}") from None


@lru_cache(maxsize=10_000)
def _parsed(text: str) -> Policy:
    """The policy of a text; a report asks for each several times, and checking one takes about a millisecond."""
    return Policy.from_dict(json.loads(text))


def _is_measured(run: Run, record: TrialRecord) -> bool:
    """Whether every objective has a finite value."""
    values = [record.metric(name) for name in run.objectives]
    return all(value is not None and math.isfinite(value) for value in values)


def _front_or_error(run: Run, where: Sequence[Condition]) -> list[TrialRecord]:
    members = front(run, where)
    if members:
        return members
    complete = candidates(run)
    if complete:
        asked = " and ".join(map(str, where))
        ranges = ", ".join(_range(complete, name) for name in dict.fromkeys(condition.metric for condition in where))
        raise UserError(f"--where: none of the {len(complete)} complete trials meets {asked}; they have {ranges}")
    ended = ", ".join(f"{number} {state}" for state, number in counts(run).items() if number) or "none has ended"
    reasons = Counter(record.reason for record in run.records if record.reason)
    why = (
        f" (reasons: {', '.join(f'{reason} × {number}' for reason, number in reasons.most_common(3))})"
        if reasons
        else ""
    )
    raise RunFolderError(f"{run.folder}: no trial is complete, so there is no front: {ended}{why}")


def _as_confirmed(run: Run, members: Sequence[TrialRecord]) -> list[TrialRecord] | None:
    """The records with their confirmed accuracies; None where accuracy decides nothing, or one is not confirmed."""
    known = confirmations(run) if "accuracy" in run.objectives and run.confirmed else {}
    accuracies = [
        item.accuracy.mean
        for record in members
        if (item := known.get(record.trial)) is not None and item.is_confirmed and item.accuracy is not None
    ]
    if len(accuracies) < len(members):
        return None
    return [replace(record, accuracy=mean) for record, mean in zip(members, accuracies, strict=True)]


def _range(records: Sequence[TrialRecord], name: str) -> str:
    values = [value for record in records if (value := record.metric(name)) is not None]
    return f"{name} from {min(values):g} to {max(values):g}" if values else f"no {name}"
