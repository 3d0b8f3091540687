"""A trial of a run as files that stand alone: policy.json, model.safetensors and a card; rebuilt and re-measured.

An export is called done only after the model was built again from the written files alone and got the same accuracy as
the trial had, to the last validation image. The test split is touched here for the first time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlsearch.config import from_mapping
from rlsearch.errors import ConfigError, Problem, RlsearchError, RunFolderError, UserError
from rlsearch.files import check_inside, flush_folder, write_atomic
from rlsearch.policy import ModelSpec, Policy
from rlsearch.replacement import apply_policy, materialize
from rlsearch.results.confirmed_words import confirmed_section
from rlsearch.results.describe import describe_difference, describe_policy, describe_value
from rlsearch.results.selection import baseline, policy_of, record_of
from rlsearch.results.tables import Run, TrialRecord
from rlsearch.training.checkpoint import load_weights, save_weights
from rlsearch.training.data import DataSpec, ImageData, ImageSplit, load_data, load_test
from rlsearch.training.image_batches import ImageBatches
from rlsearch.training.image_stream import StreamSplit
from rlsearch.training.loop import Pass, TrainingSpec, evaluate, resolve_precision
from rlsearch.training.model_factory import check_named
from rlsearch.training.models import build_spec
from rlsearch.training.stream_data import open_images
from rlsearch.training.trial import EVALUATION_BATCH

POLICY_FILE = "policy.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        folder: where it lies.
        trial: the trial's number.
        recorded_accuracy: on the validation split, as the search recorded it.
        validation_accuracy: the same, of the model rebuilt from the files.
        test_accuracy: of the rebuilt model on the test split.
        note: empty, or why the two validation accuracies may differ (another kind of device).
    """

    folder: Path
    trial: int
    recorded_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    note: str = ""


def load_exported(folder: str | Path, model: str | None = None) -> nn.Module:
    """The model of an export, built from its files alone, in eval mode; its modules are plain PyTorch.

    Args:
        folder: of the export.
        model: the name of its model, which a ``package.module:factory`` needs (see `named_model`).

    Raises:
        UserError: the folder is no export, its files are damaged, or its model is code that was not named.
    """
    folder = Path(folder)
    policy = Policy.load(folder / POLICY_FILE)
    spec = named_model(policy, model, str(folder / POLICY_FILE))
    shape = policy.provenance.get("input_shape")
    plain = materialize(_replaced(spec, policy, shape))
    load_weights(folder / WEIGHTS_FILE, plain)
    return plain.eval()


def export_trial(run: Run, trial: int, out: Path, *, model: str | None = None) -> ExportReport:
    """Writes the export of one trial, rebuilds it from the files, and measures it again.

    Args:
        run: the run.
        trial: the trial's number; it must be COMPLETE.
        out: the folder to be made; it must not exist yet.
        model: the name of the run's model, which a ``package.module:factory`` needs: code runs only when it is named.

    Raises:
        UserError: the trial did not complete, its weights are missing, or ``out`` exists.
        RlsearchError: the rebuilt model does not measure as the trial did; nothing is left in ``out``.
    """
    record = record_of(run, trial)
    if record.state != "COMPLETE" or record.accuracy is None:
        raise UserError(f"trial {trial} is {record.state} ({record.reason}); only COMPLETE trials can be exported")
    if out.exists():
        raise UserError(f"{out} exists; export to a new folder, nothing is written over")
    policy = policy_of(record)
    spec = named_model(policy, model, f"the policy of trial {trial}")
    data_spec, training = settings_of(run, record)
    checkpoints = f"checkpoints/trial-{trial:05d}"
    check_inside(run.folder, ["checkpoints", checkpoints])
    weights = run.folder / checkpoints / WEIGHTS_FILE
    data = load_data(data_spec)
    trained = _replaced(spec, policy, data.input_shape)
    load_weights(weights, trained)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        draft = Path(scratch) / "export"
        draft.mkdir()
        save_weights(draft / WEIGHTS_FILE, materialize(trained))
        provenance = _provenance(run, record, data_spec, training, data)
        replace(policy, provenance=provenance).save(draft / POLICY_FILE)
        report = _measure(draft, out, record, data, load_test(data_spec), training, model)
        write_atomic(draft / CARD_FILE, _card(run, record, report, policy, data).encode())
        # Every file is on the disk by now, so that not even a power cut leaves a part under this name.
        draft.rename(out)
    flush_folder(out.parent)
    return report


def _measure(
    draft: Path,
    out: Path,
    record: TrialRecord,
    data: ImageData,
    test: ImageSplit | StreamSplit,
    training: TrainingSpec,
    model: str | None,
) -> ExportReport:
    """Builds the model from the written files alone, and compares it with what the search recorded."""
    assert record.accuracy is not None  # the caller has looked
    wants_cuda = record.device != "cpu"
    device = torch.device("cuda" if wants_cuda and torch.cuda.is_available() else "cpu")
    note = ""
    if wants_cuda and device.type == "cpu":
        note = f"trained on {record.device}, measured again on the CPU: a few images may differ"
    precision = resolve_precision(training.precision, device)
    rebuilt = load_exported(draft, model).to(device).to(memory_format=torch.channels_last)
    images = open_images(data, device)
    validation = evaluate(rebuilt, images.validation_batches(EVALUATION_BATCH), precision=precision, device=device)
    tested = measure_test(rebuilt, images, test, training)
    expected = round(record.accuracy * validation.num_images)
    if not note and validation.num_correct != expected:
        raise RlsearchError(
            f"trial {record.trial} cannot be exported: rebuilt from its files it gets {validation.num_correct} of "
            f"{validation.num_images} validation images right, during the search it got {expected}; "
            "the weights or the data have changed since"
        )
    return ExportReport(out, record.trial, record.accuracy, validation.accuracy, tested.accuracy, note)


