"""Small nets, and a reference for every block that shares no code with it: the made tensors written out, the untouched
model run with them by `torch.func.functional_call`, gradients by plain autograd."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import apply_policy, find_units

SOURCED = ["constant", "scalar", "angle", "coupled", "channel", "lowrank", "project"]
LEARNING = [block for block in SOURCED if block != "constant"]
LAZY = ["scalar", "angle", "coupled", "channel"]


class Residual(nn.Module):
    """Two convolutions with batch norm and biases around a residual path: (N, C, H, W) to the same."""

    def __init__(self, channels: int = 4, inside: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inside, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(inside, eps=eps)
        self.conv2 = nn.Conv2d(inside, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.tanh(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inside)) + x)


class Encoder(nn.Module):
    """Attention and MLP with their norms, and a scale that no layer knows: (N, T, 12) to the same."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.norm2 = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, 12))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.scale * self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Net(nn.Module):
    """A stem, a chain of three like units, and a head, so that the sources have a gradient of their own too."""

    def __init__(self, stem: nn.Module, units: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.chain = nn.Sequential(*units)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.chain(self.stem(x)))
        return out


def small_net(kind: str, seed: int = 0, widths: Sequence[int] | None = None) -> tuple[nn.Module, Tensor]:
    """A net in float32 with random norms, and an input for it."""
    torch.manual_seed(seed)
    if kind == "conv":
        units = [Residual(4, width) for width in widths or (4, 4, 4)]
        model: nn.Module = Net(nn.Conv2d(3, 4, 1), units, nn.Conv2d(4, 2, 1))
        x = torch.randn(3, 3, 5, 6)
    else:
        blocks = [Encoder(width) for width in widths or (16, 16, 16)]
        model, x = Net(nn.Linear(5, 12), blocks, nn.Linear(12, 3)), torch.randn(2, 6, 5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bn" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "norm1.weight", "norm2.weight")):
                tensor.normal_()
    return model, x


def policy_for(unit: str, block: str, options: Mapping[str, Any] | None = None) -> Policy:
    return Policy(replacements=(Replacement(unit, block, dict(options or {})),))


def small(block: str, **options: Any) -> dict[str, Any]:
    """Options with a rank that is small enough for the nets of this file."""
    return ({"rank": 1} if block in ("lowrank", "project") else {}) | options


def replace_in(model: nn.Module, policy: Policy, x: Tensor, seed: int = 1) -> tuple[nn.Module, Any]:
    """A copy of the model with the policy applied, at a random point of all that it learns, and the report."""
    model = copy.deepcopy(model)
    known = dict(model.named_parameters())
    report = apply_policy(model, policy, x)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in known:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model, report


def find_term(
    terms: Mapping[str, Tensor], place: tuple[str, str, str], ending: str, channels: int | None = None
) -> Tensor:
    """The one term that ends so: of the tensor if it has its own, else (per channel) of its layer, else of the unit."""
    unit, layer, tensor = place
    whole = re.escape(f"{unit}.{layer}" if layer else unit)
    of_tensor, of_layer, of_unit = rf"{whole}\.{tensor}_mixing", rf"{whole}\.\w+_mixing", re.escape(unit)
    places = [(of_tensor, 1), (of_unit, 1)]
    if channels is not None:
        places = [(of_tensor, channels), (of_layer, channels), *places]
    for start, size in places:
        pattern = re.compile(rf"{start}\..*\b{ending}")
        found = [name for name, term in terms.items() if pattern.fullmatch(name) and term.numel() == size]
        if len(found) == 1:
            return terms[found[0]]
    raise AssertionError(f"{place}: no single term {ending} among {sorted(terms)}")


def fixed_map(count: int, size: int, is_input: bool) -> Tensor:
    """E (size, count): the identity, or the channels in turn; of inputs, scaled to keep the variance."""
    made = torch.zeros(size, count, dtype=torch.float64)
    made[torch.arange(size), torch.arange(size) % count] = math.sqrt(count / size) if is_input else 1.0
    return made


def map_source(source: Tensor, shape: Sequence[int], maps: Mapping[str, Tensor]) -> Tensor:
    """(E + U Vᵀ) S (E + U Vᵀ)ᵀ."""
    out = fixed_map(source.shape[0], shape[0], False)
    if "out_u" in maps:
        out = out + maps["out_u"] @ maps["out_v"].T
    made = torch.einsum("os,s...->o...", out, source)
    if len(shape) > 1:
        into = fixed_map(source.shape[1], shape[1], True)
        if "in_u" in maps:
            into = into + maps["in_u"] @ maps["in_v"].T
        made = torch.einsum("is,os...->oi...", into, made)
    return made


def made_tensors(
    own_shape: Sequence[int],
    previous: Tensor | None,
    succeeding: Tensor | None,
    block: str,
    terms: Mapping[str, Tensor],
    place: tuple[str, str, str],
    project: bool,
) -> Tensor:
    """W by its formula; ``place`` is the unit, the layer in it and the tensor's name."""
    channels = own_shape[0] if block == "channel" else None
    if block == "angle":
        a, b = find_term(terms, place, "phi").cos(), find_term(terms, place, "phi").sin()
    elif block == "coupled":
        a, b = find_term(terms, place, "s"), 2 - find_term(terms, place, "s")
    else:
        a, b = find_term(terms, place, "a", channels), find_term(terms, place, "b", channels)
    if a.dim():
        a, b = (term.reshape(-1, *[1] * (len(own_shape) - 1)) for term in (a, b))
    if project:
        start = ".".join(part for part in place if part)
        mapped = []
        for source, name in ((previous, "map_previous"), (succeeding, "map_succeeding")):
            maps = {
                key.rpartition(".")[2]: value
                for key, value in terms.items()
                if key.startswith(f"{start}_") and f".{name}." in key
            }
            mapped.append(None if source is None else map_source(source, own_shape, maps))
        previous, succeeding = mapped
    made = sum((weight * source for weight, source in ((a, previous), (b, succeeding)) if source is not None), 0.0 * a)
    # What lies along one dimension holds no matrix that could be of low rank.
    if block == "lowrank" and math.prod(own_shape) > max(own_shape) and not project:
        start = ".".join(part for part in place if part)
        made = made + (terms[f"{start}_mixing.u"] @ terms[f"{start}_mixing.v"].T).reshape(own_shape)
    return made


def run_reference(
    untouched: nn.Module,
    model: nn.Module,
    report: Any,
    block: str,
    x: Tensor,
    attached: bool = True,
    boundary: str = "strict",
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output of the untouched model with the made tensors, and by name the gradients of all that learns, and of
    ``x``, for a fixed gradient of the output."""
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    terms = {name: tensor for name, tensor in (leaves | buffers).items() if name not in untouched.state_dict()}
    own = {name: tensor for name, tensor in (leaves | buffers).items() if name in untouched.state_dict()}
    shapes = {name: tuple(parameter.shape) for name, parameter in untouched.named_parameters()}
    (replaced,) = report.replaced
    unit = next(unit for unit in find_units(untouched, x) if unit.name == replaced.unit)
    made = {}
    for tensor in replaced.composed:
        layer, _, name = tensor.rpartition(".")
        sources = [own[f"{source}.{tensor}"] for source in unit.sources]
        sources = [source if attached else source.detach() for source in sources]
        fitting: list[Tensor | None] = list(sources)
        if boundary == "one_sided" and block != "project":
            fitting = [source if source.shape == shapes[f"{unit.name}.{tensor}"] else None for source in sources]
        project = block == "project" or (boundary == "project" and len({tuple(s.shape) for s in sources}) > 1)
        place = (unit.name, layer, name)
        made[f"{unit.name}.{tensor}"] = made_tensors(
            shapes[f"{unit.name}.{tensor}"], *fitting, block, terms, place, project
        )
    assert set(made).isdisjoint(own)
    assert set(made) | set(own) == set(untouched.state_dict())
    x = x.detach().clone().requires_grad_()
    out = torch.func.functional_call(untouched, made | own, (x,), strict=True)
    names = [*leaves, "x"]
    found = torch.autograd.grad(out, [*leaves.values(), x], fixed_direction(out), allow_unused=True)
    return out, dict(zip(names, found, strict=True))


def fixed_direction(out: Tensor) -> Tensor:
    return torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))


def all_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output of a model, and the gradients of its parameters by name, and of ``x``."""
    x = x.detach().clone().requires_grad_()
    out = model(x)
    tensors = [*model.parameters(), x]
    found = torch.autograd.grad(out, tensors, fixed_direction(out), allow_unused=True)
    names = [name.removeprefix("_orig_mod.") for name, _ in model.named_parameters()]
    return out, dict(zip([*names, "x"], found, strict=True))


def assert_equal(
    one: tuple[Tensor, dict[str, Tensor | None]], other: tuple[Tensor, dict[str, Tensor | None]], close: float = 1e-10
) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=close, atol=close)
    assert list(one[1]) == list(other[1])
    for name, grad in one[1].items():
        pair = [torch.zeros(()) if tensor is None else tensor for tensor in (grad, other[1][name])]
        first, second = torch.broadcast_tensors(*(tensor.to(one[0].dtype) for tensor in pair))
        # Near zero by the scale of the whole tensor, whose elements are sums of products of that size.
        near = close * max(1.0, second.abs().max().item())
        torch.testing.assert_close(first, second, rtol=close, atol=near, msg=lambda text, name=name: f"{name}: {text}")


def learned_terms(model: nn.Module, untouched: nn.Module) -> list[nn.Parameter]:
    return [tensor for name, tensor in model.named_parameters() if name not in untouched.state_dict()]


def passes_that_learn(model: nn.Module, untouched: nn.Module, x: Tensor, count: int) -> list[bool]:
    """For each training pass whether the terms got a gradient; all of them or none."""
    pattern = []
    for _ in range(count):
        model.zero_grad()
        features = model.stem(x).detach().requires_grad_()
        model.chain[1](features).square().sum().backward()
        assert features.grad is not None
        assert features.grad.abs().max() > 0
        sources = [name for name, parameter in model.named_parameters() if name.startswith(("chain.0", "chain.2"))]
        terms = [term.grad is not None and bool(term.grad.any()) for term in learned_terms(model, untouched)]
        reached = [
            parameter.grad is not None and bool(parameter.grad.any())
            for name, parameter in model.named_parameters()
            if name in sources and ("conv2.weight" in name or "mlp.0.weight" in name)
        ]
        assert len(set(terms)) == len(set(reached)) == 1
        assert terms[0] == reached[0]
        pattern.append(terms[0])
    return pattern


def file_of(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file
