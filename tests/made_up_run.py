"""A run's folder with made-up numbers, as a search would leave it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from rlsearch.policy import LearnDrop, ModelSpec, Policy, Replacement
from rlsearch.results.tables import TrialRecord, epochs_path, write_epochs, write_trials

OBJECTIVES = {"accuracy": "maximize", "params": "minimize", "memory": "minimize", "train_flops": "minimize"}
SPACE = {
    "model": {"name": "resnet32"},
    "data": {"name": "digits"},
    "training": {"epochs": 3, "batch_size": 64, "optimizer": "sgd", "lr": 0.1},
    "objectives": OBJECTIVES,
    "constraints": {"params": "<= 1.0x"},
    "space": {
        "replacement": {"units": "layer*", "blocks": ["skip", "scalar", "channel"], "max_fraction": 0.5},
        "learn_drop": {"threshold": {"low": 0.1, "high": 0.9, "log": True}, "patience": {"low": 1, "high": 3}},
    },
    "search": {"trials": 24, "seed": 0},
    "resources": {"cpu": 1, "gpu": "auto"},
}
MODEL = ModelSpec("resnet32")
TRAINING = {"epochs": 3, "batch_size": 64, "optimizer": "sgd", "lr": 0.1}
BASELINE = {"accuracy": 0.9741, "params": 466_906, "memory": 61_400_000, "train_flops": 1.113e12}
SAVED_PARAMS = {"layer1": 4_672, "layer2": 18_560, "layer3": 73_984}
LAYERS = ("stem", *(f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(5)), "head")
STARTED = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


def record(trial: int, policy: Policy | None = None, **values: Any) -> TrialRecord:
    """A record with every column; ``values`` replaces what is given."""
    policy = replace(policy or Policy(), model=MODEL)
    started = STARTED + timedelta(seconds=5 * trial)
    defaults = BASELINE | {
        "state": "COMPLETE",
        "policy": json.dumps(policy.to_dict()),
        "policy_hash": policy.hash,
        "seed": 0,
        "origin": "baseline" if trial == 0 else "sampler",
        "training": json.dumps(TRAINING),
        "fidelity": 3,
        "params_total": 466_906,
        "memory_predicted": 61_400_000,
        "forward_flops": 0.371e12,
        "forward_share": 1.0,
        "mean_learnable_params": 466_906.0,
        "train_seconds": 4.25,
        "samples_per_second": 1_014.1,
        "dropped_units": 0,
        "step_memory": 61_400_000,
        "device": "cpu",
        "started": started,
        "ended": started + timedelta(seconds=4.9),
    }
    return TrialRecord(**{"trial": trial} | defaults | values)


def failed(trial: int, state: str, reason: str, policy: Policy | None = None) -> TrialRecord:
    """A record without results."""
    nothing = dict.fromkeys(("memory", "train_flops", "forward_flops", "train_seconds", "samples_per_second"))
    nothing |= dict.fromkeys(("forward_share", "mean_learnable_params", "step_memory"))
    return record(trial, policy, state=state, reason=reason, accuracy=None, fidelity=1, **nothing)


def write_run(folder: Path, records: list[TrialRecord], space: Mapping[str, Any] = SPACE) -> Path:
    """The folder of a run that ended with ``records``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(dict(space), sort_keys=False), encoding="utf-8")
    write_trials(folder / "trials.parquet", records, space)
    for item in records:
        if item.accuracy is not None:
            write_epochs(epochs_path(folder, item.trial), _epochs(item))
    return folder


