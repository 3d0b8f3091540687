"""Whether a study says what was written to it: databases notice a torn file, and no altered value."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from rlsearch.errors import RunFolderError
from rlsearch.search.outcome import OUTCOME, Outcome

SPACE = "space"
"""The study's user attribute that holds the resolved search space."""

DIGEST = "digest"
"""The key under which the digest of what is written lies beside it."""

PLANNED = ("policy", "policy_hash", "training", "origin", "seed")
"""The user attributes that say what a trial trains."""


def check_content(path: Path, study: optuna.Study) -> None:
    """Whether space and trials are those that were written: SQLite itself notices no altered value.

    Raises:
        RunFolderError: something is not.
    """
    wrong = None
    if study.user_attrs.get(DIGEST) != digest_of(study.user_attrs[SPACE]):
        wrong = "its search space"
    objectives = study.user_attrs[SPACE]["objectives"]
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        content = dict(attributes.get(OUTCOME, {}))
        is_right = attributes[DIGEST] == digest_of([attributes[name] for name in PLANNED])
        if content:
            is_right &= content.pop(DIGEST, None) == digest_of(content)
        if trial.state == TrialState.COMPLETE:
            is_right &= trial.values == [float(Outcome.from_dict(content).final[name]) for name in objectives]
        if not is_right:
            wrong = f"trial {trial.number}"
    if wrong is not None:
        raise RunFolderError(f"{path}: is damaged ({wrong} is not as it was written); restore it from a copy")


def digest_of(content: Any) -> str:
    """The SHA-256 of plain content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
