"""Training steps as CUDA graphs and compiled blocks, where they have proved to be faster on this machine.

A small network leaves a GPU waiting for its next kernel. A CUDA graph starts all kernels of a step at once; compiled
blocks have fewer of them, but take seconds to minutes to be compiled. Neither is trusted: both must give the plain
step's loss and gradients, and take less time than it, on the machine and in the training at hand.

Blocks are compiled one by one, so that all of one structure share one program, in this trial and in later ones of the
same process. On CPUs compiled blocks were measured to be slower than plain ones (README), so that ``auto`` leaves CPUs
alone. Method: reconstruction.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlsearch.replacement.clock import Clock
from rlsearch.training.graphed_step import GraphedStep
from rlsearch.training.loop import PlainStep, Step
from rlsearch.training.same_step import Outcome, agree, outcome, unchanged

_LOG = logging.getLogger(__name__)

# Steps before the first look: they warm libraries up, and the peak of memory is measured on them.
PLAIN_STEPS = 8
# Fewer steps than these do not pay for the twenty or so that looking takes.
_LEAST_STEPS = 100
_TIMED_STEPS = 5
# A way must take at most this share of the time of the one before; above it differences are noise.
_GAIN = 0.97
# Programs that one block's forward may have: for its widths, strides, replacements, and places behind a cut.
_MOST_PROGRAMS = 64


@dataclass
class _Experience:
    """What compiling took and saved in this process, for its later trials; before the first, what is to be expected.

    Attributes:
        seconds: that it took. Most blocks of later trials are then programs that are there.
        saving: as a share of the step.
    """

    seconds: float = 60.0
    saving: float = 0.15


_EXPERIENCE = _Experience()


class FasterStep:
    """A `PlainStep` that is run in the fastest way that gives the same.

    Args:
        plain: the step.
        model: what it trains.
        blocks: names of the modules that may be compiled.
        mode: ``auto`` looks, on CUDA, once enough plain steps have run; ``always`` compiles and captures at the first
            step, on any device; ``never`` stays plain.
    """

    def __init__(self, plain: PlainStep, model: nn.Module, blocks: Sequence[str], mode: str = "auto") -> None:
        self._plain = plain
        self._model = model
        self._blocks = tuple(blocks)
        self._always = mode == "always"
        self._cuda = plain.device.type == "cuda"
        # A unit that learns in some passes only counts them in Python, which neither a graph nor a program repeats.
        counts = any(isinstance(module, Clock) for module in model.modules())
        self._usable = mode != "never" and not counts and (self._always or self._cuda)
        self._setting: object = None
        self._remaining = 0
        self._count = 0
        self._looked = False
        self._graph: GraphedStep | None = None
        self._compiled_for: object = None

    @property
    def way(self) -> str:
        """``plain``, ``compiled``, ``graph`` or ``compiled graph``: how full batches are run now."""
        words = [*(["compiled"] if self._compiled_for else []), *(["graph"] if self._graph else [])]
        return " ".join(words) or "plain"

    def begin(self, setting: object, remaining_steps: int) -> bool:
        """To be called before each epoch.

        Args:
            setting: whatever changes what a step does (the cut, whether features are stored).
            remaining_steps: of the training.

        Returns:
            whether the setting is a new one, which is looked at anew.
        """
        self._remaining = remaining_steps
        if setting == self._setting:
            return False
        self._graph = None
        self._looked, self._count, self._setting = False, 0, setting
        return True

    def close(self) -> None:
        """Gives the graph's memory back."""
        self._graph = None

    def plain(self) -> AbstractContextManager[object]:
        """For the block, compiled modules run as they are written: each other shape would be compiled for itself."""
        return torch.compiler.set_stance("force_eager") if self._compiled_for else nullcontext()

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """As `PlainStep`; the loss is good until the next call."""
        if self._usable and not self._looked and self._is_time():
            self._looked = True
            self._look(inputs, labels)
        self._count += 1
        self._remaining -= 1
        if self._graph is not None and self._graph.fits(inputs, labels):
            return self._graph(inputs, labels)
        if self._compiled_for == _form(inputs):
            return self._plain(inputs, labels)
        with self.plain():
            return self._plain(inputs, labels)

    def _is_time(self) -> bool:
        return self._always or (self._count >= PLAIN_STEPS and self._remaining >= _LEAST_STEPS)

    def _look(self, inputs: Tensor, labels: Tensor) -> None:
        """Finds the way on one batch; model and random numbers are as before afterwards."""
        with unchanged(self._model, self._plain.device):
            with self.plain():
                reference = self._outcome(self._plain, inputs, labels)
                seconds = self._seconds(self._plain, inputs, labels)
            if not self._compiled_for:
                graph, taken = self._captured(inputs, labels, reference)
                if graph is not None and (self._always or taken <= _GAIN * seconds):
                    self._graph, seconds = graph, taken
            if self._always or self._compiled_for or self._pays(seconds):
                self._try_compiled(inputs, labels, reference, seconds)
        self._plain.optimizer.zero_grad(set_to_none=True)
        _LOG.info("training steps run as: %s", self.way)

    def _pays(self, seconds: float) -> bool:
        """Whether compiling is worth trying, by what it is known to take and to save."""
        return self._remaining * seconds * _EXPERIENCE.saving > _EXPERIENCE.seconds

    def _try_compiled(self, inputs: Tensor, labels: Tensor, reference: Outcome, seconds: float) -> None:
        """Compiles the blocks, and keeps them if they are right and faster."""
        before, self._graph = self._graph, None
        if not self._compiled_for:
            self._compile()
        self._compiled_for = _form(inputs)
        started = time.perf_counter()
        with warnings.catch_warnings():
            # Dynamo itself looks at the gradients of what a replaced unit computes with, which are no leaves.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            fine = self._is_right(self._plain, inputs, labels, reference, "compiled blocks")
        _EXPERIENCE.seconds = time.perf_counter() - started
        taken = math.inf
        if fine:
            self._graph, taken = self._captured(inputs, labels, reference)
            if self._graph is None:
                taken = self._seconds(self._plain, inputs, labels)
            _EXPERIENCE.saving = max(0.0, 1 - taken / seconds)
        if not fine or not (self._always or taken <= _GAIN * seconds):
            self._graph, self._compiled_for = before, None
            for name in self._blocks:
                self._model.get_submodule(name)._compiled_call_impl = None

    def _compile(self) -> None:
        import torch._dynamo  # takes a second, which is for those who compile

        torch._dynamo.config.recompile_limit = max(_MOST_PROGRAMS, torch._dynamo.config.recompile_limit)
        for name in self._blocks:
            self._model.get_submodule(name).compile(dynamic=False)

    def _captured(self, inputs: Tensor, labels: Tensor, reference: Outcome) -> tuple[GraphedStep | None, float]:
        """A graph of the step as it is now and its seconds; None where there is none, or it is not right."""
        if not self._cuda:
            return None, math.inf
        try:
            graph = GraphedStep(self._plain, inputs, labels)
        except RuntimeError as error:  # running out of memory is one
            _LOG.info("training steps run without a CUDA graph: %s", str(error).split("\n")[0])
            return None, math.inf
        if not self._is_right(graph, inputs, labels, reference, "the CUDA graph"):
            return None, math.inf
        return graph, self._seconds(graph, inputs, labels)

    def _is_right(self, step: Step, inputs: Tensor, labels: Tensor, reference: Outcome, what: str) -> bool:
        try:
            result = self._outcome(step, inputs, labels)
        except Exception as error:  # noqa: BLE001  # compilers raise almost anything; the plain step goes on
            _LOG.warning("%s cannot be used: %s: %s", what, type(error).__name__, str(error).split("\n")[0])
            return False
        if agree(reference, result, self._plain.precision):
            return True
        _LOG.warning("%s cannot be used: loss or gradients differ from those of plain steps", what)
        return False

    def _outcome(self, step: Step, inputs: Tensor, labels: Tensor) -> Outcome:
        """Of one pass, from the state that the model is in."""
        with unchanged(self._model, self._plain.device):
            return outcome(step, self._plain.optimizer, inputs, labels)

    def _seconds(self, step: Step, inputs: Tensor, labels: Tensor) -> float:
        """Of one pass, over a few; the passes before have warmed up what there is to warm up."""
        self._wait()
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            step(inputs, labels)
        self._wait()
        return (time.perf_counter() - started) / _TIMED_STEPS

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._plain.device)


def _form(inputs: Tensor) -> object:
    """What a program is compiled for."""
    return tuple(inputs.shape), inputs.dtype, inputs.stride()
