"""What a trial tells: its accuracy at the end, or what that is likely to become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial

from rlsearch import Policy, TrainingSpec
from rlsearch.search.observations import Observed, final_accuracies, observe
from rlsearch.search.outcome import Outcome


def item(curve: Sequence[float], *, whole: bool = True, running: bool = False) -> Observed:
    return Observed(Policy(), TrainingSpec(), {}, tuple(curve), {}, whole, running, True)


def pairs(count: int, noise: float = 0.0) -> list[Observed]:
    """Trainings whose accuracy at the end follows from that after one of two epochs."""
    rng = np.random.default_rng(0)
    starts = np.linspace(0.3, 0.6, count)
    return [item((start, 0.3 + 0.8 * start + rng.normal(0, noise))) for start in starts]


def test_whole_trainings_count_as_they_ended_and_others_as_their_like_became() -> None:
    stopped = item((0.5,), whole=False)
    values, variances = final_accuracies([*pairs(30), stopped, item((), whole=False, running=True)])
    assert values[:30] == pytest.approx(np.linspace(0.54, 0.78, 30))
    assert values[30] == pytest.approx(0.7, abs=0.01)
    assert variances[30] < 1e-3
    assert np.isnan(values[31])
    assert (variances[:30] == 0).all()


def test_the_spread_about_the_line_is_the_variance() -> None:
    _, variances = final_accuracies([*pairs(200, noise=0.03), item((0.4,), whole=False)])
    assert variances[-1] == pytest.approx(0.03**2, rel=0.25)


def test_too_few_whole_trainings_tell_nothing_of_a_stopped_one() -> None:
    values, _ = final_accuracies([*pairs(4), item((0.5,), whole=False)])
    assert np.isnan(values[-1])


def test_a_longer_training_says_what_became_of_each_epoch() -> None:
    whole = [item((0.2, start, start + 0.1)) for start in np.linspace(0.4, 0.6, 10)]
    values, _ = final_accuracies([*whole, item((0.2, 0.5), whole=False)])
    assert values[-1] == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("state", "seen"),
    [("COMPLETE", True), ("PRUNED", True), ("RUNNING", True), ("FAIL", False), ("WAITING", False)],
)
def test_trials_that_failed_or_wait_tell_nothing(state: str, seen: bool) -> None:
    outcome = Outcome("COMPLETE", ({"accuracy": 0.4}, {"accuracy": 0.6}))
    attributes = {"policy": Policy().to_dict(), "training": asdict(TrainingSpec()), "outcome": outcome.to_dict()}
    ended = TrialState[state]
    trial = create_trial(
        state=ended,
        values=[0.6] if ended == TrialState.COMPLETE else None,
        user_attrs=attributes,
        constraints={"params": 3.0},
    )
    found = observe(trial)
    assert (found is not None) == seen
    if found is not None:
        assert found.curve == (0.4, 0.6)
        assert found.final == {"accuracy": 0.6}
        assert not found.is_feasible
        assert (found.is_whole, found.is_running) == (state == "COMPLETE", state == "RUNNING")
