"""Composed layers compute what a plain layer with the made weight computes, with the same gradients, and keep no W."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlsearch.policy import Policy
from rlsearch.replacement import apply_policy, composed_parameters, find_units, mixing_parameters
from rlsearch.replacement.layers import ComposedConv2d, ComposedLinear

BLOCKS = ["scalar", "channel", "lowrank"]
CONVOLUTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "stride": {"stride": 2, "padding": 0},
    "dilation": {"dilation": (2, 1), "padding": (2, 1)},
    "groups": {"groups": 4},
    "depthwise": {"groups": 8},
    "same": {"padding": "same", "kernel_size": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding_mode": "reflect", "bias": True},
    "circular": {"padding_mode": "circular", "padding": (1, 2)},
}


def _convolution(**settings: object) -> nn.Conv2d:
    return nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, "bias": False} | settings)  # type: ignore[arg-type]


def _composed(chain_net: type, layers: Sequence[nn.Module], policy: Policy, example: Tensor) -> nn.Module:
    """The layers as a chain with the middle one replaced, at a random point of what the block learns."""
    model: nn.Module = chain_net(*layers).double()
    apply_policy(model, policy, example)
    with torch.no_grad():
        for parameter in model.get_submodule("chain.1").parameters():
            parameter.normal_()
    return model


def _gradients(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]


def _plain_middle(model: nn.Module, x: Tensor) -> Tensor:
    """The same chain in plain autograd: the middle layer as a function of the made weight and bias."""
    first, layer, last = model.chain
    x, weight, bias = first(x), layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        return last(F.linear(x, weight, bias))
    plain = _convolution(kernel_size=layer.kernel_size, padding=layer.padding, padding_mode=layer.padding_mode)
    plain.stride, plain.dilation, plain.groups = layer.stride, layer.dilation, layer.groups
    return last(plain._conv_forward(x, weight, bias))


# torch warns of a padded copy for "same" with even kernels; the layer under test makes the same copy.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_agree_with_plain_autograd(chain_net, policy_of, name: str, block: str) -> None:
    torch.manual_seed(0)
    options = {"rank": 1} if block == "lowrank" else {}
    layers = [_convolution(**CONVOLUTIONS[name]) for _ in range(3)]
    x = torch.randn(2, 8, 17, 15, dtype=torch.float64)
    model = _composed(chain_net, layers, policy_of({"chain.1": (block, options)}), x)
    assert isinstance(model.chain[1], ComposedConv2d)
    for one, other in zip(
        _gradients(model, x, model), _gradients(lambda x: _plain_middle(model, x), x, model), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
def test_linears_agree_with_plain_autograd(chain_net, policy_of, block: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    model = _composed(chain_net, [nn.Linear(12, 12) for _ in range(3)], policy_of({"chain.1": block}), x)
    assert isinstance(model.chain[1], ComposedLinear)
    for one, other in zip(
        _gradients(model, x, model), _gradients(lambda x: _plain_middle(model, x), x, model), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradcheck(chain_net, policy_of, block: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    options = {"rank": 1} if block == "lowrank" else {}
    layers = [_convolution(kernel_size=1, padding=0, bias=True) for _ in range(3)]
    model = _composed(chain_net, layers, policy_of({"chain.1": (block, options)}), x)
    layer = model.chain[1]
    tensors = [x, *(tensor for name in ("weight", "bias") for tensor in layer._tensors(name))]
    # The layer reads its tensors through the modules that own them, where gradcheck perturbs them in place.
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), tensors)


def test_one_image_without_a_batch(chain_net, policy_of) -> None:
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    model = _composed(chain_net, [_convolution() for _ in range(3)], policy_of({"chain.1": "scalar"}), x)
    whole = _gradients(model, x, model)
    for one, other in zip(_gradients(model, x[0], model), whole, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape))


def test_the_gradients_of_the_pair_are_inner_products(chain_net, policy_of) -> None:
    """METHODS: with G = dL/dW, da = <G, P>, db = <G, N>, P gains aG, N gains bG."""
    torch.manual_seed(0)
    model = chain_net(*(nn.Linear(4, 4, bias=False) for _ in range(3))).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    apply_policy(model, policy_of({"chain.1": ("scalar", {"init": "previous"})}), x)
    first, layer, last = model.chain
    made = layer.weight.detach().requires_grad_()
    hidden = first(x).detach()
    (g,) = torch.autograd.grad(F.linear(hidden, made).square().sum(), made)
    a, b = layer.weight_mixing.pair.a, layer.weight_mixing.pair.b
    layer(hidden).square().sum().backward()
    pairs = [(a, (g * first.weight).sum()), (b, (g * last.weight).sum()), (first.weight, g), (last.weight, 0 * g)]
    for parameter, expected in pairs:
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)


def test_only_the_input_is_kept_for_the_backward_pass(chain_net, policy_of) -> None:
    model = chain_net(*(_convolution() for _ in range(3)))
    x = torch.randn(2, 8, 5, 5)
    apply_policy(model, policy_of({"chain.1": "scalar"}), x)
    parameters = {id(parameter) for parameter in model.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model.chain[1](x)
    assert [id(tensor) for tensor in kept if id(tensor) not in parameters] == [id(x)]
    with torch.no_grad():
        assert torch.equal(model.chain[1](x), y)


def test_frozen_sources_and_pairs_get_no_gradient(chain_net, policy_of) -> None:
    model = chain_net(*(_convolution() for _ in range(3)))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    apply_policy(model, policy_of({"chain.1": "scalar"}), x)
    layer = model.chain[1]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is layer.weight_mixing.pair.a)
    layer(x).square().sum().backward()
    assert layer.weight_mixing.pair.a.grad is not None
    assert x.grad is not None
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == [layer.weight_mixing.pair.a]
    layer.weight_mixing.pair.a.requires_grad_(False)
    grad = x.grad.clone()
    x.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("block", BLOCKS)
def test_autocast_agrees_with_plain_autograd_in_bf16(resnet32, policy_of, block: str) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": block}))
    layer = resnet32.layer1[3].conv1
    x = torch.randn(2, 16, 8, 8)
    sources = [resnet32.layer1[index].conv1.weight for index in (2, 4)]
    wanted = [*sources, *resnet32.layer1[3].conv1.weight_mixing.parameters()]
    results = []
    for run in (layer, lambda x: F.conv2d(x, layer.weight, None, 1, 1)):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *wanted])])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_channels_last_stays_channels_last(resnet32, policy_of) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "scalar"}))
    resnet32.to(memory_format=torch.channels_last)
    layer = resnet32.layer1[3].conv1
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    for tensor in (layer.weight, y, x.grad, resnet32.layer1[2].conv1.weight.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(resnet32, policy_of, mode: Callable[[], object]) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "channel", "layer2.2": "lowrank"}))
    resnet32.eval()
    x = torch.randn(2, 3, 32, 32)
    expected = resnet32(x).detach()
    with mode():
        assert torch.equal(resnet32(x), expected)
        assert not resnet32(x).requires_grad


@pytest.mark.parametrize("block", BLOCKS)
def test_compiles_as_one_graph(chain_net, policy_of, block: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    layers = [_convolution(bias=True) for _ in range(3)]
    model = _composed(chain_net, layers, policy_of({"chain.1": block}), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, other in zip(_gradients(compiled, x, model), _gradients(model, x, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_every_tensor_is_registered_once(resnet32, policy_of) -> None:
    policy = policy_of({"layer1.3": "scalar", "layer2.2": "channel", "layer3.3": ("lowrank", {"rank": 2})})
    kept = {key for key in resnet32.state_dict() if not key.startswith(("layer1.3.c", "layer2.2.c", "layer3.3.c"))}
    apply_policy(resnet32, policy)
    layers = ["layer1.3.conv1", "layer2.2.conv1", "layer2.2.conv2", "layer3.3.conv1"]
    pairs = [f"{layer}.weight_mixing.pair" for layer in layers]
    matrices = {f"layer3.3.{conv}.weight_mixing.{name}" for conv in ("conv1", "conv2") for name in "uv"}
    assert set(resnet32.state_dict()) == kept | matrices | {f"{pair}.{name}" for pair in pairs for name in "ab"}
    assert len(list(resnet32.parameters())) == len({id(parameter) for parameter in resnet32.parameters()})
    named = dict(resnet32.named_parameters())
    assert [id(p) for p in mixing_parameters(resnet32)] == [
        id(named[f"{pair}.{name}"]) for pair in pairs for name in "ab"
    ]


def test_a_lowrank_unit_with_biases_registers_its_pair_once(chain_net, policy_of) -> None:
    model = chain_net(*(nn.Linear(16, 16) for _ in range(3)))
    apply_policy(model, policy_of({"chain.1": "lowrank"}), torch.empty(1, 16))
    assert [key for key in model.state_dict() if key.startswith("chain.1")] == [
        "chain.1.weight_mixing.u",
        "chain.1.weight_mixing.v",
        "chain.1.weight_mixing.pair.a",
        "chain.1.weight_mixing.pair.b",
    ]


def test_a_deep_copy_refers_to_its_own_sources(resnet32, policy_of) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "scalar"}))
    other = copy.deepcopy(resnet32)
    with torch.no_grad():
        other.layer1[2].conv1.weight.zero_()
        other.layer1[3].conv1.weight_mixing.pair.b.zero_()
    assert other.layer1[3].conv1.weight.abs().max() == 0
    assert other.layer1[3].conv2.weight.abs().max() > 0
    assert resnet32.layer1[3].conv1.weight.abs().max() > 0
    torch.testing.assert_close(other.layer1[3].conv2.weight, 0.5 * other.layer1[2].conv2.weight)


def test_moving_the_model_moves_the_unit(resnet32, policy_of) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "scalar"}))
    resnet32.double()
    assert resnet32.layer1[3].conv1.weight.dtype == torch.float64
    assert resnet32(torch.zeros(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_a_state_dict_goes_through_a_file_that_holds_tensors_alone(resnet32, policy_of) -> None:
    policy = policy_of({"layer1.3": "scalar", "layer2.2": "channel"})
    other = copy.deepcopy(resnet32)
    apply_policy(resnet32, policy)
    with torch.no_grad():
        resnet32.layer1[3].conv1.weight_mixing.pair.a.fill_(0.25)
    file = io.BytesIO()
    torch.save(resnet32.state_dict(), file)
    file.seek(0)
    apply_policy(other, policy)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), resnet32(x))


def test_composed_parameters_are_those_that_the_unit_computes_with(resnet32, policy_of) -> None:
    plain = composed_parameters(resnet32.layer1[3])
    assert [id(tensor) for tensor in plain] != []
    assert all(torch.equal(a, b) for a, b in zip(plain, resnet32.layer1[3].parameters(), strict=True))
    apply_policy(resnet32, policy_of({"layer1.3": "scalar", "layer2.2": "skip"}))
    unit, before, after = (resnet32.layer1[index] for index in (3, 2, 4))
    found = composed_parameters(unit)
    expected = [
        0.5 * before.conv1.weight + 0.5 * after.conv1.weight,
        unit.bn1.weight,
        unit.bn1.bias,
        0.5 * before.conv2.weight + 0.5 * after.conv2.weight,
        unit.bn2.weight,
        unit.bn2.bias,
    ]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach())
        assert not one.requires_grad
    assert composed_parameters(resnet32.layer2[2]) == []


def test_units_share_no_copy_of_the_replaced_weights(untouched_resnet32, policy_of) -> None:
    """The replaced weights are given up: nothing in the model refers to them."""
    model = copy.deepcopy(untouched_resnet32)
    units = find_units(model)
    apply_policy(model, policy_of({"layer1.3": "scalar"}), units=units)
    held = {id(t) for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)}
    assert held == set()
    assert set(model.layer1[3].conv1._parameters) == {"bias"}
