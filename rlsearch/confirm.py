"""The front of a run trained again, alone on the device and with new seeds, and measured on the test split.

A search trains each policy once and picks by the validation split, so that what it calls best is partly luck. Here each
policy of the front, and the baseline beside them, is trained several times more with seeds that no trial had, the same
ones for all; what these trainings say is in `rlsearch.results.confirmation`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from rlsearch.errors import DivergedError, OutOfMemoryError, RlsearchError, UserError
from rlsearch.export import measure_test, named_model, settings_of
from rlsearch.results.confirmation import LEAST_SEEDS
from rlsearch.results.confirmed import ConfirmedTraining, confirmed_path, write_confirmed
from rlsearch.results.noise import REPEAT
from rlsearch.results.selection import baseline, front, policy_of, record_of, select
from rlsearch.results.tables import METRICS, Run, TrialRecord, read_run
from rlsearch.run_lock import run_lock
from rlsearch.training.data import ImageSplit, load_data, load_test
from rlsearch.training.image_batches import ImageBatches
from rlsearch.training.image_stream import StreamSplit
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.stream_data import open_images
from rlsearch.training.trial import EVALUATION_BATCH, Trial
from rlsearch.training.trial_spec import TrialSpec

_SEEDS = 2**32
_GO_ON = "what has finished is kept, and the same command goes on"


@dataclass(frozen=True)
class ConfirmPlan:
    """What a confirmation trains.

    Attributes:
        records: the trials, the baseline first.
        seeds: the new seeds, the same for all.
        remaining: the trainings that are left, in their order: all trials with the first seed, then with the second.
    """

    records: tuple[TrialRecord, ...]
    seeds: tuple[int, ...]
    remaining: tuple[tuple[TrialRecord, int], ...]

    @property
    def num_trainings(self) -> int:
        """All of them, those that are done included."""
        return len(self.records) * len(self.seeds)

    @property
    def seconds(self) -> float | None:
        """How long those that are left take if each takes as long as it did in the search; None if that is unknown."""
        times = [record.train_seconds for record, _ in self.remaining if record.train_seconds is not None]
        return sum(times) if len(times) == len(self.remaining) else None


class ConfirmWatch:
    """Is told how a confirmation goes; this one does nothing with it."""

    def planned(self, plan: ConfirmPlan) -> None:
        """Everything was checked; the trainings begin."""

    def training_started(self, record: TrialRecord, seed: int) -> None:
        """A trial's policy is trained with a new seed."""

    def epoch_ended(self, metrics: EpochMetrics) -> None:
        """The training goes on."""

    def training_ended(self, training: ConfirmedTraining) -> None:
        """The training has ended and stands in the table."""


def plan_confirmation(run: Run, seeds: int = 3, trials: Sequence[int] = (), key: str | None = None) -> ConfirmPlan:
    """What is to be trained, and what of it is left.

    Args:
        run: the run.
        seeds: how many trainings each policy is to have (>= 2).
        trials: only these, whether on the front or not, and the baseline.
        key: only the pick by it, as `rlsearch.results.select` takes it, and ``trials`` and the baseline.

    Raises:
        UserError: too few seeds, an unknown key, or a trial that is not there, not complete, or a repeat of the
            baseline.
        RunFolderError: no trial of the run is complete.
    """
    if seeds < LEAST_SEEDS:
        raise UserError(f"--seeds: must be at least {LEAST_SEEDS}, which an interval needs; got {seeds}")
    pick = select(run, key or "knee").trial
    wanted = {*trials, *([] if key is None else [pick])} or {record.trial for record in front(run)}
    records = [record_of(run, trial) for trial in sorted(wanted)]
    reference = baseline(run)
    if reference is not None:
        records = [reference, *(record for record in records if record.trial != reference.trial)]
    for record in records:
        if record.state != "COMPLETE" and record is not reference:
            reason = f" ({record.reason})" if record.reason else ""
            raise UserError(f"trial {record.trial} is {record.state}{reason}; only COMPLETE trials can be confirmed")
        if record.origin == REPEAT:
            raise UserError(
                f"trial {record.trial} is the baseline again, with another seed; the baseline is always confirmed"
            )
    chosen = new_seeds(run, seeds)
    done = {(row.trial, row.seed) for row in run.confirmed}
    remaining = [(record, seed) for seed in chosen for record in records if (record.trial, seed) not in done]
    return ConfirmPlan(tuple(records), chosen, tuple(remaining))