def made_up_records(count: int = 24, seed: int = 3) -> list[TrialRecord]:
    """A search of ResNet-32: the baseline, two controls, sampled policies, and three trials that did not complete."""
    source = random.Random(seed)
    records = [record(0)]
    skipped = Policy(replacements=tuple(Replacement(unit, "skip") for unit in ("layer1.2", "layer2.2", "layer3.2")))
    records.append(_priced(1, skipped, source, origin="skip control"))
    records.append(_priced(2, Policy(learn_drop=LearnDrop()), source, origin="freeze control"))
    for trial in range(3, count):
        units = source.sample(
            [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (1, 3)], source.randint(1, 4)
        )
        replaced = tuple(Replacement(unit, source.choice(["skip", "scalar", "channel"])) for unit in units)
        drop = LearnDrop(threshold=10 ** source.uniform(-1, 0), patience=source.randint(1, 3))
        policy = Policy(replacements=replaced, learn_drop=drop if source.random() < 0.6 else None)
        records.append(_priced(trial, policy, source))
    for trial, state, reason in (
        (7, "FAIL", "diverged"),
        (11, "INFEASIBLE", "out_of_memory"),
        (15, "PRUNED", "raced out"),
    ):
        records[trial] = failed(trial, state, reason, Policy.from_dict(json.loads(records[trial].policy)))
    return records


def _priced(trial: int, policy: Policy, source: random.Random, origin: str = "sampler") -> TrialRecord:
    """A trial whose costs follow from its policy, and whose accuracy is a guess around what such a policy loses."""
    saved = sum(SAVED_PARAMS[item.unit.split(".")[0]] for item in policy.replacements)
    skipped = sum(item.block == "skip" for item in policy.replacements)
    dropped = source.randint(2, 9) if policy.learn_drop else 0
    loss = 0.004 * len(policy.replacements) + 0.0025 * dropped + source.gauss(0, 0.004)
    return record(
        trial,
        policy,
        origin=origin,
        accuracy=round(BASELINE["accuracy"] - loss, 4),
        params=BASELINE["params"] - saved,
        params_total=BASELINE["params"] - saved * (skipped > 0),
        memory=int(BASELINE["memory"] * (1 - 0.05 * skipped - 0.004 * len(policy.replacements))),
        train_flops=BASELINE["train_flops"] * (1 - 0.064 * skipped) * (1 - 0.025 * dropped),
        forward_flops=BASELINE["train_flops"] / 3 * (1 - 0.064 * skipped),
        train_seconds=round(4.25 * (1 - 0.06 * skipped) * (1 - 0.02 * dropped), 3),
        dropped_units=dropped,
        forward_share=(1 - 0.064 * skipped) * (1 - 0.03 * dropped),
        mean_learnable_params=(BASELINE["params"] - saved) * (1 - 0.02 * dropped),
        step_memory=int(BASELINE["memory"] * (1 - 0.05 * dropped)),
    )


def _epochs(item: TrialRecord) -> list[dict[str, Any]]:
    """Rows as ``EpochMetrics.to_dict()`` gives them, ending at the record's values; half of the units that leave do so
    after the first epoch, the stem with them, the others after the second."""
    rows = []
    has_learn_drop = json.loads(item.policy)["learn_drop"] is not None
    cut = 0
    for epoch in range(1, 4):
        share = epoch / 3
        dropped = item.dropped_units // 2 if epoch == 1 else item.dropped_units
        before, cut = cut, dropped + 1 if dropped else 0
        rows.append(
            {
                "epoch": epoch,
                "epochs": 3,
                "accuracy": item.accuracy * (1 - 0.3 * (1 - share) ** 2),
                "validation_loss": 1.2 * (1 - share) + 0.1,
                "train_loss": 1.3 * (1 - share) + 0.05,
                "lr": 0.1 * (1 - share),
                "params": item.params,
                "params_total": item.params_total,
                "learnable_params": item.params,
                "memory": item.memory,
                "memory_predicted": item.memory_predicted,
                "train_flops": item.train_flops * share,
                "forward_flops": item.forward_flops * share,
                "train_seconds": item.train_seconds * share,
                "samples_per_second": item.samples_per_second,
                "forward_share": item.forward_share,
                "mean_learnable_params": item.mean_learnable_params,
                "step_memory": item.step_memory if epoch == 3 else item.memory,
                "dropped_units": dropped,
                "learning": list(LAYERS[cut:]) if has_learn_drop else [],
                "left": list(LAYERS[before:cut]) if has_learn_drop else [],
                "device": "cpu",
            }
        )
    return rows
