"""What a user can get wrong: each is refused with the reason and the remedy, and leaves the model as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlsearch.errors import ModelError, SurgeryError
from rlsearch.policy import Policy, Replacement
from rlsearch.replacement import apply_policy, find_units, materialize, plan

SOURCED = ["constant", "scalar", "angle", "coupled", "channel", "lowrank", "project"]


class Recurrent(nn.Module):
    """A unit around an LSTM, on sequences (N, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


def _model() -> nn.Module:
    """A chain of five 3x3 convolutions of 4 channels, the first of them from 3 channels and the last to 6."""
    widths = [3, 4, 4, 4, 4, 4, 6]
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairs))


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every module and tensor of a model by identity, and what else a surgery may touch."""
    return [
        (
            name,
            id(module),
            type(module),
            module.training,
            {key: id(tensor) for key, tensor in [*module._parameters.items(), *module._buffers.items()]},
            [(tensor.requires_grad, tensor._version) for tensor in module.parameters(recurse=False)],
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ]


def _refusal(model: nn.Module, policy: Policy, x: Tensor | None = None) -> str:
    """The message with which the policy is refused, by `plan` and by `apply_policy` alike."""
    before, values = _state(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError) as of_plan:
        plan(model, policy, example_input=x)
    assert _state(model) == before
    with pytest.raises(SurgeryError) as of_apply:
        apply_policy(model, policy, example_input=x)
    assert _state(model) == before
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert str(of_plan.value) == str(of_apply.value)
    return str(of_apply.value)


IMAGES = torch.zeros(1, 3, 6, 6)

# By what is wrong: the replacements, and what the message must hold.
CASES: dict[str, tuple[list[tuple[Any, ...]], list[str]]] = {
    "a unit that does not exist": ([("6", "skip")], ["6: unknown unit", "known"]),
    "a misspelled role": ([("2.conv", "scalar")], ["2.conv: unknown unit", "2"]),
    "an empty name": ([("", "scalar")], ["unknown unit"]),
    "twice": ([("2", "scalar"), ("2", "channel")], ["2: is replaced twice"]),
    "twice alike": ([("2", "skip"), ("2", "skip")], ["2: is replaced twice"]),
    "next to a replaced one": (
        [("2", "scalar"), ("3", "scalar")],
        ["2: borrows from 3, which is itself replaced", "3: borrows from 2"],
    ),
    "next to a skipped one": (
        [("2", "lowrank"), ("3", "skip")],
        ["2: borrows from 3, which is itself replaced", "sources: nearest"],
    ),
    "the first of its chain": ([("0", "scalar")], ["0: is the first unit of its chain", "no preceding unit"]),
    "the last of its chain": ([("5", "channel")], ["5: is the last unit of its chain", "no succeeding unit"]),
    "another shape before it": ([("1", "scalar")], ["1: ", "(4, 4, 3, 3)", "(4, 3, 3, 3)", "boundary: keep"]),
    "another shape behind it": ([("4", "channel")], ["4: ", "(4, 4, 3, 3)", "(6, 4, 3, 3)"]),
    "shapes that skip cannot bridge": ([("5", "skip")], ["5: ", "(4, 6, 6)", "(6, 6, 6)", "skip"]),
    "an unknown block": ([("2", "scaler")], ["2: unknown block 'scaler'", "did you mean 'scalar'"]),
    "an unknown option": ([("2", "scalar", {"inti": "half"})], ["unknown option 'inti'", "did you mean 'init'"]),
    "an option of another block": ([("2", "scalar", {"rank": 2})], ["unknown option 'rank' of block 'scalar'"]),
    "a pair of the block of channels": ([("2", "channel", {"pair": "unit"})], ["unknown option 'pair'"]),
    "an option of a block that takes none": ([("2", "skip", {"init": "half"})], ["unknown option 'init'", "'skip'"]),
    "constants that are updated": ([("2", "constant", {"update_every": 2})], ["unknown option 'update_every'"]),
    "no sources left on one side": (
        [(unit, "scalar", {"sources": "nearest", "boundary": "keep"}) for unit in "12345"],
        ["5: ", "succeeding"],
    ),
    "a rank that saves nothing": ([("2", "lowrank", {"rank": 4})], ["2: ", "rank 4", "smaller rank"]),
    "a single operator of a bare layer": ([("2", "scalar", {"operator": "single"})], ["2: ", "single"]),
}

BAD_VALUES = [
    ("scalar", "init", "halve"),
    ("scalar", "init", 0.5),
    ("scalar", "init", None),
    ("scalar", "init", ["half"]),
    ("scalar", "operator", "both"),
    ("scalar", "pair", "layer"),
    ("angle", "neighbours", "frozen"),
    ("coupled", "norms", "shared"),
    ("channel", "boundary", "pad"),
    ("channel", "sources", "far"),
    ("scalar", "update_every", 0),
    ("scalar", "update_every", -1),
    ("scalar", "update_every", 1.5),
    ("scalar", "update_every", True),
    ("scalar", "update_every", "2"),
    ("lowrank", "rank", 0),
    ("lowrank", "rank", True),
    ("lowrank", "rank", 2.0),
    ("lowrank", "rank", float("nan")),
    ("project", "rank", -3),
    ("scalar", "boundary_rank", 0),
    ("constant", "init", "random"),
]


@pytest.mark.parametrize("case", CASES)
def test_is_refused(case: str) -> None:
    given, expected = CASES[case]
    policy = Policy(replacements=tuple(Replacement(*item) for item in given))
    message = _refusal(_model(), policy, IMAGES)
    assert [part for part in expected if part not in message] == [], message


@pytest.mark.parametrize(("block", "option", "value"), BAD_VALUES, ids=lambda value: repr(value))
def test_a_bad_value_of_an_option_is_refused(block: str, option: str, value: object) -> None:
    message = _refusal(_model(), Policy(replacements=(Replacement("2", block, {option: value}),)), IMAGES)
    assert f"option {option!r} of block {block!r} must be " in message
    assert repr(value) in message


def test_a_unit_and_a_role_inside_it_overlap() -> None:
    from rlsearch.training.models import build_model

    model = build_model("resnet20")
    names = {unit.name for unit in find_units(model)}
    assert {"layer1.1", "layer1.1.conv1"} <= names
    for first, second in (("layer1.1", "layer1.1.conv1"), ("layer1.1.conv2", "layer1.1")):
        for other in ("scalar", "skip"):
            policy = Policy(replacements=(Replacement(first, "scalar"), Replacement(second, other)))
            message = _refusal(model, policy)
            assert "layer1.1.conv" in message
            assert "layer1.1 " in message.replace(",", " ").replace(":", " ")


@pytest.mark.parametrize("other", ["scalar", "skip"])
def test_a_role_beside_a_source_that_is_replaced_whole(other: str) -> None:
    """layer3.2.conv2 borrows from layer3.1.conv2, which goes where layer3.1 goes."""
    from rlsearch.training.models import build_model

    model = build_model("resnet32")
    policy = Policy(
        replacements=(Replacement("layer3.2.conv2", "scalar"), Replacement("layer3.1", other, _keep(other)))
    )
    message = _refusal(model, policy)
    assert "layer3.2.conv2: borrows from layer3.1.conv2" in message


def test_a_unit_whose_source_has_a_replaced_role() -> None:
    from rlsearch.training.models import build_model

    model = build_model("resnet32")
    policy = Policy(replacements=(Replacement("layer3.2", "scalar"), Replacement("layer3.3.conv1", "channel")))
    message = _refusal(model, policy)
    assert "layer3.2: borrows from layer3.3" in message
    assert "layer3.3.conv1" in message


def _keep(block: str) -> dict[str, object]:
    return {"boundary": "keep"} if block != "skip" else {}


@pytest.mark.parametrize("block", SOURCED)
def test_a_recurrent_layer_is_refused(block: str) -> None:
    model = nn.Sequential(*(Recurrent() for _ in range(3)))
    message = _refusal(model, Policy(replacements=(Replacement("1", block),)), torch.zeros(1, 5, 8))
    assert "LSTM" in message
    assert "lstm" in message


def test_a_replaced_model_is_refused() -> None:
    for replacements in (
        [("2", "scalar")],
        [("2", "skip")],
        [("2", "constant"), ("4", "scalar", {"boundary": "one_sided"})],
    ):
        model = _model()
        apply_policy(model, Policy(replacements=tuple(Replacement(*item) for item in replacements)), IMAGES)
        message = _refusal(model, Policy(replacements=(Replacement("3", "skip"),)), IMAGES)
        assert "replaced" in message
        assert "newly built" in message
        apply_policy(materialize(model), Policy(replacements=(Replacement("3", "skip"),)), IMAGES)


def test_all_problems_are_told_at_once() -> None:
    given = [("1", "scalar"), ("2", "scaler"), ("3", "skip", {"rank": 1}), ("7", "skip"), ("4", "channel")]
    message = _refusal(_model(), Policy(replacements=tuple(Replacement(*item) for item in given)), IMAGES)
    assert [name for name in ("1: ", "2: ", "3: ", "7: ", "4: ") if f"- {name}" not in message] == []


class Tokens(nn.Module):
    """Takes token ids, which no convolution tells."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.chain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.chain(self.embedding(ids))
        return out


