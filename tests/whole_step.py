"""The peak of a real training step, read off all storages of the real loop: what predictions are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rlsearch import LearnDrop, Policy, TrainingSpec, apply_policy
from rlsearch.learn_drop import Dropper
from rlsearch.replacement import Unit, mixing_parameters
from rlsearch.training.loop import PlainStep, autocast, build_optimizer, train_epoch
from rlsearch.training.sizes import Sizes
from rlsearch.training.storages import Storages, peak_bytes


def whole_step(
    build: Callable[[], nn.Module],
    policy: Policy,
    shape: Sequence[int],
    training: TrainingSpec,
    units: Sequence[Unit],
    *,
    cut: int = 0,
    stored: bool = False,
) -> tuple[int, Sizes]:
    """Bytes at the peak of the second step of a training, and the sizes of the model then.

    Args:
        build: makes the untouched model.
        policy: what is replaced in it.
        shape: of a batch of images.
        training: its optimizer and precision.
        units: of the model.
        cut: how many layers have left.
        stored: whether the steps read what those give, instead of running them.
    """
    starts = []
    with Storages() as log:
        model = build()
        report = apply_policy(model, policy, units=units)
        optimizer = build_optimizer(training, model, mixing_parameters(model))
        forward: Callable[[Tensor], Tensor] = model
        dtype = torch.float32
        if cut:
            names = [unit.name for unit in units]
            dropper = Dropper(model, optimizer, 9, LearnDrop(score="schedule"), report=report, units=names)
            dropper._drop(cut)
            dropper.train_mode()
            forward = dropper.suffix if stored else dropper
            with autocast(training.precision, torch.device("cpu")):
                features = dropper.prefix(torch.randn(*shape))
            shape, dtype = (features.shape, features.dtype) if stored else (shape, dtype)
            del features
        else:
            model.train()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(2):
                batch = torch.ones(*shape, dtype=dtype), torch.zeros(shape[0], dtype=torch.int64)
                starts.append(len(log.events))
                yield batch

        cpu = torch.device("cpu")
        step = PlainStep(forward, optimizer, precision=training.precision, device=cpu)
        train_epoch(step, batches(), optimizer, [1e-3, 1e-3])
    before, during = log.events[: starts[1]], log.events[starts[1] :]
    return peak_bytes(during, sum(num_bytes for _, num_bytes in before)), Sizes.of(model)