def measure_test(
    model: nn.Module, images: ImageBatches, test: ImageSplit | StreamSplit, training: TrainingSpec
) -> Pass:
    """A trained model on the test split: what an export and a confirmation report.

    Args:
        model: on the device of ``images``.
        images: of the training, whose normalisation the test images get.
        test: from `rlsearch.training.data.load_test`.
        training: whose precision is used.

    Raises:
        DataError: the test images have another shape than the training images.
    """
    precision = resolve_precision(training.precision, images.device)
    batches = images.split_batches(test, EVALUATION_BATCH)
    return evaluate(model, batches, precision=precision, device=images.device)


def _replaced(spec: ModelSpec, policy: Policy, input_shape: Sequence[int] | None) -> nn.Module:
    """The model with its replaced units, before any weights."""
    model = build_spec(replace(spec, weights=None))
    apply_policy(model, policy, None if input_shape is None else torch.empty(2, *input_shape, device="meta"))
    return model


def named_model(policy: Policy, model: str | None, source: str) -> ModelSpec:
    """The policy's model. A ``package.module:factory`` is code: it may run only when the user's own command names it.

    Args:
        policy: as read from a file.
        model: the name that the user gave, if any.
        source: where the policy stands, for messages.

    Raises:
        ConfigError: the policy names no model.
        ModelError: the user gave another name, or none for a model that is code.
    """
    spec = policy.model
    if spec is None:
        raise ConfigError([Problem("model", "is missing: name the model that the policy is for")], source)
    check_named(spec.name, model, source)
    return spec


def settings_of(run: Run, record: TrialRecord) -> tuple[DataSpec, TrainingSpec]:
    """Data and training of a trial, as the run wrote them down.

    Raises:
        ConfigError: the run's files hold no such settings.
    """
    problems: list[Problem] = []
    data = from_mapping(DataSpec, run.space.get("data"), "data", problems)
    training = from_mapping(TrainingSpec, json.loads(record.training), "training", problems)
    if problems or data is None or training is None:
        raise ConfigError(problems, str(run.folder / "space.yaml"))
    return data, training


def _provenance(
    run: Run, record: TrialRecord, spec: DataSpec, training: TrainingSpec, data: ImageData
) -> dict[str, Any]:
    """Where an exported policy comes from, with all that a later training of it needs."""
    return {
        "run": run.folder.resolve().name,
        "trial": record.trial,
        "objectives": {name: record.metric(name) for name in run.objectives},
        "versions": _versions(run.folder / "versions.json"),
        "seed": record.seed,
        "data": asdict(spec),
        "training": asdict(training),
        "input_shape": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": list(data.classes),
    }


def _versions(file: Path) -> Any:
    """What has run the search, as its folder tells; empty where it does not.

    Raises:
        RunFolderError: the file is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{file}: is damaged ({error}); delete it, or restore it from a copy") from None


def _card(run: Run, record: TrialRecord, report: ExportReport, policy: Policy, data: ImageData) -> str:
    """The export's README: what it is, what it saves, how to use it."""
    assert policy.model is not None  # named_model has looked
    reference = baseline(run)
    rows = []
    for name in dict.fromkeys([*run.objectives, "accuracy", "params", "memory", "train_flops"]):
        value = record.metric(name)
        base = reference.metric(name) if reference else None
        cells = (describe_value(name, base), describe_value(name, value), describe_difference(name, value, base))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return _CARD.format(
        title=f"{policy.model.name}, trial {record.trial} of {run.folder.resolve().name}",
        policy=describe_policy(policy),
        rows="\n".join(rows),
        validation=describe_value("accuracy", report.validation_accuracy),
        test=describe_value("accuracy", report.test_accuracy),
        note=f"\n{report.note[0].upper()}{report.note[1:]}.\n" if report.note else "",
        confirmed=confirmed_section(run, record.trial),
        epochs=record.fidelity,
        seed=record.seed,
        device=record.device,
        shape=", ".join(str(extent) for extent in data.input_shape),
        mean=[round(value, 6) for value in data.mean],
        std=[round(value, 6) for value in data.std],
    )


_CARD = """# {title}

A training policy found by rlsearch, and the model that was trained with it.

Policy: {policy}

| metric | end-to-end baseline | this policy | difference |
| --- | --- | --- | --- |
{rows}

Both were trained for {epochs} epochs with seed {seed} on {device}; one seed, so differences within the seeds' spread
mean nothing. Accuracy in the table is on the validation split that the search chose by. Rebuilt from these files alone,
the model has {validation} on that split, and {test} on the test split, which the search never saw.
{note}{confirmed}
## Use

The trained model, as plain PyTorch modules:

```python
from rlsearch.export import load_exported

model = load_exported("this folder")
logits = model((images / 255 - mean) / std)  # images of shape (batch, {shape}), 0 to 255
```

with mean {mean} and std {std} along the channels (full precision in policy.json, beside the names of the classes).

The policy, on a model of your own making, before you train it:

```python
import rlsearch

policy = rlsearch.Policy.load("policy.json")
print(rlsearch.apply_policy(model, policy))
```

Or train it again at full length: `rlsearch train policy.json --epochs 200 --out retrained`
"""