class Branching(nn.Module):
    """Decides by values, which tensors without values do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.chain(x)
        return out if out.sum() > 0 else -out


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the cable is out")


@pytest.mark.parametrize(
    ("make", "x", "expected"),
    [
        (Tokens, None, ["example_input"]),
        (Tokens, torch.zeros(1, 5), ["Tokens cannot be run on an input of shape (1, 5)"]),
        (Branching, torch.zeros(1, 3, 4, 4), ["Branching cannot be run on an input of shape (1, 3, 4, 4)"]),
        (Failing, torch.zeros(1, 3, 4, 4), ["Failing cannot be run", "the cable is out"]),
        (Failing, None, ["example_input", "the cable is out"]),
        (lambda: nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4), ["has no unit to replace"]),
    ],
    ids=["token ids unguessed", "token ids of floats", "branching", "failing", "failing unguessed", "no chain"],
)
def test_a_model_that_cannot_be_looked_at(make: Callable[[], nn.Module], x: Tensor | None, expected: list[str]) -> None:
    model = make()
    before = _state(model)
    for attempt in (
        lambda: find_units(model, x),
        lambda: apply_policy(model, Policy(replacements=(Replacement("chain.1", "scalar"),)), x),
    ):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert [part for part in expected if part not in str(caught.value)] == [], str(caught.value)
    assert _state(model) == before


def test_a_preset_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="v3") as caught:
        Policy.preset("v3", _model(), IMAGES)
    assert "v1" in str(caught.value)
    assert "v2" in str(caught.value)
