"""The layers of a replaced unit: layers some of whose tensors are made from those of the same layer in the sources.

A composed layer refers to its source *layers*, not to their tensors, and does not register them: every tensor stands
once in ``parameters()`` and ``state_dict()``, a deep copy refers to the copied sources, and moving the model moves
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rlsearch.replacement.mixings import Mixing
from rlsearch.replacement.operations import ComposedOperation, Convolution, LinearMap, Operation
from rlsearch.replacement.pairs import Pair


class Made(NamedTuple):
    """How one tensor of a layer is made: by which mixing, from which of the two sources, and of how many elements."""

    mixing: Mixing
    uses: tuple[bool, bool]
    num_elements: int


class ComposedLayer(nn.Module):
    """A layer of which some tensors are made from those of its sources. The others are its own.

    Whatever reads such a tensor as an attribute gets the made one, and gradients reach the sources; the kinds below
    that bring their own ``forward`` do not keep it for the backward pass either.
    """

    _sources: tuple[nn.Module, nn.Module]
    _made: dict[str, Made]
    _plain: type[nn.Module]

    def __getattr__(self, name: str) -> Any:
        made = self.__dict__.get("_made", {}).get(name)
        return super().__getattr__(name) if made is None else made.mixing.compose(*self._tensors(name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made on the fly cannot be found by their names.
        return _empty, (self._plain,), self.__dict__

    @property
    def composed_names(self) -> tuple[str, ...]:
        """Which tensors are made."""
        return tuple(self._made)

    @property
    def num_composed(self) -> int:
        """Elements of the made tensors."""
        return sum(made.num_elements for made in self._made.values())

    def _tensors(self, name: str) -> tuple[Any, ...]:
        """What ``compose`` takes for a tensor."""
        mixing, uses, _ = self._made[name]
        sources = [
            cast(Tensor, getattr(source, name)) if used else None
            for source, used in zip(self._sources, uses, strict=True)
        ]
        terms = mixing.terms()
        if not (mixing.learns and mixing.attached):
            sources = [None if tensor is None else tensor.detach() for tensor in sources]
        if not mixing.learns:
            terms = tuple(term.detach() for term in terms)
        return *sources, *terms

    def _run(self, operation: Operation, x: Tensor, weight_name: str = "weight", bias_name: str = "bias") -> Tensor:
        """The operation with this layer's weight and bias, under the autocast that is on."""
        bias: Tensor | None = getattr(self, bias_name)
        dtype = None
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if weight_name not in self._made:
            weight = cast(Tensor, getattr(self, weight_name))
            return operation.forward(x, weight if dtype is None else weight.to(dtype), bias)
        mixing, tensors = self._made[weight_name].mixing, self._tensors(weight_name)
        dtype = dtype or next(tensor.dtype for tensor in tensors if tensor is not None)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            # A compiler decides by itself what it keeps for the backward pass and what it makes again.
            return operation.forward(x, mixing.compose(*tensors).to(dtype), bias)
        return cast(Tensor, ComposedOperation.apply(operation, mixing, dtype, x, bias, *tensors))


class ComposedConv(ComposedLayer, nn.modules.conv._ConvNd):
    """A convolution with made tensors, as ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) or (C, …)."""
        if x.dim() == len(self.stride) + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # The cases that the convolution itself cannot pad.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(self.stride)
        return self._run(Convolution(self.stride, padding, self.dilation, self.groups), x)


class ComposedConv1d(ComposedConv, nn.Conv1d):
    """An ``nn.Conv1d`` with made tensors."""


class ComposedConv2d(ComposedConv, nn.Conv2d):
    """An ``nn.Conv2d`` with made tensors."""


class ComposedConv3d(ComposedConv, nn.Conv3d):
    """An ``nn.Conv3d`` with made tensors."""


class ComposedLinear(ComposedLayer, nn.Linear):
    """An ``nn.Linear`` with made tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: (…, in) to (…, out)."""
        return self._run(LinearMap(), x)


# As `nn.MultiheadAttention` takes them after query, key and value.
_ATTENTION_ARGUMENTS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


