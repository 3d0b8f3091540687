"""What replaced models go through besides training: states and files, copies, formats, precisions, compilers."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from block_reference import (
    LAZY,
    LEARNING,
    SOURCED,
    all_gradients,
    assert_equal,
    file_of,
    learned_terms,
    passes_that_learn,
    policy_for,
    replace_in,
    small,
    small_net,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsearch.replacement import apply_policy, materialize


@pytest.mark.parametrize("block", LAZY)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_lazy_terms_learn_in_every_mth_training_pass(kind: str, block: str) -> None:
    untouched, x = small_net(kind)
    policy = policy_for("chain.1", block, {"update_every": 3})
    model, _ = replace_in(untouched, policy, x)
    assert passes_that_learn(model, untouched, x, 5) == [True, False, False, True, False]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model.eval()(x)
    model.train()
    other, _ = replace_in(untouched, policy, x, seed=2)
    other.load_state_dict(torch.load(file_of(model), weights_only=True), strict=True)
    for one in (model, other, copy.deepcopy(model)):
        assert passes_that_learn(one, untouched, x, 3) == [False, True, False]


@pytest.mark.parametrize("block", LAZY)
def test_every_pass_of_a_lazy_unit_is_exact_in_its_input(block: str) -> None:
    untouched, x = small_net("conv")
    untouched, x = untouched.double(), x.double()
    eager, _ = replace_in(untouched, policy_for("chain.1", block), x)
    lazy, _ = replace_in(untouched, policy_for("chain.1", block, {"update_every": 2}), x)
    expected = all_gradients(eager, x)
    assert_equal(all_gradients(lazy, x), expected)
    out, found = all_gradients(lazy, x)
    torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)
    for name in ("x", "stem.weight", "chain.0.bn1.weight", "chain.1.bn1.weight"):
        torch.testing.assert_close(found[name], expected[1][name], rtol=1e-10, atol=1e-10)
    assert not any(grad is not None and grad.any() for name, grad in found.items() if ".pair." in name)


@pytest.mark.parametrize("block", LAZY)
def test_lazy_units_under_activation_checkpointing(block: str) -> None:
    """The recomputed pass is no pass of its own."""
    untouched, x = small_net("conv")
    model, _ = replace_in(untouched, policy_for("chain.1", block, {"update_every": 2}), x)
    pattern = []
    for _ in range(4):
        model.zero_grad()
        features = model.stem(x).detach().requires_grad_()
        torch.utils.checkpoint.checkpoint(model.chain[1], features, use_reentrant=False).square().sum().backward()
        pattern.append(any(term.grad is not None and bool(term.grad.any()) for term in learned_terms(model, untouched)))
    assert pattern == [True, False, True, False]


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_every_storage_is_there_once(kind: str, block: str, tmp_path: Path) -> None:
    untouched, x = small_net(kind)
    model, report = replace_in(untouched, policy_for("chain.1", block, small(block)), x)
    parameters = list(model.parameters())
    assert len({tensor.untyped_storage().data_ptr() for tensor in parameters}) == len(parameters)
    assert sum(parameter.numel() for parameter in parameters) == report.params_after
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted({id(parameter) for parameter in parameters})
    state = model.state_dict()
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors) == len(state)
    made = {f"chain.1.{name}" for name in report.replaced[0].composed}
    assert made
    assert not made & set(state)
    assert set(untouched.state_dict()) - made == {key for key in state if key in untouched.state_dict()}


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_a_saved_state_loads_into_a_newly_replaced_model(kind: str, block: str, tmp_path: Path) -> None:
    untouched, x = small_net(kind)
    policy = policy_for("chain.1", block, small(block, init="previous", boundary="keep"))
    model, _ = replace_in(untouched, policy, x)
    model(x)
    expected = model.eval()(x)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for state in (torch.load(file_of(model), weights_only=True), load_file(tmp_path / "model.safetensors")):
        other, _ = small_net(kind, seed=5)
        apply_policy(other, policy, x)
        assert not torch.equal(other.eval()(x), expected)
        other.load_state_dict(state, strict=True)
        assert torch.equal(other.eval()(x), expected)


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_a_deep_copy_has_sources_of_its_own(kind: str, block: str) -> None:
    untouched, x = small_net(kind)
    model, report = replace_in(untouched, policy_for("chain.1", block, small(block)), x)
    model.eval()
    expected = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), expected)
    assert not {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in other.parameters()}
    features = torch.randn_like(model.stem(x))
    before = other.chain[1](features)
    tensor = report.replaced[0].composed[-1]
    with torch.no_grad():
        for index in (0, 2):
            other.get_parameter(f"chain.{index}.{tensor}").add_(1.0 + index)
    assert not torch.allclose(other.chain[1](features), before)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.chain[1](features), before)


@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_a_whole_model_can_be_pickled(kind: str) -> None:
    """As torch.save of a model and processes that are handed one do."""
    untouched, x = small_net(kind)
    model, _ = replace_in(untouched, policy_for("chain.1", "scalar", {"update_every": 2}), x)
    other = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("block", SOURCED)
def test_channels_last_in_and_out(block: str) -> None:
    untouched, x = small_net("conv")
    untouched, x = untouched.double(), x.double()
    model, _ = replace_in(untouched, policy_for("chain.1", block, small(block)), x)
    expected = all_gradients(model, x)
    model.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    found = all_gradients(model, last)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    unit = model.chain[1](model.stem(last))
    assert unit.is_contiguous(memory_format=torch.channels_last)
    grad = found[1]["chain.0.conv2.weight"]
    assert grad is not None
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert_equal(found, expected)


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_autocast_is_as_near_as_a_dense_layer_with_the_same_weight(kind: str, block: str) -> None:
    untouched, x = small_net(kind)
    model, _ = replace_in(untouched, policy_for("chain.1", block, small(block, neighbours="detached")), x)
    model.eval()
    dense = materialize(model)
    source = "chain.2.conv1.weight" if kind == "conv" else "chain.2.mlp.0.weight"
    results = []
    for one, enabled in ((dense, False), (dense, True), (model, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = one(x)
            features = one.chain[1](one.stem(x))
        wanted = [one.get_parameter(name) for name in ("stem.weight", source)]
        results.append([out, features, *torch.autograd.grad(out.float().square().mean(), wanted)])
    for exact, plain, made in zip(*results, strict=True):
        assert plain.dtype == made.dtype
        error = (plain - exact).norm()
        assert error > 0
        assert (made - exact).norm() <= 3 * error


def test_terms_get_their_gradients_in_full_precision_under_autocast() -> None:
    for block in LEARNING:
        untouched, x = small_net("conv")
        model, _ = replace_in(untouched, policy_for("chain.1", block, small(block)), x)
        expected = torch.autograd.grad(model.eval()(x).square().mean(), learned_terms(model, untouched))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        found = torch.autograd.grad(out.float().square().mean(), learned_terms(model, untouched))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.05 * other.abs().max().item() + 1e-3)


def _compiled_and_not(backend: str, kind: str, block: str) -> tuple[Any, Any]:
    """Output and gradients of a replaced model, compiled as one graph and as it is."""
    torch._dynamo.reset()
    untouched, x = small_net(kind)
    model, _ = replace_in(untouched, policy_for("chain.1", block, small(block)), x)
    return all_gradients(torch.compile(model, backend=backend, fullgraph=True), x), all_gradients(model, x)


# A learned term is a float32 sum over many products, which a compiler may order otherwise.
_COMPILER_TOLERANCE = 2e-3


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_compiles_as_one_graph(kind: str, block: str) -> None:
    compiled, plain = _compiled_and_not("aot_eager", kind, block)
    assert_equal(compiled, plain, close=_COMPILER_TOLERANCE)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiles_with_inductor() -> None:
    compiled, plain = _compiled_and_not("inductor", "conv", "scalar")
    assert_equal(compiled, plain, close=_COMPILER_TOLERANCE)


@pytest.mark.parametrize("block", SOURCED)
@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_materialised_it_loads_into_the_untouched_architecture(kind: str, block: str) -> None:
    untouched, x = small_net(kind)
    options = small(block, norms="borrowed")
    model, _ = replace_in(untouched, policy_for("chain.1", block, options), x)
    model(x)
    plain = materialize(model)
    assert [type(module) for module in plain.modules()] == [type(module) for module in untouched.modules()]
    assert list(plain.state_dict()) == list(untouched.state_dict())
    other, _ = small_net(kind, seed=9)
    other.load_state_dict(plain.state_dict(), strict=True)
    expected = model.eval()(x)
    for one in (plain, other):
        torch.testing.assert_close(one.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in plain.parameters())
