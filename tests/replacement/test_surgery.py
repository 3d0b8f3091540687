"""Policies are checked whole, then applied; what comes out counts, computes and saves as it should."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError, SurgeryError
from rlsearch.model_graph import fake_copy
from rlsearch.policy import ModelSpec, Policy, Replacement
from rlsearch.replacement import (
    BLOCKS,
    ReplacedUnit,
    Unit,
    apply_policy,
    find_units,
    fits,
    learnable_params,
    materialize,
    plan,
    total_params,
)
from rlsearch.replacement.skip import Skip
from rlsearch.training.models import build_model


def _trained_a_little(model: nn.Module) -> nn.Module:
    """Away from every special start: norms with statistics, pairs that differ, V that is not zero."""
    torch.manual_seed(5)
    model.train()
    for _ in range(2):
        loss = model(torch.randn(8, 3, 32, 32)).square().mean()
        for parameter, grad in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            with torch.no_grad():
                parameter.sub_(0.05 * grad / (grad.norm() + 1e-12))
    return model


def test_every_fourth_block_of_resnet32(resnet32, policy_of) -> None:
    """METHODS.md section 1: 443,870 learnable parameters."""
    report = apply_policy(resnet32, policy_of({"layer2.2": "scalar", "layer1.3": "scalar"}))
    norms = ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
    weights = ("conv1.weight", "conv2.weight")
    assert report.replaced == (
        ReplacedUnit("layer1.3", "scalar", 4_672, 64 + 2, ("layer1.2", "layer1.4"), weights, norms),
        ReplacedUnit("layer2.2", "scalar", 18_560, 128 + 2, ("layer2.1", "layer2.3"), weights, norms),
    )
    assert (report.params_before, report.params_after) == (466_906, 443_870)
    assert learnable_params(resnet32) == 443_870
    assert total_params(resnet32) == 466_906


@pytest.mark.parametrize(
    ("block", "learned"),
    [
        ("skip", -2 * 64),
        ("constant", 0),
        ("scalar", 2),
        ("angle", 1),
        ("coupled", 1),
        ("channel", 4 * 32),
        ("lowrank", 2 + 2 * 4 * (32 + 288)),
        ("project", 2 + 2 * 2 * 4 * 4 * 32),
    ],
)
def test_what_each_block_learns(resnet32, policy_of, block: str, learned: int) -> None:
    apply_policy(resnet32, policy_of({"layer2.2": block}))
    assert learnable_params(resnet32) == 466_906 - 2 * 32 * 32 * 9 + learned


def test_keep_leaves_the_tensor_that_does_not_fit(resnet32, policy_of) -> None:
    own = resnet32.layer3[1].conv1.weight
    report = apply_policy(resnet32, policy_of({"layer3.1": ("scalar", {"boundary": "keep"})}))
    assert report.replaced[0].composed == ("conv2.weight",)
    assert report.replaced[0].kept == ("conv1.weight", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
    assert resnet32.layer3[1].conv1.weight is own
    assert learnable_params(resnet32) == 466_906 - 64 * 64 * 9 + 2


def test_one_layer_may_keep_its_weight_and_borrow_its_bias(chain_net, policy_of) -> None:
    model = chain_net(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 3)
    own = model.chain[1].weight
    report = apply_policy(model, policy_of({"chain.1": ("channel", {"boundary": "keep"})}), x)
    assert (report.replaced[0].composed, report.replaced[0].kept) == (("bias",), ("weight",))
    first, layer, last = model.chain
    assert layer.weight is own
    bias = 0.5**0.5 * first.bias + 0.5**0.5 * last.bias
    torch.testing.assert_close(layer(first(x)), nn.functional.linear(first(x), own, bias))
    torch.testing.assert_close(materialize(model)(x), model(x))
    assert list(materialize(model).state_dict()) == [
        f"chain.{i}.{name}" for i in range(3) for name in ("weight", "bias")
    ]


def test_a_skipped_unit_is_the_identity(resnet32, policy_of) -> None:
    resnet32.eval()
    apply_policy(resnet32, policy_of({"layer1.1": "skip", "layer1.2": "skip"}))
    assert not any(module.training for module in resnet32.modules())
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(resnet32.layer1[2](resnet32.layer1[1](x)), x)


def test_norms_keep_their_own_statistics(resnet32, policy_of) -> None:
    norm = resnet32.layer1[3].bn1
    weight, mean = norm.weight, norm.running_mean
    apply_policy(resnet32, policy_of({"layer1.3": "scalar"}))
    replaced = resnet32.layer1[3].bn1
    assert replaced.weight is weight
    assert replaced.running_mean is mean
    _trained_a_little(resnet32)
    means = [resnet32.layer1[index].bn1.running_mean for index in (2, 3, 4)]
    assert not torch.allclose(means[1], 0.5 * means[0] + 0.5 * means[2])


def test_the_old_unit_stays_whole_for_whoever_holds_it(resnet32, policy_of) -> None:
    unit = resnet32.layer1[3].eval()
    x = torch.randn(2, 16, 8, 8)
    before = unit(x)
    apply_policy(resnet32, policy_of({"layer1.3": "scalar"}))
    assert resnet32.layer1[3] is not unit
    assert not resnet32.layer1[3].training
    assert torch.equal(unit(x), before)
    resnet32.set_submodule("layer1.3", unit)
    assert learnable_params(resnet32) == 466_906


def test_a_policy_without_replacements_changes_nothing(resnet32) -> None:
    modules = list(resnet32.modules())
    report = apply_policy(resnet32, Policy())
    assert (report.replaced, report.params_before, report.params_after) == ((), 466_906, 466_906)
    assert list(resnet32.modules()) == modules
    apply_policy(nn.Flatten(), Policy())


def test_every_error_at_once_and_nothing_changed(resnet32) -> None:
    wrong = [
        Replacement("layer1.1", "scalar", {"ini": "half", "boundary": "keeps"}),
        Replacement("layer1.2", "skip"),
        Replacement("layer1.3", "channel"),
        Replacement("layer2.0", "skip"),
        Replacement("layer2.3", "scaler"),
        Replacement("layer3.1", "scalar"),
        Replacement("layer4.1", "scalar"),
        Replacement("layer2.2", "scalar"),
        Replacement("layer2.2", "skip"),
    ]
    modules = list(resnet32.modules())
    which = "which is itself replaced; replace one of the two, or use sources: nearest"
    with pytest.raises(SurgeryError) as caught:
        apply_policy(resnet32, Policy(model=ModelSpec("resnet110"), replacements=tuple(wrong)))
    title, *problems = str(caught.value).split("\n")
    assert title == "policy (made for model 'resnet110'): 9 problems"
    assert sorted(problems) == sorted(
        f"  - {line}"
        for line in [
            "layer2.2: is replaced twice; keep one of the two",
            "layer1.1: unknown option 'ini' of block 'scalar'; did you mean 'init'?",
            "layer1.1: option 'boundary' of block 'scalar' must be one of strict, keep, one_sided, project, got "
            "'keeps'",
            f"layer1.3: borrows from layer1.2, {which}",
            f"layer2.2: borrows from layer2.3, {which}",
            "layer2.0: its input (16, 32, 32) and its output (32, 16, 16) must have one shape for skip",
            "layer2.3: unknown block 'scaler'; did you mean 'scalar'?",
            "layer3.1: conv1.weight is (64, 64, 3, 3), its preceding source layer3.0 has (64, 32, 3, 3); "
            "use boundary: keep",
            "layer4.1: unknown unit; did you mean 'layer3.1'?",
        ]
    )
    assert list(resnet32.modules()) == modules


def test_a_source_must_own_its_parameters(untouched_resnet32, policy_of) -> None:
    with pytest.raises(SurgeryError, match=r"layer1\.2: borrows from layer1\.3, which is itself replaced; replace one"):
        plan(untouched_resnet32, policy_of({"layer1.2": "scalar", "layer1.3": "scalar"}))
    planned = plan(untouched_resnet32, policy_of({"layer1.3": "scalar", "layer1.1": "scalar"}))
    assert [step.unit.name for step in planned.replacements] == ["layer1.1", "layer1.3"]


def test_units_side_by_side_borrow_from_the_nearest_that_own_their_parameters(chain_net, policy_of) -> None:
    model = chain_net(*(nn.Linear(4, 4) for _ in range(7)))
    x = torch.randn(3, 4)
    nearest = ("scalar", {"sources": "nearest", "init": "half"})
    policy = policy_of({"chain.1": nearest, "chain.2": "skip", "chain.3": nearest, "chain.5": nearest})
    report = apply_policy(model, policy, x)
    assert {item.unit: item.sources for item in report.replaced} == {
        "chain.1": ("chain.0", "chain.4"),
        "chain.2": None,
        "chain.3": ("chain.0", "chain.4"),
        "chain.5": ("chain.4", "chain.6"),
    }
    first, one, _, three, four, *_ = model.chain
    for unit in (one, three):
        torch.testing.assert_close(unit.weight, (first.weight + four.weight) / 2)
    torch.testing.assert_close(materialize(model)(x), model(x))


def test_a_role_borrows_from_its_own_role(resnet32, policy_of) -> None:
    own = resnet32.layer2[2].conv1.weight
    report = apply_policy(resnet32, policy_of({"layer2.2.conv2": "scalar"}))
    assert report.replaced[0].sources == ("layer2.1.conv2", "layer2.3.conv2")
    assert resnet32.layer2[2].conv1.weight is own
    expected = (resnet32.layer2[1].conv2.weight + resnet32.layer2[3].conv2.weight) / 2
    torch.testing.assert_close(resnet32.layer2[2].conv2.weight, expected)
    assert report.params_after == 466_906 - 32 * 32 * 9 + 2


def test_a_model_is_replaced_once(resnet32, policy_of) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "skip"}))
    for model in (resnet32, copy.deepcopy(resnet32)):
        with pytest.raises(
            SurgeryError, match="has replaced units already; apply the whole policy to a newly built model"
        ):
            apply_policy(model, policy_of({"layer2.2": "scalar"}))
    apply_policy(materialize(resnet32), policy_of({"layer2.2": "scalar"}))


def test_a_model_without_units_is_refused(chain_net, policy_of) -> None:
    with pytest.raises(ModelError, match="has no unit to replace"):
        apply_policy(chain_net(nn.Linear(4, 4)), policy_of({"chain.0": "skip"}), torch.empty(1, 4))


def _random_policy(model: nn.Module, source: random.Random) -> Policy:
    """Blocks on as many units as can be replaced together."""
    units = find_units(model)
    chosen: list[Replacement] = []
    for unit in source.sample(units, len(units)):
        block = source.choice(list(BLOCKS))
        options = {
            "boundary": source.choice(["strict", "keep", "one_sided", "project"]),
            "init": source.choice(["half", "previous", "fit"]),
        }
        given = options if BLOCKS[block].needs_sources else {}
        replacement = Replacement(unit.name, block, given)
        if fits(model, units, unit.name, block, given) is None and _is_valid(model, units, [*chosen, replacement]):
            chosen.append(replacement)
    return Policy(replacements=tuple(chosen))


def _is_valid(model: nn.Module, units: Sequence[Unit], replacements: Sequence[Replacement]) -> bool:
    try:
        plan(model, Policy(replacements=tuple(replacements)), units)
    except SurgeryError:
        return False
    return True


@pytest.mark.parametrize("seed", range(6))
def test_materialised_models_compute_and_load_as_the_real_one(seed: int) -> None:
    torch.manual_seed(seed)
    untouched = build_model("resnet20")
    policy = _random_policy(untouched, random.Random(seed))
    assert policy.replacements
    model = copy.deepcopy(untouched)
    report = apply_policy(model, policy)
    _trained_a_little(model)
    plain = materialize(model)
    x = torch.randn(4, 3, 32, 32)
    skipped = [item.unit for item in report.replaced if item.block == "skip"]
    expected = [key for key in untouched.state_dict() if not any(key.startswith(f"{unit}.") for unit in skipped)]
    assert list(plain.state_dict()) == expected
    assert {type(module) for module in plain.modules()} <= {type(m) for m in untouched.modules()} | {nn.Identity}
    assert total_params(model) == total_params(plain) == sum(p.numel() for p in plain.parameters())
    for mode in (True, False):
        torch.testing.assert_close(plain.train(mode)(x), model.train(mode)(x), rtol=1e-5, atol=1e-5)

    empty = copy.deepcopy(untouched)
    apply_policy(empty, policy)
    other = materialize(empty)
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), plain.eval()(x))


def test_materialising_gives_a_copy_of_its_own(resnet32, policy_of) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "scalar", "layer1.1": "skip"}))
    plain = materialize(resnet32)
    assert isinstance(resnet32.layer1[1], Skip)
    assert type(plain.layer1[1]) is nn.Identity
    assert type(plain.layer1[3].conv1) is nn.Conv2d
    assert all(parameter.requires_grad for parameter in plain.parameters())
    storages = {parameter.untyped_storage()._cdata for parameter in resnet32.parameters()}
    assert not storages & {parameter.untyped_storage()._cdata for parameter in plain.parameters()}
    assert materialize(resnet32).state_dict().keys() == plain.state_dict().keys()


def test_a_replaced_model_learns_and_its_sources_feel_it(resnet32, policy_of) -> None:
    """The loss falls, and the neighbours get gradients through the replaced unit (attached)."""
    apply_policy(resnet32, policy_of({"layer1.3": "scalar", "layer2.2": "channel", "layer3.3": "lowrank"}))
    torch.manual_seed(0)
    x, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(resnet32.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(resnet32(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in resnet32.parameters())
    assert resnet32.layer1[3].conv1.weight_mixing.pair.a.item() != 0.5


def test_surgery_without_memory_gives_the_same_numbers(resnet32, policy_of) -> None:
    policy = policy_of({"layer1.3": ("scalar", {"init": "fit"}), "layer2.2": "skip", "layer3.2": "lowrank"})
    units = find_units(resnet32)
    with torch.device("meta"):
        meta = build_model("resnet32")
    mode, fake = fake_copy(resnet32)
    reports = [apply_policy(resnet32, policy), apply_policy(meta, policy, torch.empty(1, 3, 32, 32, device="meta"))]
    with mode:
        reports.append(apply_policy(fake, policy, units=units))
        assert fake(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert reports[0] == reports[1] == reports[2]
    assert total_params(resnet32) == total_params(meta) == total_params(fake)


def test_scalar_draws_no_random_numbers(untouched_resnet32, policy_of) -> None:
    """So that a trial's first batches are those of the baseline with the same seed."""
    model = copy.deepcopy(untouched_resnet32)
    before = torch.get_rng_state()
    apply_policy(model, policy_of({"layer1.3": "scalar", "layer2.2": "channel", "layer3.3": "skip"}))
    assert torch.equal(torch.get_rng_state(), before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.chain[0].weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.chain(x))
        return out


def test_tied_weights_are_counted_once(policy_of) -> None:
    model = Tied()
    assert learnable_params(model) == total_params(model) == 48
    apply_policy(model, policy_of({"chain.1": "scalar"}), torch.empty(1, 4))
    assert learnable_params(model) == 34
    assert total_params(model) == 48


def test_frozen_parameters_are_not_learnable(resnet32, policy_of) -> None:
    apply_policy(resnet32, policy_of({"layer1.3": "scalar"}))
    resnet32.conv1.weight.requires_grad_(False)
    assert learnable_params(resnet32) == 466_906 - 2 * 16 * 16 * 9 + 2 - 3 * 16 * 9
