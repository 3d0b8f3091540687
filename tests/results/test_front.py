"""The Pareto arithmetic against a reference that only knows the definition of dominance."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from rlsearch.results.pareto import (
    distances_to_ideal,
    hypervolume,
    knee,
    nondominated_ranks,
    pareto_front,
    to_losses,
)

# Few distinct values, so that equal rows and equal columns come up often; and any finite floats, so that scale does.
SMALL = st.integers(0, 3).map(float)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def matrices(elements: st.SearchStrategy[float], least: int = 0) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(least, 9), st.integers(1, 4))
    return shapes.flatmap(lambda shape: nps.arrays(np.float64, shape, elements=elements))


LOSSES = matrices(SMALL) | matrices(FINITE)
SOME_LOSSES = matrices(SMALL, least=1) | matrices(FINITE, least=1)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def reference_front(losses: np.ndarray) -> list[bool]:
    return [not any(dominates(other, row) for other in losses) for row in losses]


def test_a_dominance_table_by_hand() -> None:
    #          accuracy, params
    values = [(0.97, 500), (0.96, 400), (0.96, 450), (0.90, 400), (0.97, 500), (0.99, 900)]
    losses = to_losses(values, ("maximize", "minimize"))
    assert losses.tolist() == [[-0.97, 500], [-0.96, 400], [-0.96, 450], [-0.90, 400], [-0.97, 500], [-0.99, 900]]
    assert pareto_front(losses).tolist() == [True, True, False, False, True, True]
    assert nondominated_ranks(losses).tolist() == [0, 0, 1, 1, 0, 0]


@given(LOSSES)
def test_the_front_is_what_nothing_dominates(losses: np.ndarray) -> None:
    assert pareto_front(losses).tolist() == reference_front(losses)


@given(LOSSES)
def test_the_front_is_not_dominated_and_covers_the_rest(losses: np.ndarray) -> None:
    mask = pareto_front(losses)
    members = losses[mask]
    assert not any(dominates(a, b) for a, b in product(members, members))
    assert all(any(dominates(member, row) for member in members) for row in losses[~mask])


@given(SOME_LOSSES, st.randoms(use_true_random=False))
def test_the_order_of_points_and_objectives_has_no_meaning(losses: np.ndarray, source: object) -> None:
    rows, columns = list(range(len(losses))), list(range(losses.shape[1]))
    source.shuffle(rows)
    source.shuffle(columns)
    shuffled = losses[rows][:, columns]
    assert pareto_front(shuffled).tolist() == pareto_front(losses)[rows].tolist()
    assert nondominated_ranks(shuffled).tolist() == nondominated_ranks(losses)[rows].tolist()


@given(LOSSES)
def test_ranks_peel_the_fronts(losses: np.ndarray) -> None:
    ranks = nondominated_ranks(losses)
    expected = np.full(len(losses), -1)
    left = np.arange(len(losses))
    rank = 0
    while len(left):
        mask = np.array(reference_front(losses[left]))
        expected[left[mask]] = rank
        left, rank = left[~mask], rank + 1
    assert ranks.tolist() == expected.tolist()


@given(matrices(SMALL))
def test_the_hypervolume_counts_the_dominated_unit_cells(losses: np.ndarray) -> None:
    corner = 3
    cells = product(range(corner), repeat=losses.shape[1])
    dominated = sum(any((row <= np.array(cell)).all() for row in losses) for cell in cells)
    assert hypervolume(losses, [corner] * losses.shape[1]) == pytest.approx(dominated)


@given(matrices(st.floats(0, 2), least=1))
def test_a_further_point_never_takes_hypervolume_away(losses: np.ndarray) -> None:
    corner = np.ones(losses.shape[1])
    whole, without = hypervolume(losses, corner), hypervolume(losses[1:], corner)
    assert whole >= without - 1e-12
    assert hypervolume(losses[pareto_front(losses)], corner) == pytest.approx(whole, abs=1e-12)
    assert whole <= 1


def test_hypervolume_by_hand() -> None:
    assert hypervolume([[0.5, 0.5]], [1, 1]) == pytest.approx(0.25)
    assert hypervolume([[0.5, 0.5], [0.25, 0.75]], [1, 1]) == pytest.approx(0.25 + 0.25 * 0.25)
    assert hypervolume([[0.5, 1.0], [2.0, 0.0]], [1, 1]) == 0
    assert hypervolume(np.empty((0, 3)), [1, 1, 1]) == 0


@given(SOME_LOSSES)
def test_the_knee_is_on_the_front_and_the_first_of_the_nearest(losses: np.ndarray) -> None:
    index = knee(losses)
    members = np.flatnonzero(reference_front(losses))
    distances = distances_to_ideal(losses[members])
    assert members[distances == distances.min()][0] == index
    assert ((distances >= 0) & (distances <= np.sqrt(losses.shape[1]) + 1e-9)).all()


@given(matrices(SMALL, least=1), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_knee_knows_no_unit(losses: np.ndarray, factor: float, offset: float) -> None:
    before = distances_to_ideal(losses)
    assert distances_to_ideal(losses * factor + offset) == pytest.approx(before, abs=1e-9)


def test_the_knee_by_hand() -> None:
    assert knee([[0, 10], [1, 1], [10, 0]]) == 1
    # A dominated point far out must not stretch the scale: without it the knee is the first.
    front = [[0.0, 1.0], [0.4, 0.3], [1.0, 0.0]]
    assert knee([*front, [100.0, 1.0]]) == knee(front) == 1
    # One point is its own ideal, and a constant objective decides nothing.
    assert knee([[5.0, 7.0]]) == 0
    assert distances_to_ideal([[5.0, 7.0]]).tolist() == [0]
    assert distances_to_ideal([[1.0, 3.0], [2.0, 3.0]]).tolist() == [0, 1]
    # Equal distances: the first.
    assert knee([[0, 1], [1, 0]]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [pareto_front, nondominated_ranks, knee, distances_to_ideal])
def test_a_value_that_is_not_finite_is_refused(function: object, value: float) -> None:
    with pytest.raises(ValueError, match=r"losses must be finite, got .* in row 1, column 0"):
        function([[1.0, 2.0], [value, 3.0]])
    with pytest.raises(ValueError, match="reference must be 2 finite numbers"):
        hypervolume([[1.0, 2.0]], [value, 3.0])


def test_other_shapes_and_directions_are_refused() -> None:
    for shape in [(3,), (2, 0), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"shape \(points, objectives\)"):
            pareto_front(np.zeros(shape))
    with pytest.raises(ValueError, match="the knee of no points"):
        knee(np.empty((0, 2)))
    with pytest.raises(ValueError, match="2 finite numbers"):
        hypervolume([[1.0, 2.0]], [3.0])
    with pytest.raises(ValueError, match="must be maximize or minimize, got 'max'"):
        to_losses([[1.0]], ["max"])
    with pytest.raises(ValueError, match="one column a direction"):
        to_losses([[1.0, 2.0]], ["maximize"])


def test_to_losses_leaves_its_input_alone_and_makes_no_negative_zero() -> None:
    values = np.array([[0.0, 2.0]])
    losses = to_losses(values, ("maximize", "minimize"))
    assert values.tolist() == [[0.0, 2.0]]
    assert not np.signbit(losses[0, 0])
    assert to_losses([], ("maximize", "minimize")).shape == (0, 2)


@given(SOME_LOSSES)
def test_inputs_are_not_changed(losses: np.ndarray) -> None:
    assume(losses.size)
    before = losses.copy()
    pareto_front(losses), nondominated_ranks(losses), knee(losses), hypervolume(losses, np.ones(losses.shape[1]))
    assert np.array_equal(before, losses)


def test_ten_thousand_points_take_milliseconds() -> None:
    losses = np.random.default_rng(0).random((10_000, 4))
    pareto_front(losses)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        mask = pareto_front(losses)
        seconds.append(time.perf_counter() - start)
    # About 3 ms alone on a core; the quadratic way takes over a second.
    assert min(seconds) < 0.1
    assert 0 < mask.sum() < 2_000
