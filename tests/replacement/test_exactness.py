"""Every block against a reference that shares no code with it, in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_reference import (
    LEARNING,
    SOURCED,
    all_gradients,
    assert_equal,
    fixed_direction,
    learned_terms,
    made_tensors,
    policy_for,
    replace_in,
    run_reference,
    small,
    small_net,
)
from torch import Tensor, nn

from rlsearch.replacement import materialize

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{block: (block, small(block)) for block in SOURCED},
    "scalar, a pair a tensor": ("scalar", {"pair": "tensor"}),
    "angle, a pair a tensor": ("angle", {"pair": "tensor"}),
    "coupled, a pair a tensor": ("coupled", {"pair": "tensor"}),
    "lowrank of rank 2": ("lowrank", {"rank": 2}),
    "constant, attached": ("constant", {"neighbours": "attached"}),
    **{f"{block}, detached": (block, small(block, neighbours="detached")) for block in LEARNING},
    "scalar, norms borrowed": ("scalar", {"norms": "borrowed"}),
    "channel, norms borrowed": ("channel", {"norms": "borrowed"}),
    "lowrank, norms borrowed": ("lowrank", {"norms": "borrowed", "rank": 1}),
    "project, norms borrowed": ("project", {"norms": "borrowed", "rank": 1}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["conv", "encoder"])
@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_all_gradients_are_those_of_the_formula(name: str, kind: str, training: bool) -> None:
    block, options = VARIANTS[name]
    untouched, x = small_net(kind)
    untouched, x = untouched.double().train(training), x.double()
    model, report = replace_in(untouched, policy_for("chain.1", block, options), x)
    attached = options.get("neighbours", "detached" if block == "constant" else "attached") == "attached"
    expected = run_reference(untouched, model, report, block, x, attached)
    assert_equal(all_gradients(model, x), expected)
    new = set(expected[1]) - set(untouched.state_dict()) - {"x"}
    assert bool(new) == (block != "constant")
    # A batch norm in training takes away the bias before it.
    assert training or all(expected[1][term].abs().max() > 1e-6 for term in new)


ROLES = [
    ("conv", "chain.1.conv1"),
    ("conv", "chain.1.conv2"),
    ("encoder", "chain.1.attention"),
    ("encoder", "chain.1.mlp"),
]


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize(("kind", "role"), ROLES, ids=[role for _, role in ROLES])
def test_a_role_alone_is_made_as_exactly(kind: str, role: str, block: str) -> None:
    untouched, x = small_net(kind)
    untouched, x = untouched.double().eval(), x.double()
    model, report = replace_in(untouched, policy_for(role, block, small(block)), x)
    assert report.replaced[0].unit == role
    assert_equal(all_gradients(model, x), run_reference(untouched, model, report, block, x, block != "constant"))


INSIDE = {
    "conv": {"conv1.weight", "conv1.bias", "conv2.weight"},
    "encoder": {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight"},
}
"""The tensors whose shapes follow from the width inside a unit."""

BOUNDARIES = [
    *itertools.product(("keep", "one_sided", "project"), ((4, 4, 6), (3, 4, 4))),
    *itertools.product(("keep", "project"), [(6, 4, 3)]),
]


@pytest.mark.parametrize(("boundary", "widths"), BOUNDARIES, ids=str)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
@pytest.mark.parametrize("block", SOURCED)
def test_boundaries_are_as_exact(block: str, boundary: str, kind: str, widths: tuple[int, ...]) -> None:
    untouched, x = small_net(kind, widths=tuple(4 * width for width in widths) if kind == "encoder" else widths)
    untouched, x = untouched.double().eval(), x.double()
    options = small(block, boundary=boundary) | ({"boundary_rank": 1} if boundary == "project" else {})
    model, report = replace_in(untouched, policy_for("chain.1", block, options), x)
    made, kept = set(report.replaced[0].composed), set(report.replaced[0].kept)
    assert INSIDE[kind] & (kept if boundary == "keep" and block != "project" else made) == INSIDE[kind]
    expected = run_reference(untouched, model, report, block, x, block != "constant", boundary)
    assert_equal(all_gradients(model, x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_a_single_operator_is_as_exact(kind: str, block: str, training: bool) -> None:
    """relu(x + bn1(conv1(x))), or x + out_proj(norm1(x)), with the layer's tensors made."""
    untouched, x = small_net(kind)
    untouched, x = untouched.double().train(training), x.double()
    model, report = replace_in(untouched, policy_for("chain.1", block, small(block, operator="single")), x)
    layer, norm = ("conv1", "bn1") if kind == "conv" else ("attention.out_proj", "norm1")
    assert report.replaced[0].composed == (f"{layer}.weight", f"{layer}.bias")
    assert report.replaced[0].kept == (f"{norm}.weight", f"{norm}.bias")
    unit = model.chain[1]
    terms = {f"chain.1.{name}": tensor for name, tensor in [*unit.named_parameters(), *unit.named_buffers()]}
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    terms = {name: leaves.get(name, tensor.detach()) for name, tensor in terms.items()}
    own = untouched.chain[1].get_submodule(layer)
    made = {}
    for name in ("weight", "bias"):
        sources = [leaves[f"chain.{index}.{layer}.{name}"] for index in (0, 2)]
        sources = [source.detach() if block == "constant" else source for source in sources]
        place = ("chain.1", "layer", name)
        made[name] = made_tensors(getattr(own, name).shape, *sources, block, terms, place, block == "project")
    plain = _Single(own, untouched.chain[1].get_submodule(norm), norm_first=kind == "encoder")
    reference = copy.deepcopy(untouched)
    reference.chain[1] = plain
    affine = {f"chain.1.norm.{name}": terms[f"chain.1.norm.{name}"] for name in ("weight", "bias")}
    kept = {name: leaf for name, leaf in leaves.items() if not name.startswith("chain.1.")}
    tensors = kept | affine | {f"chain.1.layer.{name}": tensor for name, tensor in made.items()}
    x = x.detach().clone().requires_grad_()
    out = torch.func.functional_call(reference, tensors, (x,))
    found = torch.autograd.grad(out, [*leaves.values(), x], fixed_direction(out), allow_unused=True)
    assert_equal(all_gradients(model, x), (out, dict(zip([*leaves, "x"], found, strict=True))))
    torch.testing.assert_close(materialize(model).eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)


