"""Which modules of a model run, in which order, and on what shapes: one forward pass that allocates nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.model_graph import example_shape, fake_copy, input_hint


@dataclass(frozen=True)
class Call:
    """The first time that a module ran.

    Attributes:
        order: how many other modules had started before it.
        input_shape: of its input without the batch; None if that is not one single tensor.
        output_shape: of its output without the batch; None if that is neither a tensor nor a tensor with Nones.
    """

    order: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


def record_calls(model: nn.Module, example_input: Tensor | None) -> dict[str, Call]:
    """The first call of every submodule that runs, by name; "" is the model itself.

    A module that is registered in two places is known under its first name alone.

    Args:
        model: it is neither changed nor really run.
        example_input: see `rlsearch.find_units`.

    Raises:
        ModelError: the model cannot be run on the input, or no input can be guessed.
    """
    if example_input is None:
        shape = example_shape(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    else:
        shape, dtype = tuple(example_input.shape), example_input.dtype
    mode, fake = fake_copy(model)
    fake.eval()
    calls = _watch(fake)
    try:
        with mode, torch.no_grad():
            fake(torch.empty(shape, dtype=dtype))
    except Exception as error:  # the model's own forward runs, which may fail in any way
        given = f"an input of shape {shape}" + ("" if dtype.is_floating_point else f" and type {dtype}")
        raise ModelError(f"{type(model).__name__} cannot be run on {given}: {error}; {input_hint(model)}") from error
    return calls


def _watch(model: nn.Module) -> dict[str, Call]:
    """What the model's hooks will fill while it runs."""
    started: dict[str, int] = {}
    calls: dict[str, Call] = {}

    def watch(name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _args: Any) -> None:
            started.setdefault(name, len(started))

        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if name not in calls:
                calls[name] = Call(started[name], _input_shape(args, kwargs), _output_shape(output))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, with_kwargs=True)

    for name, module in model.named_modules():
        watch(name, module)
    return calls


def _input_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Self-attention takes one tensor three times: that is one input; keywords that are no tensors are settings."""
    if not args or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    first = args[0]
    return _shape(first) if all(value is first for value in args) else None


def _output_shape(output: Any) -> tuple[int, ...] | None:
    """``nn.MultiheadAttention`` gives its output and None in place of the attention weights."""
    if isinstance(output, tuple) and output and all(_is_nothing(value) for value in output[1:]):
        return _shape(output[0])
    return _shape(output)


def _is_nothing(value: Any) -> bool:
    """None; the fused attention that torch chooses for evaluation gives an empty fake tensor where it would be None."""
    return value is None or (isinstance(value, Tensor) and value.numel() == 0)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else None
