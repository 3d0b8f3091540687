"""One training step, captured as a CUDA graph: all of its kernels are started at once, without Python between them."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from rlsearch.training.loop import PlainStep

# Passes on the capturing stream before the capture, as torch's notes on CUDA graphs ask for.
_WARMUP_PASSES = 3


class GraphedStep:
    """A `PlainStep` for batches of one shape, captured once and replayed.

    Inputs are copied to where the graph reads them; gradients always lie where the graph writes them. Random numbers go
    on from replay to replay. The optimizer's step is not in it: its learning rate changes from step to step.

    Args:
        step: what is captured; it runs a few times. What it leaves in the model's buffers is the caller's to put back.
        inputs: a batch of the shape to be captured.
        labels: (B,).

    Raises:
        RuntimeError: something in the step cannot be captured, such as one that waits for the device.
        torch.OutOfMemoryError: there is no room for the graph's own memory.
    """

    def __init__(self, step: PlainStep, inputs: Tensor, labels: Tensor) -> None:
        self._inputs, self._labels = inputs.clone(), labels.clone()
        # What plain steps have left in the allocator is given back: the graph has memory of its own.
        step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream(inputs.device)
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_PASSES):
                step(self._inputs, self._labels)
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        # Gradients that are there would be added to; those made within the capture are written anew by every replay.
        step.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        # Threads that bring a stream's next batches into pinned memory go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = step(self._inputs, self._labels)
        parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
        self._gradients = [(p, p.grad) for p in parameters]

    def fits(self, inputs: Tensor, labels: Tensor) -> bool:
        """Whether a batch is of the captured form."""
        return (inputs.shape, inputs.dtype, len(labels)) == (self._inputs.shape, self._inputs.dtype, len(self._labels))

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, which the next call overwrites."""
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._graph.replay()
        # A plain step in between, as for the last batch of an epoch, has put its own gradients there.
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss
