"""One trial: one training of one policy. Here, and only here, surgery, Learn&Drop and the loop meet."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsearch.errors import ConfigError, DivergedError, OutOfMemoryError, Problem, UserError
from rlsearch.learn_drop import Dropper
from rlsearch.learn_drop.feature_store import first_line, is_shortage
from rlsearch.policy import ModelSpec, Policy
from rlsearch.replacement import (
    SurgeryReport,
    apply_policy,
    learnable_params,
    mixing_parameters,
)
from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint
from rlsearch.training.cost import CostModel
from rlsearch.training.data import DataSpec, ImageData, load_data
from rlsearch.training.device_data import DeviceData
from rlsearch.training.feature_inputs import TrainingInputs
from rlsearch.training.loop import (
    TrainingSpec,
    build_optimizer,
    evaluate,
    learning_rate,
    resolve_precision,
    train_epoch,
)
from rlsearch.training.memory_fit import MemoryFit
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.models import build_spec
from rlsearch.training.spending import Spending

# Evaluation has no backward pass, so that larger batches fit and save time. An export measures again with the same one.
EVALUATION_BATCH = 512
# Steps before the peak of memory is read: the first ones let libraries choose their kernels.
_WARMUP_STEPS = 3


@dataclass(frozen=True)
class TrialSpec:
    """Everything that decides a trial's result.

    Attributes:
        model: what is trained.
        data: on what.
        training: how.
        policy: with what replaced, and what dropped when.
        seed: of the initial weights and of the order and augmentation of the images.
    """

    model: ModelSpec
    data: DataSpec
    training: TrainingSpec = field(default_factory=TrainingSpec)
    policy: Policy = field(default_factory=Policy)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types; two trials with equal ones give equal numbers on one machine."""
        return {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "training": asdict(self.training),
            "policy": self.policy.hash,
            "seed": self.seed,
        }


def run_trial(
    spec: TrialSpec,
    *,
    data: ImageData | None = None,
    device: str | None = None,
    scratch: Path | None = None,
    checkpoint: Path | None = None,
) -> Iterator[EpochMetrics]:
    """Trains a policy and yields the metrics of every epoch.

    Args:
        spec: what to train.
        data: the decoded images, where they are at hand; else ``spec.data`` is loaded.
        device: as torch names it; by default CUDA where there is one, else the CPU.
        scratch: a folder for stored features that fit into no memory, removed again; by default the machine's own for
            temporary files.
        checkpoint: a file that the state is written to after every epoch, and continued from where it exists.

    Raises:
        UserError: the specification, the data, or the checkpoint is wrong; before any training.
        DivergedError: a loss is no longer finite.
        OutOfMemoryError: the device has too little memory.
    """
    trial = Trial(spec, data=data, device=device, scratch=scratch)
    if checkpoint is not None and checkpoint.exists():
        trial.load_state_dict(load_checkpoint(checkpoint))
    while not trial.done:
        metrics = trial.run_epoch()
        if checkpoint is not None:
            save_checkpoint(checkpoint, trial.state_dict())
        yield metrics


@dataclass(frozen=True)
class _Epoch:
    """What the steps of one epoch gave, and the layers that left after them."""

    train_loss: float
    lr: float
    step_memory: int
    left: tuple[str, ...]


