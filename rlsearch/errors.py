"""What can go wrong, as one tree.

RlsearchError
├── UserError (also a ValueError)   the caller's input is wrong: the command line ends with 2
│   ├── ConfigError                 a search space, a policy or an option: every problem at once
│   ├── ModelError                  an unknown model, weights that do not fit, a model that cannot be analysed
│   ├── SurgeryError                a replacement that cannot be made, and why
│   ├── DataError                   data that are missing, corrupt or of the wrong form
│   └── RunFolderError              a run folder that is in use, holds another search, or holds none
├── TrialError                      one training failed; the search goes on
│   ├── DivergedError               a loss or a metric that is no longer finite
│   └── OutOfMemoryError            the training needed more memory than the device has
└── SearchError                     the search as a whole failed: the command line ends with 1

Nothing here imports torch, Ray or Optuna.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Of the problems of one file, in a message.
_MOST_SHOWN = 100


class RlsearchError(Exception):
    """The root of all errors that rlsearch raises on purpose."""


class UserError(RlsearchError, ValueError):
    """The caller's input is wrong. The message names the argument, the rule, the value and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration: the dotted key, and what to do about it."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(UserError):
    """Everything that is wrong in one configuration, all of it at once.

    Attributes:
        problems: what is wrong, in the order in which it was found.
        source: the file or object that holds the configuration.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "configuration") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = [f"{source}: {count}", *(f"  - {problem}" for problem in self.problems[:_MOST_SHOWN])]
        if len(self.problems) > _MOST_SHOWN:
            lines.append(f"  - … and {len(self.problems) - _MOST_SHOWN:,} more")
        super().__init__("\n".join(lines))


class ModelError(UserError):
    """A model that is unknown, cannot be built, or cannot be analysed."""


class SurgeryError(UserError):
    """A policy that cannot be applied to a model; nothing was changed."""


class DataError(UserError):
    """Data that are missing, corrupt, or not of the form that was asked for."""


class RunFolderError(UserError):
    """A run folder that is in use, holds another search, or holds none."""


class TrialError(RlsearchError):
    """One training failed. ``reason`` is the short word kept in the tables."""

    reason = "error"


class DivergedError(TrialError):
    """A loss or a metric is no longer finite."""

    reason = "diverged"


class OutOfMemoryError(TrialError):
    """The training needed more memory than the device has."""

    reason = "out_of_memory"


class SearchError(RlsearchError):
    """The search as a whole failed: every trial failed, or the cluster cannot be reached."""


def printable(text: str) -> str:
    """A text out of a file as it may go to a terminal: what would move its cursor, or is no character, is a mark."""
    return text if text.isprintable() else "".join(part if part.isprintable() else "\ufffd" for part in text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` when a known word is near, else the list of what is known.

    Args:
        word: what the user wrote.
        known: what would have been right.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
