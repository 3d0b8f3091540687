"""A run of a few trials, really trained, as a search leaves it but for Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from rlsearch import DataSpec, ModelSpec, Policy, Replacement, TrainingSpec, TrialSpec
from rlsearch.results.tables import METRICS, TrialRecord, write_trials
from rlsearch.training.checkpoint import save_weights
from rlsearch.training.data import load_data
from rlsearch.training.trial import Trial

DATA = {"name": "digits", "limit": 200}
TRAINING = TrainingSpec(epochs=2, batch_size=32, lr=0.05)
OBJECTIVES = {"accuracy": "maximize", "params": "minimize"}
SKIP = Policy(replacements=(Replacement("layer3.1", "skip"),))
SCALAR = Policy(replacements=(Replacement("layer1.1", "scalar"),))


def tiny_run(
    folder: Path,
    policies: Sequence[Policy] = (Policy(), SKIP, SCALAR),
    *,
    model: str = "resnet20",
    data: dict[str, Any] | None = None,
    training: TrainingSpec = TRAINING,
    seed: int = 0,
    measured: bool = False,
) -> Path:
    """The folder of a run whose trials have these policies, the baseline first.

    A few epochs rank nothing: unless the accuracies are to be as ``measured``, the first is the best, so that whatever
    saves is on the front.
    """
    data = data or DATA
    images, records = load_data(DataSpec(**data)), []
    for number, policy in enumerate(policies):
        policy = replace(policy, model=ModelSpec(model))
        spec = TrialSpec(ModelSpec(model), DataSpec(**data), training, policy, seed)
        trial = Trial(spec, data=images, device="cpu")
        while not trial.done:
            metrics = trial.run_epoch()
        weights = folder / "checkpoints" / f"trial-{number:05d}"
        weights.mkdir(parents=True)
        save_weights(weights / "model.safetensors", trial.model)
        records.append(
            TrialRecord(
                trial=number,
                state="COMPLETE",
                origin="sampler" if number else "baseline",
                policy=json.dumps(policy.to_dict()),
                policy_hash=policy.hash,
                seed=seed,
                training=json.dumps(asdict(training)),
                fidelity=training.epochs,
                device=metrics.device,
                **{name: getattr(metrics, name) for name in METRICS}
                | ({} if measured else {"accuracy": 0.9 - number / 100}),
            )
        )
    write_trials(folder / "trials.parquet", records)
    space = {"objectives": OBJECTIVES, "data": data, "model": {"name": model}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder
