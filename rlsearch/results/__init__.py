"""Reading a run: its tables, its Pareto front, its report. No torch, no Ray, no Optuna."""

from __future__ import annotations

from rlsearch.results.comparison import control_verdicts, savings
from rlsearch.results.confirmation import confirmations
from rlsearch.results.pareto import hypervolume, knee, nondominated_ranks, pareto_front, to_losses
from rlsearch.results.racing import racing_figures
from rlsearch.results.run_summary import summary
from rlsearch.results.selection import baseline, candidates, front, normalised_hypervolume, record_of, select
from rlsearch.results.tables import (
    METRICS,
    STATES,
    Run,
    TrialRecord,
    read_epochs,
    read_run,
    read_trials,
    write_epochs,
    write_trials,
)
from rlsearch.results.where import parse_where

__all__ = [
    "METRICS",
    "STATES",
    "Run",
    "TrialRecord",
    "baseline",
    "candidates",
    "confirmations",
    "control_verdicts",
    "front",
    "hypervolume",
    "knee",
    "nondominated_ranks",
    "normalised_hypervolume",
    "pareto_front",
    "parse_where",
    "racing_figures",
    "read_epochs",
    "read_run",
    "read_trials",
    "record_of",
    "savings",
    "select",
    "summary",
    "to_losses",
    "write_epochs",
    "write_trials",
]
