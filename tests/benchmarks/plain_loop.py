"""The training loop that one writes first: torchvision transforms, a DataLoader, float32, channels first."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from rlsearch.training.data import ImageData
from rlsearch.training.loop import TrainingSpec, learning_rate

WORKERS = 2


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Images as torchvision's own sets hold them, and the usual augmentation of each."""

    def __init__(self, data: ImageData) -> None:
        self.pixels: npt.NDArray[np.uint8] = np.ascontiguousarray(data.train.images.transpose(0, 2, 3, 1))
        self.labels = data.train.labels.tolist()
        side = data.input_shape[1]
        steps = [transforms.RandomCrop(side, padding=data.crop)] if data.crop else []
        if data.flip:
            steps.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class PlainTraining:
    """A training with the same schedule, optimizer and weight decay as one of rlsearch's."""

    def __init__(self, model: nn.Module, data: ImageData, spec: TrainingSpec, device: torch.device) -> None:
        self.model, self.spec, self.device = model.to(device), spec, device
        self.epoch = 0
        self.loader = DataLoader(
            Pictures(data),
            batch_size=spec.batch_size,
            shuffle=True,
            num_workers=WORKERS,
            pin_memory=device.type == "cuda",
        )
        weights = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": weights, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=True)

    def train_epoch(self) -> float:
        """Seconds of one epoch, its workers' start included: they are started in each."""
        started = time.perf_counter()
        self.model.train()
        steps = len(self.loader)
        for step, (images, labels) in enumerate(self.loader, start=self.epoch * steps):
            for group in self.optimizer.param_groups:
                warmup = round(steps * self.spec.warmup_epochs)
                group["lr"] = learning_rate(step, steps * self.spec.epochs, warmup, self.spec.lr)
            images, labels = images.to(self.device), labels.to(self.device)
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.epoch += 1
        return time.perf_counter() - started
