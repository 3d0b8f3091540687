"""One training in several processes, each with a part of every batch, on torch's DistributedDataParallel.

``batch_size`` stays that of the whole: whatever the number of processes, a step sees the same images and takes the same
mean of their gradients, up to the order of additions. Batch norm alone differs: each process has the statistics of its
own part, and the first process's running averages are everybody's after each epoch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

# How long the others wait for a process that has died or hangs. A compilation, or the timing of a cache of features in
# the first process alone, must fit into it.
TIMEOUT_SECONDS = 600.0

# Below so many images a process, every process takes the whole batch: batch norm cannot train on one image.
_LEAST_IMAGES = 2


@dataclass(frozen=True)
class Share:
    """One process's part of a batch.

    Attributes:
        part: the images it takes.
        images: how many of the batch's images it stands for; those of all processes add up to the batch.
        scale: by how much its mean loss counts in the mean over the processes, so that this is the mean over the batch.
    """

    part: slice
    images: float
    scale: float


def share(count: int, rank: int, size: int) -> Share:
    """The part of a batch of ``count`` images that the process ``rank`` of ``size`` takes.

    Parts differ by one image at most. A batch of fewer than two images a process is taken whole by all of them.
    """
    if count < _LEAST_IMAGES * size:
        return Share(slice(0, count), count / size, 1.0)
    part = slice(count * rank // size, count * (rank + 1) // size)
    images = part.stop - part.start
    return Share(part, images, images * size / count)


def largest_share(count: int, size: int) -> int:
    """The most images of a batch of ``count`` that one of ``size`` processes takes."""
    return count if count < _LEAST_IMAGES * size else -(-count // size)


class Group:
    """This process among those that train one model together: torch's default process group, already joined.

    Every method with a result waits for all processes: all call it, in the same order.

    Args:
        device: where this process trains.

    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are.
        local_size: how many of them run on this process's host.
        now: this process's share of the batch under way.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.now = share(self.size * _LEAST_IMAGES, self.rank, self.size)
        self._device = device
        hosts: list[Any] = [None] * self.size
        dist.all_gather_object(hosts, socket.gethostname())
        self.local_size = hosts.count(socket.gethostname())

    def take(self, count: int) -> slice:
        """This process's part of a batch of ``count`` images, which is under way from now on."""
        self.now = share(count, self.rank, self.size)
        return self.now.part

    def stretch(self, count: int) -> slice:
        """This process's part of a pass over ``count`` images in which each is looked at once; it may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def summed(self, *values: float) -> list[float]:
        """The sums over all processes of each value."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def greatest(self, value: int) -> int:
        """The greatest of the processes' values."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def all_true(self, value: bool) -> bool:
        """Whether the value is true in every process."""
        return bool(self._reduced(int(value), dist.ReduceOp.MIN))

    def from_first(self, value: int) -> int:
        """The first process's value."""
        tensor = torch.tensor(value, device=self._device)
        dist.broadcast(tensor, 0)
        return int(tensor.item())

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's buffers, the running averages of batch norm among them."""
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def seed(self, seed: int, epoch: int, step: int = 0) -> None:
        """Starts torch's own random numbers (dropout draws from them) anew: others in every process and epoch, and
        after a resume at a step."""
        state = np.random.SeedSequence([seed, epoch, step, self.rank]).generate_state(1)
        torch.manual_seed(int(state[0]))

    def wrap(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``forward``, whose backward pass gives every process the batch's mean gradient.

        Wrap anew once other parameters of the model learn; the old wrapping must be gone by then.

        Args:
            model: holds the parameters; those that learn now are waited for in every backward pass.
            forward: from this process's part of a batch to logits, through parameters of ``model``.
        """
        # Which parameters take part may differ from step to step (replaced units with update_every).
        wrapped: Callable[[Tensor], Tensor] = DistributedDataParallel(
            _Forward(model, forward, self), find_unused_parameters=True, gradient_as_bucket_view=True
        )
        return wrapped

    def _reduced(self, value: int, operation: dist.ReduceOp.RedOpType) -> int:
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, operation)
        return int(tensor.item())


class GroupForward:
    """A forward pass whose backward pass gives every process the batch's mean gradient, whatever of the model learns.

    Args:
        group: the processes.
        model: holds the parameters.
        forward: as in `Group.wrap`.
    """

    def __init__(self, group: Group, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._group = group
        self._model = model
        self._forward = forward
        self._wrapped: Callable[[Tensor], Tensor] | None = None
        self._learning: list[bool] = []

    def __call__(self, inputs: Tensor) -> Tensor:
        """From this process's part of a batch to logits."""
        learning = [parameter.requires_grad for parameter in self._model.parameters()]
        if self._wrapped is None or learning != self._learning:
            self._wrapped = None  # its hooks on the parameters go before new ones come
            self._wrapped, self._learning = self._group.wrap(self._model, self._forward), learning
        return self._wrapped(inputs)


class _Forward(nn.Module):
    """A function as a module, with its share's weight on the gradient.

    It holds parameters alone: running averages are not used in training mode, and are shared once an epoch
    (`Group.share_buffers`) instead of at every step.
    """

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], group: Group) -> None:
        super().__init__()
        self.learning = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self._function = forward
        self._group = group

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self._function(inputs)
        scale = self._group.now.scale
        if scale != 1 and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * scale)
        return logits


def open_store(host: str) -> tuple[TCPStore, int]:
    """Where the processes of a group find each other: the first one opens it.

    Args:
        host: this machine's address, as the others reach it; it is listened at there alone.

    Returns:
        the store, which must live as long as the group, and its port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    port: int = listening.getsockname()[1]
    # The store closes the socket.
    return _tcp_store(host, port, is_master=True, master_listen_fd=listening.detach()), port


def find_store(host: str, port: int) -> TCPStore:
    """What another process has opened by `open_store`."""
    return _tcp_store(host, port, is_master=False)


def join(store: Store, rank: int, size: int, device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> Group:
    """Makes this process one of a group: over NCCL on CUDA devices, else over gloo.

    Args:
        store: of `open_store` or `find_store`.
        rank: this process's number, from 0.
        size: how many processes there are.
        device: where this process trains; with CUDA no two processes may have the same one.
        timeout_seconds: how long the others are waited for, here and in every step.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds)
    )
    return Group(device)


def loopback_environment() -> dict[str, str]:
    """What keeps the talk between processes of one machine on that machine; it must be set before they `join`."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def _tcp_store(host: str, port: int, **options: Any) -> TCPStore:
    # A torch that is built without it has no such name.
    store: TCPStore = dist.TCPStore(host, port, wait_for_workers=False, **options)  # type: ignore[attr-defined]
    return store