class Trial:
    """A training that can stop after any epoch and go on from its state.

    The arguments and errors are those of `run_trial`.
    """

    def __init__(
        self,
        spec: TrialSpec,
        *,
        data: ImageData | None = None,
        device: str | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.epochs_done = 0
        data = data if data is not None else load_data(spec.data)
        _check_classes(spec, data)
        training = spec.training
        self._precision = resolve_precision(training.precision, self.device)
        self._fit: MemoryFit | None = None
        with self._memory_errors():
            self._data = DeviceData(data, self.device)
            torch.manual_seed(spec.seed)
            self.model = build_spec(spec.model)
            self._costs = self._costs_of(training.batch_size)
            num_images = min(training.batch_size, self._data.num_train)
            self._fit = MemoryFit(self._costs_of, spec.policy, num_images, self.device)
            self._fit.check()
            report = apply_policy(self.model, spec.policy, units=self._costs.units)
            self.model.to(self.device).to(memory_format=torch.channels_last)
            self._optimizer = build_optimizer(training, self.model, mixing_parameters(self.model))
            self._dropper = self._build_dropper(report)
            self._inputs = TrainingInputs(
                self._data,
                self.model,
                self._dropper,
                training.batch_size,
                spec.seed,
                self._precision,
                scratch=scratch or Path(tempfile.gettempdir()),
                run=json.dumps(spec.to_dict(), sort_keys=True),
            )
        self._spending = Spending(self._costs, spec.policy)

    @property
    def done(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done >= self.spec.training.epochs

    @property
    def dropper(self) -> Dropper | None:
        """Decides what leaves training; None where the policy has no Learn&Drop."""
        return self._dropper

    @property
    def features_in(self) -> str | None:
        """Where the dropped layers' outputs are stored (``device``, ``pinned``, ``file``); None where they are not."""
        cache = self._inputs.cache
        return cache.store.tier if cache else None

    def run_epoch(self) -> EpochMetrics:
        """Trains one epoch, lets layers leave, and evaluates on the validation split.

        Raises:
            DivergedError: a loss is no longer finite.
            OutOfMemoryError: the device has too little memory.
        """
        with self._memory_errors():
            trained = self._train()
            validation = evaluate(
                self.model,
                self._data.validation_batches(EVALUATION_BATCH),
                precision=self._precision,
                device=self.device,
            )
        if self.done:
            self._inputs.close()
        if not math.isfinite(validation.loss):
            raise DivergedError(f"the validation loss became {validation.loss} in epoch {self.epochs_done}")
        spending, sums = self._spending, self._spending.sums
        return EpochMetrics(
            epoch=self.epochs_done,
            epochs=self.spec.training.epochs,
            accuracy=validation.accuracy,
            validation_loss=validation.loss,
            train_loss=trained.train_loss,
            lr=trained.lr,
            params=spending.cost.params,
            params_total=spending.cost.params_total,
            learnable_params=learnable_params(self.model),
            mean_learnable_params=spending.mean_learnable_params,
            memory=sums.memory,
            memory_predicted=spending.cost.memory,
            step_memory=trained.step_memory,
            train_flops=sums.train_flops,
            forward_flops=sums.forward_flops,
            forward_share=spending.forward_share,
            train_seconds=sums.train_seconds,
            samples_per_second=sums.num_images / sums.train_seconds,
            dropped_units=self._dropper.dropped_units if self._dropper else 0,
            learning=self._learning() if self.epochs_done == 1 or trained.left else (),
            left=trained.left,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types, from which `load_state_dict` goes on as if nothing had happened."""
        return {
            "spec": self.spec.to_dict(),
            "epochs_done": self.epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "dropper": self._dropper.state_dict() if self._dropper else None,
            "inputs": self._inputs.state_dict(),
            "sums": self._spending.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a state of the same specification into this new trial.

        Raises:
            UserError: the state is of another training.
        """
        theirs, ours = state.get("spec", {}), self.spec.to_dict()
        different = [part for part in ours if theirs.get(part) != ours[part]]
        if different:
            raise UserError(f"checkpoint: it is of another training, with another {', '.join(different)}; start afresh")
        self.model.load_state_dict(state["model"])
        if self._dropper:
            # The cut comes first: the optimizer's state is of what was still learning.
            self._dropper.load_state_dict(state["dropper"])
        self._inputs.load_state_dict(state["inputs"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._spending.load_state_dict(state["sums"])
        self.epochs_done = state["epochs_done"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """What torch raises when memory runs out, on the GPU or the host, as one of our own errors."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            # Our own words first: a table has no room for all that torch says.
            told = first_line(error) if self._fit is None else f"{self._fit.told()} ({first_line(error)})"
            raise OutOfMemoryError(told) from error

    def _costs_of(self, batch_size: int) -> CostModel:
        model = json.dumps(asdict(self.spec.model), sort_keys=True)
        return _cost_model(model, self._data.input_shape, batch_size, self.spec.training.optimizer, self._precision)

    def _train(self) -> _Epoch:
        """One epoch of steps, and the cut after it."""
        epoch = self.epochs_done
        training = self.spec.training
        # After a resume the cache is filled again; that was paid for before the interruption, and is not counted twice.
        self._inputs.follow_cut(training.epochs - epoch)
        rates = self._rates(epoch)
        cut, stored, num_learnable = self._cut, self._inputs.stored, learnable_params(self.model)
        step_memory = self._spending.step_memory(self.model, cut, stored=stored) + self._inputs.stored_bytes
        started = self._now()
        if self._dropper:
            self._dropper.train_mode()
        else:
            self.model.train()
        result = train_epoch(
            self._inputs.forward,
            self._measured(self._inputs.batches(epoch)),
            self._optimizer,
            rates,
            label_smoothing=training.label_smoothing,
            precision=self._precision,
            device=self.device,
        )
        if self.device.type == "cuda":
            step_memory = torch.cuda.max_memory_allocated(self.device) - self._data.num_bytes
        if epoch == 0:
            self._spending.sums.memory = step_memory
        self.epochs_done += 1
        self._spending.add_epoch(result.num_images, num_learnable, cut, stored=stored)
        if self._dropper and self._dropper.end_epoch():
            work = self._inputs.follow_cut(training.epochs - self.epochs_done)
            if work is not None:
                self._spending.add_cache(work)
        self._spending.sums.train_seconds += self._now() - started
        left = self._dropper.layers[cut : self._cut] if self._dropper else ()
        return _Epoch(result.loss, rates[-1], step_memory, left)

    @property
    def _cut(self) -> int:
        """How many layers have left."""
        return self._dropper.cut if self._dropper else 0

    def _learning(self) -> tuple[str, ...]:
        """The names of the layers that learn."""
        return self._dropper.layers[self._cut :] if self._dropper else ()

    def _rates(self, epoch: int) -> list[float]:
        """The learning rates of an epoch's steps."""
        steps = self._inputs.num_steps
        training = self.spec.training
        return [
            learning_rate(step, steps * training.epochs, round(steps * training.warmup_epochs), training.lr)
            for step in range(epoch * steps, (epoch + 1) * steps)
        ]

    def _measured(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; the peak of memory is counted anew once the first steps have warmed the allocator up, and at the
        first step, so that an epoch of few steps does not report what came before it. No step waits for this."""
        for step, batch in enumerate(batches):
            if step in (0, _WARMUP_STEPS) and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            yield batch

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _build_dropper(self, report: SurgeryReport) -> Dropper | None:
        settings = self.spec.policy.learn_drop
        if settings is None:
            return None
        units = [unit.name for unit in self._costs.units]
        return Dropper(self.model, self._optimizer, self.spec.training.epochs, settings, report=report, units=units)


def _check_classes(spec: TrialSpec, data: ImageData) -> None:
    if spec.model.num_classes != data.num_classes:
        raise ConfigError(
            [
                Problem(
                    "model.num_classes",
                    f"is {spec.model.num_classes}, but the data {data.name!r} have {data.num_classes} classes",
                )
            ],
            "trial",
        )


@lru_cache(maxsize=8)
def _cost_model(model: str, input_shape: tuple[int, ...], batch_size: int, optimizer: str, precision: str) -> CostModel:
    """Costs are the same for every trial of a search: a worker that runs many of them looks once."""
    with torch.device("meta"):
        untouched = build_spec(replace(ModelSpec(**json.loads(model)), weights=None))
    return CostModel(untouched, input_shape, batch_size, optimizer, precision)