def new_seeds(run: Run, count: int) -> tuple[int, ...]:
    """Seeds that no trial of the run had: the whole numbers after the baseline's seed, without those in use.

    Args:
        run: a run with at least one trial; without a baseline its first trial's seed takes the place.
        count: how many; fewer are the first of more.
    """
    used = {record.seed for record in run.records}
    first = (baseline(run) or run.records[0]).seed
    free = (seed % _SEEDS for seed in itertools.count(first + 1) if seed % _SEEDS not in used)
    return tuple(itertools.islice(free, count))


def confirm_run(
    folder: str | Path,
    *,
    seeds: int = 3,
    trials: Sequence[int] = (),
    key: str | None = None,
    model: str | None = None,
    watch: ConfirmWatch | None = None,
) -> Run:
    """Trains the front of a run and its baseline again, one after the other, and keeps each training once it is done.

    A training whose loss diverges is kept as such. Trainings that an earlier call has finished are not repeated, and
    one that was interrupted starts again.

    Args:
        folder: of the run; no search may be running in it.
        seeds: as in `plan_confirmation`, and so are ``trials`` and ``key``.
        trials: only these and the baseline.
        key: only the pick and the baseline.
        model: the name of the run's model, which a ``package.module:factory`` needs: code runs only when it is named.
        watch: is told how it goes.

    Returns:
        The run with all trainings that were confirmed, ready for `rlsearch.results.confirmation.confirmations`.

    Raises:
        UserError: the run, the arguments or the data are wrong, or there is no test split; before anything trains.
        OutOfMemoryError: the device has too little memory now.
        RlsearchError: the table cannot be written.
    """
    folder, watch = Path(folder), watch or ConfirmWatch()
    plan_confirmation(read_run(folder), seeds, trials, key)  # a mistake is told before the lock is made
    with run_lock(folder):
        run = read_run(folder)
        plan = plan_confirmation(run, seeds, trials, key)
        specs = [_spec(run, record, seed, model) for record, seed in plan.remaining]
        if not specs:
            watch.planned(plan)
            return run
        images, test = _load(specs[0])
        watch.planned(plan)
        for (record, _), spec in zip(plan.remaining, specs, strict=True):
            watch.training_started(record, spec.seed)
            training = _trained(record, spec, images, test, watch)
            run = replace(run, confirmed=(*run.confirmed, training))
            _keep(run)
            watch.training_ended(training)
    return run


def _spec(run: Run, record: TrialRecord, seed: int, model: str | None) -> TrialSpec:
    """What the trial was trained with, but for the seed."""
    policy = policy_of(record)
    data, training = settings_of(run, record)
    return TrialSpec(named_model(policy, model, f"the policy of trial {record.trial}"), data, training, policy, seed)


def _load(spec: TrialSpec) -> tuple[ImageBatches, ImageSplit | StreamSplit]:
    """The images, on the device where they fit, and the test split, which must be there and go with them."""
    test = load_test(spec.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = open_images(load_data(spec.data), device)
    images.split_batches(test, EVALUATION_BATCH)  # raises where their shapes differ, before anything trains
    return images, test


def _trained(
    record: TrialRecord, spec: TrialSpec, images: ImageBatches, test: ImageSplit | StreamSplit, watch: ConfirmWatch
) -> ConfirmedTraining:
    """One training at full length, and its accuracy on the test split."""
    try:
        trial = Trial(spec, data=images, device=str(images.device))
        while not trial.done:
            metrics = trial.run_epoch()
            watch.epoch_ended(metrics)
        tested = measure_test(trial.model, images, test, spec.training)
    except DivergedError as error:
        reason = f"{error.reason}: {error}"
        return ConfirmedTraining(record.trial, record.policy_hash, spec.seed, reason=reason, ended=datetime.now(UTC))
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"trial {record.trial} with seed {spec.seed}: {error}; {_GO_ON}") from error
    return ConfirmedTraining(
        trial=record.trial,
        policy_hash=record.policy_hash,
        seed=spec.seed,
        fidelity=metrics.epoch,
        test_accuracy=tested.accuracy,
        **{name: getattr(metrics, name) for name in METRICS},
        device=metrics.device,
        ended=datetime.now(UTC),
    )


def _keep(run: Run) -> None:
    """Writes the table."""
    path = confirmed_path(run.folder)
    try:
        write_confirmed(path, run.confirmed)
    except OSError as error:
        raise RlsearchError(f"{path}: cannot be written ({error.strerror or error}); {_GO_ON}") from None