class ComposedMultiheadAttention(ComposedLayer, nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` with made tensors."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``. Only self-attention that is asked for no weights and has no padding mask is
        computed here, without keeping what is made; all else there."""
        given = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        simple = (
            query is key is value
            and query.dim() == 3
            and (given.get("attn_mask") is not None or not given.get("is_causal", False))
            and not given.get("need_weights", True)
            and given.get("key_padding_mask") is None
            and self._qkv_same_embed_dim
            and self.bias_k is None
            and not self.add_zero_attn
        )
        if not simple:
            output, weights = super().forward(query, key, value, *args, **kwargs)
            return output, weights
        return self._self_attention(query, given.get("attn_mask")), None

    def _self_attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, length, embed), or (length, batch, embed) without ``batch_first``, to the same."""
        x = x if self.batch_first else x.transpose(0, 1)
        batch, length, width = x.shape
        qkv = self._run(LinearMap(), x, "in_proj_weight", "in_proj_bias")
        query, key, value = qkv.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if mask is not None:
            # There a true element hides a key, here it shows one.
            mask = ~mask if mask.dtype == torch.bool else mask.to(query.dtype)
            mask = mask.view(batch, self.num_heads, length, length) if mask.dim() == 3 else mask
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        output: Tensor = self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
        return output if self.batch_first else output.transpose(0, 1)


# The kinds that rebuild what they make. Subclasses may compute something else with their weight: see `composed_class`.
_COMPOSED: Mapping[type[nn.Module], type[ComposedLayer]] = {
    nn.Conv1d: ComposedConv1d,
    nn.Conv2d: ComposedConv2d,
    nn.Conv3d: ComposedConv3d,
    nn.Linear: ComposedLinear,
    NonDynamicallyQuantizableLinear: ComposedLinear,
    nn.MultiheadAttention: ComposedMultiheadAttention,
}


_GENERIC: dict[type[nn.Module], type[ComposedLayer]] = {}


def composed_class(plain: type[nn.Module]) -> type[ComposedLayer]:
    """The composed kind of a layer; for one that is not known, its own class, which reads the made tensors."""
    if plain in _COMPOSED:
        return _COMPOSED[plain]
    if plain not in _GENERIC:
        _GENERIC[plain] = type(f"Composed{plain.__name__}", (ComposedLayer, plain), {})
    return _GENERIC[plain]


def _empty(plain: type[nn.Module]) -> ComposedLayer:
    """A composed layer to be filled by unpickling or copying."""
    kind = composed_class(plain)
    return kind.__new__(kind)


def become_composed(layer: nn.Module, sources: tuple[nn.Module, nn.Module], made: Mapping[str, Made]) -> None:
    """Turns a plain layer into its composed kind, in place, so that its settings and hooks stay; its own tensors of the
    names in ``made`` are given up."""
    plain = type(layer)
    layer.__class__ = composed_class(plain)
    composed = cast(ComposedLayer, layer)
    composed._plain = plain
    composed._sources = sources
    composed._made = dict(made)
    for name, (mixing, *_) in made.items():
        del composed._parameters[name]
        # What learns nothing of its own, since another tensor's mixing holds it all, leaves no trace in the model.
        if any(True for _ in mixing.children()) or any(True for _ in mixing.parameters()):
            composed.add_module(f"{name}_mixing", mixing)


def become_plain(layer: ComposedLayer) -> None:
    """Turns a composed layer into the plain one that computes the same, in place; its tensors become its own."""
    tensors = {name: getattr(layer, name).detach().clone() for name in layer.composed_names}
    kept = dict(layer._parameters)
    order = _parameter_order(layer._plain, kept, layer._sources[0])
    for name in tensors:
        layer._modules.pop(f"{name}_mixing", None)
    layer.__class__ = layer._plain  # type: ignore[assignment]
    del layer._sources, layer._made, layer._plain
    # All anew, because their order is that of the state_dict.
    layer._parameters.clear()
    for name in order:
        layer.register_parameter(name, nn.Parameter(tensors[name]) if name in tensors else kept[name])


def _parameter_order(plain: type[nn.Module], kept: Mapping[str, Any], source: nn.Module) -> Sequence[str]:
    """The names of a layer's parameters in the order of its source, which is of the same class and untouched."""
    assert type(source) is plain, "a source owns its parameters"
    return [*source._parameters, *(name for name in kept if name not in source._parameters)]


def composed_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters that a module computes with, without gradient: made ones in the place of what makes them.

    For a module that holds no replaced unit these are its ``parameters()``.
    """
    found: dict[Tensor, Tensor] = {}
    learned_by_blocks = mixing_modules(module)
    for part in module.modules():
        if part in learned_by_blocks:
            continue
        if isinstance(part, ComposedLayer):
            made = [getattr(part, name).detach() for name in part.composed_names]
            found.update((tensor, tensor) for tensor in made)
        found.update((parameter, parameter.detach()) for parameter in part.parameters(recurse=False))
    return list(found.values())


def mixing_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that hold what its blocks learn, and not what its layers compute with."""
    return {part for module in model.modules() if isinstance(module, Mixing) for part in module.modules()}


def mixing_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The a and b of all blocks: they weigh sources, so that weight decay would pull the units towards zero."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, Pair)
        for parameter in module.parameters(recurse=False)
    ]
