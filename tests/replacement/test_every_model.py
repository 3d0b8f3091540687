"""Real models of every kind: units found, replaced by all blocks in turn, trained for a step, materialised, loaded."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlsearch.errors import ModelError
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import Unit, apply_policy, find_units, fits, learnable_params, materialize, total_params
from rlsearch.training.models import build_model

TIMM = {"vit_tiny_patch16_224", "deit_tiny", "resnet26", "mixer_b16_224"}
SMALL_STEM = {"small_stem": True}
# The side of the images, and the kwargs.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"resnet{depth}": (16, {}) for depth in (20, 32, 56, 110)},
    **{f"resnet{depth}": (32, SMALL_STEM) for depth in (18, 34)},
    **{f"resnet{depth}": (64, {}) for depth in (50, 101, 152)},
    **{name: (32, {"small_head": True}) for name in ("vgg11_bn", "vgg16", "vgg16_bn")},
    **{name: (32, {"image_size": 32}) for name in ("vit_b_16", "vit_l_16")},
    **{name: (64, {}) for name in ("convnext_tiny", "swin_t", "regnet_y_400mf", "mobilenet_v2")},
    "vit_tiny": (16, {"image_size": 16}),
    **{name: (32, {"img_size": 32}) for name in ("vit_tiny_patch16_224", "deit_tiny")},
    "mixer_b16_224": (64, {"img_size": 64}),
    "resnet26": (64, {}),
    "gpt": (0, {}),
}
BLOCKS = ["scalar", "constant", "lowrank", "channel", "project", "coupled", "angle"]
LEARNED = {"a", "b", "s", "phi", "u", "v", "out_u", "out_v", "in_u", "in_v"}


class Causal(nn.Module):
    """Attention to what came before; (N, T, 24) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A transformer block as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(24), Causal(), nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Language(nn.Module):
    """Token ids (N, T) to the logits (N, 10) of what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 24), nn.Embedding(16, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(7))
        self.ln, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.ln(x[:, -1]))
        return out


def _build(name: str) -> tuple[nn.Module, Tensor]:
    """A model, and a batch of four for it."""
    torch.manual_seed(0)
    if name == "gpt":
        return Language(), torch.randint(50, (4, 9))
    if name in TIMM:
        pytest.importorskip("timm")
    size, kwargs = MODELS[name]
    model = build_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            # Classifiers that start at zero let no gradient through.
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model, torch.randn(4, 3, size, size)


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _choose(model: nn.Module, units: Sequence[Unit]) -> Policy:
    """For every chain and role the first unit that some block fits, the blocks in turn."""
    blocks = itertools.cycle(BLOCKS)
    chosen: list[Replacement] = []
    taken: list[str] = []

    def is_free(unit: Unit) -> bool:
        # Neither a part of another, nor a source, nor beside one that is replaced.
        own = any(_overlap(unit.name, other) for other in taken)
        return not own and not any(_overlap(source, item.unit) for source in unit.sources or () for item in chosen)

    def candidates(alike: list[Unit]) -> Iterator[tuple[Unit, str, dict[str, Any]]]:
        first = next(blocks)
        order = [first, *(block for block in BLOCKS if block != first)]
        for unit, block in itertools.product(alike, order):
            ranks = {"rank": 2} if block in ("lowrank", "project") else {}
            yield unit, block, {"boundary": "keep"} | ranks

    # Roles first: a unit that is replaced whole leaves them no room.
    for _, alike in sorted(_alike(units).items(), key=lambda item: item[0][1] == "block"):
        for unit, block, options in candidates([unit for unit in alike if unit.sources is not None]):
            if is_free(unit) and fits(model, units, unit.name, block, options) is None:
                chosen.append(Replacement(unit.name, block, options))
                taken.extend([unit.name, *(unit.sources or ())])
                break
    if not chosen:
        skipped = next(unit for unit in units if fits(model, units, unit.name, "skip") is None)
        chosen.append(Replacement(skipped.name, "skip"))
    return Policy(replacements=tuple(chosen))


def _alike(units: Sequence[Unit]) -> dict[tuple[str, str], list[Unit]]:
    found: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        found.setdefault((unit.chain, unit.role), []).append(unit)
    return found


def _train_a_step(model: nn.Module, x: Tensor, policy: Policy) -> None:
    """One step of SGD, after which norms have statistics and nothing stands at its start."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    for item in policy.replacements:
        unit = model.get_submodule(item.unit)
        terms = {name: term for name, term in unit.named_parameters() if name.rpartition(".")[2] in LEARNED}
        assert bool(terms) == (item.block not in ("constant", "skip")), item
        assert all(term.grad is not None and term.grad.isfinite().all() for term in terms.values()), item
        assert not terms or any(term.grad is not None and term.grad.any() for term in terms.values()), item
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_of_many_blocks(name: str) -> None:
    model, x = _build(name)
    units = find_units(model, x[:1])
    policy = _choose(model, units)
    skips = [item for item in policy.replacements if item.block == "skip"]
    # Their chains have two elements: no unit has two sources.
    assert (name in ("resnet18", "resnet26")) == bool(skips)
    fresh = copy.deepcopy(model)
    size = sum(parameter.numel() for parameter in model.parameters())

    report = apply_policy(model, policy, x[:1])
    assert report.params_before == size
    assert report.params_after == learnable_params(model) < size
    _train_a_step(model, x, policy)

    plain = materialize(model)
    assert skips or total_params(model) == size == sum(parameter.numel() for parameter in plain.parameters())
    with torch.no_grad():
        expected = model.eval()(x)
    del model
    gc.collect()
    if not skips:
        fresh.load_state_dict(plain.state_dict(), strict=True)
        assert [type(module) for module in fresh.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), expected, rtol=1e-5, atol=1e-5)
        if not skips:
            assert torch.equal(fresh.eval()(x), plain(x))


