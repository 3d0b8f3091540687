"""What decides a trial's result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rlsearch.errors import ConfigError, Problem
from rlsearch.policy import ModelSpec, Policy
from rlsearch.training.data import DataSpec
from rlsearch.training.loop import TrainingSpec


@dataclass(frozen=True)
class TrialSpec:
    """Everything that decides a trial's result.

    Attributes:
        model: what is trained.
        data: on what.
        training: how.
        policy: with what replaced, and what dropped when.
        seed: of the initial weights and of the order and augmentation of the images.
    """

    model: ModelSpec
    data: DataSpec
    training: TrainingSpec = field(default_factory=TrainingSpec)
    policy: Policy = field(default_factory=Policy)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types; two trials with equal ones give equal numbers on one machine."""
        return {
            "model": asdict(self.model),
            # How many processes decode a stream changes no bit of it.
            "data": {name: value for name, value in asdict(self.data).items() if name != "workers"},
            "training": asdict(self.training),
            "policy": self.policy.hash,
            "seed": self.seed,
        }

    def check_classes(self, name: str, num_classes: int) -> None:
        """Whether the model goes with the data of this name.

        Raises:
            ConfigError: it has another number of classes.
        """
        if self.model.num_classes != num_classes:
            message = f"is {self.model.num_classes}, but the data {name!r} have {num_classes} classes"
            raise ConfigError([Problem("model.num_classes", message)], "trial")
