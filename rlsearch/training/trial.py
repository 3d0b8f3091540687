"""One trial: one training of one policy. Here, and only here, surgery, Learn&Drop and the loop meet."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlsearch.errors import DivergedError, OutOfMemoryError, UserError
from rlsearch.learn_drop import Dropper
from rlsearch.learn_drop.feature_store import first_line, is_shortage
from rlsearch.model_graph import outermost
from rlsearch.replacement import (
    SurgeryReport,
    apply_policy,
    learnable_params,
    mixing_parameters,
)
from rlsearch.training.checkpoint import load_checkpoint, save_checkpoint
from rlsearch.training.data import ImageData, load_data
from rlsearch.training.distributed import Group, GroupForward, largest_share
from rlsearch.training.faster_step import FasterStep
from rlsearch.training.feature_inputs import TrainingInputs, check_features
from rlsearch.training.image_batches import ImageBatches
from rlsearch.training.loop import (
    PlainStep,
    Progress,
    build_optimizer,
    evaluate,
    learning_rate,
    resolve_precision,
    slow_precision,
    train_epoch,
)
from rlsearch.training.memory_fit import MemoryFit
from rlsearch.training.metrics import EpochMetrics
from rlsearch.training.models import build_spec
from rlsearch.training.peak_memory import PeakMemory
from rlsearch.training.spending import Spending, costs_of
from rlsearch.training.stream_data import open_images
from rlsearch.training.trial_spec import TrialSpec

_LOG = logging.getLogger(__name__)

# Evaluation has no backward pass, so that larger batches fit and save time. An export measures again with the same one.
EVALUATION_BATCH = 512


def run_trial(
    spec: TrialSpec,
    *,
    data: ImageData | ImageBatches | None = None,
    device: str | None = None,
    scratch: Path | None = None,
    checkpoint: Path | None = None,
) -> Iterator[EpochMetrics]:
    """Trains a policy and yields the metrics of every epoch.

    Args:
        spec: what to train.
        data: the decoded images, where they are at hand, perhaps on the device already; else ``spec.data`` is loaded.
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

    The arguments and errors are those of `run_trial`, and:

    Args:
        group: the processes that train this one model together, each with a `Trial` of its own of the same
            specification; None for a training alone. All of them run every epoch, from the same state; the metrics are
            the whole training's in each of them, and every process's state is as good as another's.
    """

    def __init__(
        self,
        spec: TrialSpec,
        *,
        data: ImageData | ImageBatches | None = None,
        device: str | None = None,
        scratch: Path | None = None,
        group: Group | None = None,
    ) -> None:
        self.spec = spec
        self._group = group
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.epochs_done = 0
        data = data if data is not None else load_data(spec.data)
        spec.check_classes(data.name, data.num_classes)
        check_features(spec.policy.learn_drop, data)
        training = spec.training
        self._precision = resolve_precision(training.precision, self.device)
        if (warning := slow_precision(training.precision, self.device)) is not None:
            _LOG.warning(warning)
        self._fit: MemoryFit | None = None
        with self._memory_errors():
            self._data = data if isinstance(data, ImageBatches) else open_images(data, self.device, group)
            torch.manual_seed(spec.seed)
            self.model = build_spec(spec.model)
            num_images = min(training.batch_size, self._data.num_train)
            size = 1 if group is None else group.size
            settings = self._data.input_shape, training.optimizer, self._precision
            self._costs = costs_of(spec.model, largest_share(training.batch_size, size), *settings)
            self._fit = MemoryFit(
                # Nothing may refer back to the trial: its memory is to go when it goes.
                lambda batch_size: costs_of(spec.model, batch_size, *settings),
                spec.policy,
                largest_share(num_images, size),
                self.device,
            )
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
                group=group,
            )
        self._spending = Spending(self._costs, spec.policy)
        self._progress = Progress()
        self._started = 0.0
        self._peak = PeakMemory(self.device, self._data.num_bytes)
        self._step = FasterStep(
            PlainStep(
                self._inputs.forward if group is None else GroupForward(group, self.model, self._inputs.forward),
                self._optimizer,
                label_smoothing=training.label_smoothing,
                precision=self._precision,
                device=self.device,
            ),
            self.model,
            list(dict.fromkeys(outermost([unit.name for unit in self._costs.units]).values())),
            # What brings gradients together waits for other processes, which a graph cannot.
            training.compile if group is None else "never",
        )

    @property
    def done(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done >= self.spec.training.epochs

    @property
    def images(self) -> ImageBatches:
        """The images on the device, which the next trial in this process may take over."""
        return self._data

    @property
    def dropper(self) -> Dropper | None:
        """Decides what leaves training; None where the policy has no Learn&Drop."""
        return self._dropper

    @property
    def features_in(self) -> str | None:
        """Where the dropped layers' outputs are stored (``device``, ``pinned``, ``file``); None where they are not."""
        cache = self._inputs.cache
        return cache.store.tier if cache else None

    def run_epoch(self, after_step: Callable[[], None] | None = None) -> EpochMetrics:
        """Trains one epoch, or what is left of it, lets layers leave, and evaluates on the validation split.

        Args:
            after_step: called after every step, when `state_dict` may be asked for.

        Raises:
            DivergedError: a loss is no longer finite.
            OutOfMemoryError: the device has too little memory.
        """
        with self._memory_errors():
            trained = self._train(after_step)
            with self._step.plain():
                validation = evaluate(
                    self.model,
                    self._data.validation_batches(EVALUATION_BATCH),
                    precision=self._precision,
                    device=self.device,
                    group=self._group,
                )
        if self.done:
            self._inputs.close()
            self._step.close()
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
            "progress": self._progress_now(),
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
        self._progress = self._restored(Progress(**state["progress"]))
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

    def _progress_now(self) -> dict[str, Any]:
        """The epoch under way in plain numbers."""
        progress = self._progress
        if progress.steps:
            now = self._now()
            progress.seconds += now - self._started
            self._started = now
        return asdict(replace(progress, loss_sum=float(progress.loss_sum)))

    def _restored(self, progress: Progress) -> Progress:
        """This process's part of what the first one has saved: each counts an equal share of the images."""
        batch_size, size = self.spec.training.batch_size, 1 if self._group is None else self._group.size
        num_images = min(progress.steps * batch_size, self._data.num_train) / size
        mean = progress.loss_sum / progress.num_images if progress.num_images else 0.0
        if num_images == progress.num_images:
            return progress
        return replace(progress, num_images=num_images, loss_sum=mean * num_images)

    def _train(self, after_step: Callable[[], None] | None = None) -> _Epoch:
        """One epoch of steps, and the cut after it."""
        epoch, done = self.epochs_done, self._progress.steps
        training = self.spec.training
        # After a resume the cache is filled again; that was paid for before the interruption, and is not counted twice.
        self._inputs.follow_cut(training.epochs - epoch)
        rates = self._rates(epoch)
        cut, stored, num_learnable = self._cut, self._inputs.stored, learnable_params(self.model)
        is_new = self._step.begin((cut, stored), self._inputs.num_steps * (training.epochs - epoch) - done)
        self._started = self._now()
        if self._group is not None:
            self._group.seed(self.spec.seed, epoch, done)
        if self._dropper:
            self._dropper.train_mode()
        else:
            self.model.train()
        batches = self._inputs.batches(epoch, done)
        if is_new:
            predicted = self._spending.step_memory(self.model, cut, stored=stored)
            batches = self._peak.watched(batches, predicted + self._inputs.stored_bytes)
        arguments = self._step, batches, self._optimizer, rates[done:], self._progress
        result = train_epoch(*arguments, self._group, after_step)
        if self._group is not None:
            self._peak.num_bytes = self._group.greatest(self._peak.num_bytes)
            self._group.share_buffers(self.model)
        if epoch == 0:
            self._spending.sums.memory = self._peak.num_bytes
        self.epochs_done += 1
        self._spending.sums.train_seconds += self._progress.seconds
        self._progress = Progress()
        self._spending.add_epoch(result.num_images, num_learnable, cut, stored=stored)
        if self._dropper and self._dropper.end_epoch():
            with self._step.plain():
                work = self._inputs.follow_cut(training.epochs - self.epochs_done)
            if work is not None:
                self._spending.add_cache(work)
        self._spending.sums.train_seconds += self._now() - self._started
        left = self._dropper.layers[cut : self._cut] if self._dropper else ()
        return _Epoch(result.loss, rates[-1], self._peak.num_bytes, left)

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

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _build_dropper(self, report: SurgeryReport) -> Dropper | None:
        settings = self.spec.policy.learn_drop
        if settings is None:
            return None
        units = [unit.name for unit in self._costs.units]
        agree = None if self._group is None else self._group.from_first
        return Dropper(
            self.model, self._optimizer, self.spec.training.epochs, settings, report=report, units=units, agree=agree
        )