def test_all_blocks_are_tried() -> None:
    """The rotation reaches every block on some model."""
    found: set[str] = set()
    for name in ("resnet56", "vit_tiny", "gpt"):
        model, x = _build(name)
        found |= {item.block for item in _choose(model, find_units(model, x[:1])).replacements}
    assert found == set(BLOCKS)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("resnet34", "layer3.2"),
        ("resnet50", "layer3.2"),
        ("vit_b_16", "encoder.layers.encoder_layer_3"),
        ("convnext_tiny", "features.5.3"),
        ("swin_t", "features.5.3"),
        ("regnet_y_400mf", "trunk_output.block4.block4-2"),
        ("deit_tiny", "blocks.3"),
        ("mixer_b16_224", "blocks.3"),
        ("gpt", "blocks.3"),
    ],
)
def test_every_block_fits_a_whole_element(name: str, unit: str) -> None:
    model, x = _build(name)
    units = find_units(model, x[:1])
    assert unit in {found.name for found in units}
    smallest = {"rank": 1}
    reasons = {
        block: fits(model, units, unit, block, smallest if block in ("lowrank", "project") else {})
        for block in [*BLOCKS, "skip"]
    }
    assert {block: reason for block, reason in reasons.items() if reason is not None} == {}


@pytest.mark.parametrize("preset", ["v1", "v2"])
@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet32", "vgg16_bn", "vit_tiny", "deit_tiny", "gpt"])
def test_presets_of_the_papers_apply(name: str, preset: str) -> None:
    model, x = _build(name)
    policy = Policy.preset(preset, model, x[:1])
    report = apply_policy(model, policy, x[:1])
    assert report.replaced
    assert report.params_after < report.params_before
    _train_a_step(model, x, policy)
    with torch.no_grad():
        torch.testing.assert_close(materialize(model).eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_every_fourth_block_of_resnet32() -> None:
    """METHODS, sections 1 and 3: layer1.3, layer2.2 and layer3.1, of which the last does not fit."""
    model, _ = _build("resnet32")
    policy = Policy.preset("v1", model)
    assert [(item.unit, item.block) for item in policy.replacements] == [("layer1.3", "scalar"), ("layer2.2", "scalar")]
    assert apply_policy(model, policy).params_after == 443_870


def test_attention_alone_is_replaced_in_a_vit_by_v1() -> None:
    model, x = _build("vit_tiny")
    names = {item.unit for item in Policy.preset("v1", model, x[:1]).replacements}
    assert names == {f"encoder.layers.encoder_layer_{index}.self_attention" for index in (3, 7)}


def test_a_model_whose_blocks_grow_is_refused_with_the_reason() -> None:
    model = build_model("densenet121")
    with pytest.raises(ModelError) as caught:
        find_units(model, torch.empty(1, 3, 64, 64))
    assert "DenseNet" in str(caught.value)
    assert "no unit" in str(caught.value)
    assert "_DenseLayer" in str(caught.value)
    assert "each block takes the outputs of all the blocks before it" in str(caught.value)
