"""Searches training policies for vision models: Replacement Learning x Learn&Drop, on Ray Tune and Optuna.

Importing this package is cheap; torch and what builds on it are imported when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlsearch._version import __version__
from rlsearch.errors import RlsearchError, UserError
from rlsearch.policy import LearnDrop, ModelSpec, Policy, Replacement

if TYPE_CHECKING:
    from rlsearch.learn_drop import Dropper
    from rlsearch.replacement import Unit, apply_policy, find_units, materialize
    from rlsearch.results.pareto import hypervolume, pareto_front
    from rlsearch.training.cost import Cost, estimate_cost
    from rlsearch.training.data import DataSpec
    from rlsearch.training.loop import TrainingSpec
    from rlsearch.training.metrics import EpochMetrics
    from rlsearch.training.models import build_model
    from rlsearch.training.trial import run_trial
    from rlsearch.training.trial_spec import TrialSpec

_LAZY = {
    "Dropper": "rlsearch.learn_drop",
    "Unit": "rlsearch.replacement",
    "apply_policy": "rlsearch.replacement",
    "find_units": "rlsearch.replacement",
    "materialize": "rlsearch.replacement",
    "hypervolume": "rlsearch.results.pareto",
    "pareto_front": "rlsearch.results.pareto",
    "Cost": "rlsearch.training.cost",
    "estimate_cost": "rlsearch.training.cost",
    "DataSpec": "rlsearch.training.data",
    "TrainingSpec": "rlsearch.training.loop",
    "EpochMetrics": "rlsearch.training.metrics",
    "build_model": "rlsearch.training.models",
    "TrialSpec": "rlsearch.training.trial_spec",
    "run_trial": "rlsearch.training.trial",
}

__all__ = [
    "Cost",
    "DataSpec",
    "Dropper",
    "EpochMetrics",
    "LearnDrop",
    "ModelSpec",
    "Policy",
    "Replacement",
    "RlsearchError",
    "TrainingSpec",
    "TrialSpec",
    "Unit",
    "UserError",
    "__version__",
    "apply_policy",
    "build_model",
    "estimate_cost",
    "find_units",
    "hypervolume",
    "materialize",
    "pareto_front",
    "run_trial",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rlsearch' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
