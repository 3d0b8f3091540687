"""Which units bear replacing: what replacing one of them alone is expected to do to the accuracy.

A reconstruction from the trials of a run, with two sources that are kept apart, since they tell of different moments:

- the *model*: a linear model of the accuracies of all trials that were trained to the end
  (`rlsearch.results.additive_model`), in which every replaced unit adds its effect. That effects add up is assumed, and
  an effect is that of whichever blocks the trials put in the unit's place. What else differed between trials (learning
  rate, Learn&Drop and its settings, …) is accounted for by multiples of its own, numbers above 0 by their logarithm;
- the *probe*: the unit really replaced alone (``search.sensitivities``), against the baseline after as many epochs. It
  is one training; its standard deviation is that of the difference, by the spread of the baseline's seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlsearch.results.additive_model import additive_effects
from rlsearch.results.departures import epochs_of
from rlsearch.results.describe import natural_key, training_of
from rlsearch.results.noise import baseline_trainings
from rlsearch.results.pareto import Floats
from rlsearch.results.selection import policy_of
from rlsearch.results.tables import Run, TrialRecord

LEAST_TRIALS = 3
"""Trials, trained to the end, that must have replaced a unit before the model says anything of it."""


@dataclass(frozen=True)
class Probe:
    """A unit replaced alone for a few epochs.

    Attributes:
        change: accuracy less the baseline's mean after the same epoch, as a share.
        sd: standard deviation of that difference; None where the baseline has one seed, or no two that differ.
        epoch: after which both were measured.
        block: what stood in the unit's place.
    """

    change: float
    sd: float | None
    epoch: int
    block: str


@dataclass(frozen=True)
class UnitEffect:
    """What is known of one unit.

    Attributes:
        unit: its name.
        trials: how many trials that were trained to the end replaced it.
        change: by the model, the expected change of the final accuracy where it alone is replaced, as a share (-0.012);
            None where too few trials tell.
        sd: the standard deviation of that expectation; None with ``change``.
        probe: what its probe found; None without one.
    """

    unit: str
    trials: int
    change: float | None = None
    sd: float | None = None
    probe: Probe | None = None


def unit_effects(run: Run) -> tuple[UnitEffect, ...]:
    """Every unit that any trial of the run replaced, in natural order of the names; see this module's docstring.

    Raises:
        RunFolderError: a table of epochs is damaged.
    """
    replaced = {record.trial: _replaced(record) for record in run.records}
    units = sorted(set().union(*replaced.values()), key=natural_key) if replaced else []
    if not units:
        return ()
    trained = trained_in_full(run)
    times = Counter(unit for record in trained for unit in replaced[record.trial])
    is_changed = np.array([[unit in replaced[record.trial] for unit in units] for record in trained], dtype=bool)
    found = None
    if any(times[unit] >= LEAST_TRIALS for unit in units):
        accuracies = np.array([record.accuracy for record in trained], dtype=np.float64)
        found = additive_effects(is_changed, _settings(trained), accuracies)
    probes = dict(_probes(run))
    effects = []
    for index, unit in enumerate(units):
        change, sd = None, None
        if found is not None and times[unit] >= LEAST_TRIALS:
            change, sd = float(found[0][index]), float(found[1][index])
        effects.append(UnitEffect(unit, times[unit], change, sd, probes.get(unit)))
    return tuple(effects)


def trained_in_full(run: Run) -> list[TrialRecord]:
    """The trials that the model is made of: trained to the last epoch, whether or not they keep the constraints."""
    return [
        record
        for record in run.records
        if record.state in ("COMPLETE", "INFEASIBLE")
        and record.accuracy is not None
        and math.isfinite(record.accuracy)
        and record.fidelity is not None
        and record.fidelity >= training_of(record).get("epochs", record.fidelity)
    ]


def _replaced(record: TrialRecord) -> frozenset[str]:
    return frozenset(item.unit for item in policy_of(record).replacements)


def _probes(run: Run) -> Iterator[tuple[str, Probe]]:
    """Each probe that has a result, with its unit."""
    known = [_by_epoch(run, record) for record in baseline_trainings(run)]
    for record in run.records:
        replacements = policy_of(record).replacements
        if record.origin != "sensitivity" or len(replacements) != 1 or record.fidelity is None:
            continue
        accuracy = _by_epoch(run, record).get(record.fidelity)
        references = [rows[record.fidelity] for rows in known if record.fidelity in rows]
        if accuracy is None or not references:
            continue
        # The probe's own noise, and that of the mean that it is compared with. Seeds that agree by chance, or since
        # none has learned yet, do not make it certain.
        spread = statistics.stdev(references) if len(set(references)) > 1 else None
        sd = None if spread is None else spread * math.sqrt(1 + 1 / len(references))
        change = accuracy - statistics.fmean(references)
        yield replacements[0].unit, Probe(change, sd, record.fidelity, replacements[0].block)


def _by_epoch(run: Run, record: TrialRecord) -> dict[int, float]:
    """The finite accuracies of a trial by epoch."""
    rows = ((row["epoch"], row["accuracy"]) for row in epochs_of(run, record))
    return {epoch: accuracy for epoch, accuracy in rows if accuracy is not None and math.isfinite(accuracy)}


def _settings(records: Sequence[TrialRecord]) -> Floats:
    """What differs between trials beside their replacements, a column each, (n, K)."""
    drops = [policy_of(record).learn_drop for record in records]
    has_drop = np.array([drop is not None for drop in drops])
    columns = [has_drop.astype(np.float64)]
    columns += _columns([training_of(record) for record in records])
    # A setting of Learn&Drop says nothing of a trial without it, which stands in the middle of those that have it.
    for column in _columns([asdict(drop) for drop in drops if drop is not None]):
        whole = np.zeros(len(records))
        whole[has_drop] = column - column.mean()
        columns.append(whole)
    return np.column_stack(columns)


def _columns(settings: Sequence[Mapping[str, Any]]) -> list[Floats]:
    """A column for each number that varies, and one for each further value of what is no number."""
    found: list[Floats] = []
    for name in dict.fromkeys(name for item in settings for name in item):
        values = [item.get(name) for item in settings]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            numbers = np.array(values, dtype=np.float64)
            numbers = np.log(numbers) if (numbers > 0).all() else numbers
            if np.ptp(numbers) > 0:
                found.append((numbers - numbers.mean()) / numbers.std())
            continue
        texts = [json.dumps(value, sort_keys=True) for value in values]
        found += [np.array([float(text == one) for text in texts]) for one in sorted(set(texts))[1:]]
    return found
