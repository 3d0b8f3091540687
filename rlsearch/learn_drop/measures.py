"""What is recorded of the layers between two measurements, so that their scores can be told: one class a score.

A step is never waited for: what a step adds stays on the device until the measurement.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.learn_drop.scores import gradient_change, rate_ratio, relative_changes

# The tensors by which a layer's learning is measured.
TensorsOf = Callable[[nn.Module], Sequence[Tensor]]


class Measure(ABC):
    """Scores of layers, from one measurement to the next.

    Args:
        layers: those that may leave, in forward order.
        optimizer: that trains them.
    """

    def __init__(self, layers: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self._layers = list(layers)
        self._optimizer = optimizer

    @abstractmethod
    def scores(self, start: int) -> list[float | None]:
        """The scores of the layers from ``start`` on since the last call, and the start of the next interval; None for
        what this interval could not tell. Waits for the device once."""

    @abstractmethod
    def forget(self, end: int) -> None:
        """The layers before ``end`` have left: nothing of them is recorded or held any more."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types, from which `load_state_dict` goes on at the end of an interval."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the state back; before it, `forget` was called for what had left."""


class ParamChange(Measure):
    """``param_change``: the relative change of a layer's parameters, of the made ones in a replaced unit."""

    def __init__(self, layers: Sequence[nn.Module], optimizer: torch.optim.Optimizer, tensors_of: TensorsOf) -> None:
        super().__init__(layers, optimizer)
        self._tensors_of = tensors_of
        self._snapshot: list[list[Tensor]] = [[] for _ in self._layers]
        self._take_snapshot(0)

    def scores(self, start: int) -> list[float | None]:
        """See `Measure`."""
        current = [self._tensors_of(layer) for layer in self._layers[start:]]
        changes = relative_changes(current, self._snapshot[start:])
        self._take_snapshot(start)
        return list(changes)

    def forget(self, end: int) -> None:
        """See `Measure`."""
        self._snapshot[:end] = [[] for _ in range(end)]

    def state_dict(self) -> dict[str, Any]:
        """See `Measure`."""
        # Its tensors are never written to, its lists are.
        return {"snapshot": list(self._snapshot)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Measure`."""
        self._snapshot = list(state["snapshot"])

    def _take_snapshot(self, start: int) -> None:
        """Copies in host memory, so that watching a model takes no memory where memory is what is being saved."""
        self._snapshot[start:] = [
            [tensor.detach().to("cpu", copy=True) for tensor in self._tensors_of(layer)]
            for layer in self._layers[start:]
        ]


class ParamChangePerRate(ParamChange):
    """``param_change_per_lr``: the same, for the learning rate's greatest value so far: divided by the share of it that
    the interval's steps took.

    A layer's rate is that of the parameter groups that hold its parameters, each by how many of them it holds.
    """

    def __init__(self, layers: Sequence[nn.Module], optimizer: torch.optim.Optimizer, tensors_of: TensorsOf) -> None:
        super().__init__(layers, optimizer, tensors_of)
        if any("lr" not in group for group in optimizer.param_groups):
            raise ModelError(
                "learn_drop.score: param_change_per_lr needs the learning rate, and the parameter groups of "
                f"{type(optimizer).__name__} hold no 'lr'; use param_change"
            )
        self._totals: list[float | Tensor] = []  # of every group: the sum of its rates over the interval's steps
        self._num_steps = 0
        self._greatest = [0.0] * len(self._layers)
        _hook(optimizer, "register_step_post_hook", self._note, "param_change_per_lr")

    def scores(self, start: int) -> list[float | None]:
        """See `Measure`."""
        rates = self._rates(start)
        self._totals, self._num_steps = [], 0
        self._greatest[start:] = [max(pair) for pair in zip(self._greatest[start:], rates, strict=True)]
        ratios = [rate_ratio(*pair) for pair in zip(rates, self._greatest[start:], strict=True)]
        # Without a learning rate nothing could have moved, which tells nothing of what would.
        return [
            None if change is None or ratio == 0 else change / ratio
            for change, ratio in zip(super().scores(start), ratios, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """See `Measure`."""
        return {
            **super().state_dict(),
            "totals": [float(total) for total in self._totals],
            "num_steps": self._num_steps,
            "greatest": list(self._greatest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Measure`."""
        super().load_state_dict(state)
        self._totals, self._greatest = list(state["totals"]), list(state["greatest"])
        self._num_steps = state["num_steps"]

    @torch.no_grad()
    def _note(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        groups = optimizer.param_groups
        self._totals += [0.0] * (len(groups) - len(self._totals))
        # A sum, and not in place: the rate may be a tensor that the schedule writes to.
        self._totals = [total + group["lr"] for total, group in zip(self._totals, groups, strict=True)]
        self._num_steps += 1

    def _rates(self, start: int) -> list[float]:
        """The mean rate over the interval's steps of the layers from ``start`` on."""
        means = [float(total) / self._num_steps for total in self._totals]
        # There may be groups that were added since the last step.
        pairs = zip(self._optimizer.param_groups, means, strict=False)
        rate_of = {id(parameter): mean for group, mean in pairs for parameter in group["params"]}
        rates = []
        for layer in self._layers[start:]:
            held = [(rate_of[id(p)], p.numel()) for p in layer.parameters() if id(p) in rate_of]
            # What holds no parameter of its own is made of others', whose rates are among all.
            held = held or [(mean, 1) for mean in means]
            rates.append(sum(mean * size for mean, size in held) / max(1, sum(size for _, size in held)))
        return rates


class GradChange(Measure):
    """``grad_change``: how the norm of the gradients' sum over an interval compares with the interval before.

    In a replaced unit these are the gradients of what it learns itself; its sources have scores of their own. The sums
    take as much memory as the gradients.
    """

    def __init__(self, layers: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(layers, optimizer)
        self._parameters = [list(layer.parameters()) for layer in self._layers]
        self._watched = _each_once(self._parameters)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._norms: list[float | None] = [None] * len(self._layers)
        _hook(optimizer, "register_step_pre_hook", self._note, "grad_change")

    def scores(self, start: int) -> list[float | None]:
        """See `Measure`."""
        norms = self._read_norms(start)
        before, self._norms[start:] = self._norms[start:], norms
        self._sums.clear()
        # Out of nothing (a layer that was frozen until now) comes no change that could be told from others.
        return [
            None if old is None or old == 0 < now else gradient_change(now, old)
            for now, old in zip(norms, before, strict=True)
        ]

    def forget(self, end: int) -> None:
        """See `Measure`."""
        self._parameters[:end] = [[] for _ in range(end)]
        self._watched = _each_once(self._parameters)
        self._sums = {parameter: self._sums[parameter] for parameter in self._watched if parameter in self._sums}

    def state_dict(self) -> dict[str, Any]:
        """See `Measure`."""
        sums = [
            [self._sums[p].to("cpu", copy=True) if p in self._sums else None for p in parameters]
            for parameters in self._parameters
        ]
        return {"norms": list(self._norms), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Measure`."""
        self._norms = list(state["norms"])
        pairs = zip(self._parameters, state["sums"], strict=True)
        self._sums = {
            parameter: total.to(parameter.device, copy=True)
            for parameters, totals in pairs
            for parameter, total in zip(parameters, totals, strict=True)
            if total is not None
        }

    def _note(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the gradients of a step that is about to be taken; where a closure makes them in it, behind that."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add(optimizer)
            return None

        def noted() -> Any:
            loss = closure()
            self._add(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": noted}
        return (args[0], noted, *args[2:]), kwargs

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer) -> None:
        learning = [parameter for parameter in self._watched if parameter.grad is not None]
        for parameter in learning:
            if parameter not in self._sums:
                # Of a width in which hundreds of small steps still add up.
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self._sums[parameter] = torch.zeros_like(parameter, dtype=dtype)
        if learning:
            gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
            # One kernel for all of them.
            torch._foreach_add_([self._sums[p] for p in learning], _unscaled(gradients, optimizer))

    def _read_norms(self, start: int) -> list[float]:
        norms = [
            [self._sums[parameter].norm() for parameter in parameters if parameter in self._sums]
            for parameters in self._parameters[start:]
        ]
        flat = [norm for of_layer in norms for norm in of_layer]
        values = iter(torch.stack([norm.float().to(flat[0].device) for norm in flat]).tolist() if flat else [])
        return [math.hypot(*(next(values) for _ in of_layer)) for of_layer in norms]


def measure_for(
    score: str, layers: Sequence[nn.Module], optimizer: torch.optim.Optimizer, tensors_of: TensorsOf
) -> Measure | None:
    """What ``score`` needs to be recorded; None for ``schedule``, which measures nothing.

    Raises:
        ModelError: the optimizer cannot give it.
    """
    if score == "schedule":
        return None
    if score == "grad_change":
        return GradChange(layers, optimizer)
    return (ParamChange if score == "param_change" else ParamChangePerRate)(layers, optimizer, tensors_of)


def _each_once(parameters: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    """Each parameter once, though layers may share it."""
    return list(dict.fromkeys(parameter for of_layer in parameters for parameter in of_layer))


def _unscaled(gradients: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients as a fused optimizer under a ``torch.amp.GradScaler`` will see them: it divides them inside its
    step, and takes none that has infinite ones."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is not None:
        gradients = [gradient / scale.to(gradient.device) for gradient in gradients]
    if found_inf is not None:
        gradients = [torch.where(found_inf.to(gradient.device) > 0, 0.0, gradient) for gradient in gradients]
    return gradients


def _hook(optimizer: torch.optim.Optimizer, method: str, hook: Callable[..., Any], score: str) -> None:
    try:
        getattr(optimizer, method)(hook)
    except AttributeError:  # no such method, or one that is inherited and was never set up, as in some wrappers
        raise ModelError(
            f"learn_drop.score: {score} has to see every step, and {type(optimizer).__name__} takes no step hooks "
            f"(torch.optim.Optimizer.{method}); use param_change, or schedule"
        ) from None