class _Single(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module, norm_first: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.norm_first = layer, norm, norm_first

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            out: Tensor = x + self.layer(self.norm(x))
            return out
        return F.relu(x + self.norm(self.layer(x)))


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["convolution", "grouped", "linear", "attention"])
def test_gradcheck(kind: str, block: str) -> None:
    torch.manual_seed(0)
    # The maps of a smaller square matrix would be larger than it.
    width = 10 if block == "project" else 4
    make = {
        "convolution": lambda: nn.Conv2d(3, 3, 2),
        "grouped": lambda: nn.Conv2d(4, 4, 2, groups=2, bias=False),
        "linear": lambda: nn.Linear(width, width),
        "attention": lambda: Attention(width),
    }[kind]
    shapes = {"convolution": (2, 3, 5, 4), "grouped": (1, 4, 5, 4), "linear": (3, width), "attention": (1, 3, width)}
    x = torch.randn(shapes[kind], dtype=torch.float64)
    untouched = nn.Sequential(*(make() for _ in range(3))).double()
    options = small(block, neighbours="attached", boundary="keep")
    model, _ = replace_in(untouched, policy_for("1", block, options), x)
    names = [name for name, _ in model.named_parameters()]
    tensors = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(run, [x.requires_grad_(), *tensors], fast_mode=width == 10)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


ATTENTION_CALLS: dict[str, dict[str, Any]] = {
    "with weights": {"need_weights": True},
    "with weights of each head": {"need_weights": True, "average_attn_weights": False},
    "causal": {
        "need_weights": False,
        "is_causal": True,
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
    },
    "of a mask": {"need_weights": False, "attn_mask": torch.eye(5, dtype=torch.bool)},
    "of padding": {"need_weights": False, "key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
    "cross": {"need_weights": False},
    "of other values": {"need_weights": False},
}


class Calls(nn.Module):
    """Attention that is called as it is told."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **({"batch_first": True} | settings))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        key = x.flip(1) if self.name == "cross" else x
        value = 2 * x if self.name == "of other values" else key
        out, weights = self.attention(x, key, value, **ATTENTION_CALLS.get(self.name, {"need_weights": False}))
        return out if weights is None else out + weights.sum()


@pytest.mark.parametrize("block", ["scalar", "lowrank", "constant"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", [*ATTENTION_CALLS, "sequence first", "no bias", "own key and value sizes", "added bias", "added zeros"]
)
def test_attention_however_it_is_called(name: str, training: bool, block: str) -> None:
    settings = {
        "sequence first": {"batch_first": False},
        "no bias": {"bias": False},
        "own key and value sizes": {"kdim": 8, "vdim": 8},
        "added bias": {"add_bias_kv": True},
        "added zeros": {"add_zero_attn": True},
    }.get(name, {})
    torch.manual_seed(0)
    untouched = nn.Sequential(*(Calls(name, **settings) for _ in range(3))).double().train(training)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    model, report = replace_in(untouched, policy_for("1", block, small(block)), x)
    expected = run_reference(untouched, model, report, block, x, block != "constant")
    assert_equal(all_gradients(model, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_detached_neighbours_get_no_gradient_through_the_unit(kind: str, block: str) -> None:
    untouched, x = small_net(kind)
    features = untouched.stem(x).detach().requires_grad_()
    for neighbours in ("detached", "attached"):
        model, report = replace_in(untouched, policy_for("chain.1", block, small(block, neighbours=neighbours)), x)
        model.chain[1](features).square().sum().backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        sources = {name for name in reached if name.startswith(("chain.0.", "chain.2."))}
        expected = {f"chain.{i}.{tensor}" for i in (0, 2) for tensor in report.replaced[0].composed}
        assert sources == (expected if neighbours == "attached" else set())
        assert reached - sources == {name for name, _ in model.named_parameters() if name.startswith("chain.1.")}


@pytest.mark.parametrize("block", ["scalar", "channel"])
def test_batch_norm_behind_it_leaves_a_and_b_one_degree_of_freedom(block: str) -> None:
    """METHODS: with batch norm in train mode behind the layer, a da + b db = 0."""
    torch.manual_seed(0)
    untouched = nn.Sequential(*(Bare() for _ in range(3))).double()
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    model, _ = replace_in(untouched, policy_for("1", block, {"boundary": "keep"}), x)
    a, b = learned_terms(model, untouched)
    for training in (True, False):
        grad_a, grad_b = torch.autograd.grad((model.train(training)(x) * fixed_direction(x)).sum(), [a, b])
        assert (a * grad_a).abs().min() > 1e-3
        identity = a * grad_a + b * grad_b
        assert bool(identity.abs().max() < 1e-10) is training


class Bare(nn.Module):
    """A convolution and a batch norm that divides by the variance and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-300)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))
