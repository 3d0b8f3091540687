"""Subsets and splits by label, for all label vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsearch.training.data_split import balanced_subset, stratified_split

LABELS = st.lists(st.integers(0, 6), min_size=2, max_size=120).map(lambda labels: np.array(labels, dtype=np.int64))


@given(labels=LABELS, limit=st.integers(2, 140))
def test_a_subset_is_as_balanced_as_the_set_allows(labels: np.ndarray, limit: int) -> None:
    chosen = balanced_subset(labels, limit)
    assert len(chosen) == min(limit, len(labels))
    assert (np.diff(chosen) > 0).all()
    available, taken = np.bincount(labels, minlength=7), np.bincount(labels[chosen], minlength=7)
    # Whoever has fewer than another by two or more had no more to give.
    assert all(taken[c] == available[c] for c in range(7) if taken[c] + 1 < taken.max())
    for label in range(7):
        positions = np.flatnonzero(labels == label)
        assert chosen[labels[chosen] == label].tolist() == positions[: taken[label]].tolist()


def test_a_subset_in_numbers() -> None:
    labels = np.array([2, 0, 0, 0, 1, 0, 1, 2, 0])
    assert balanced_subset(labels, 5).tolist() == [0, 1, 2, 4, 6]
    assert balanced_subset(labels, 99).tolist() == list(range(9))


@given(labels=LABELS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_a_split_takes_its_share_of_every_class(labels: np.ndarray, fraction: float, seed: int) -> None:
    rest, part = stratified_split(labels, fraction, seed)
    assert sorted([*rest, *part]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(part) > 0).all()
    counts, taken = np.bincount(labels, minlength=7), np.bincount(labels[part], minlength=7)
    assert (taken < counts)[counts > 0].all(), "one of each class is left"
    capped = np.minimum(np.floor(counts * fraction) + 1, np.maximum(counts - 1, 0))
    assert (taken <= capped).all()
    assert (taken >= np.minimum(np.floor(counts * fraction), np.maximum(counts - 1, 0))).all()
    again = stratified_split(labels, fraction, seed)
    assert (again[0] == rest).all()
    assert (again[1] == part).all()


def test_the_seed_decides_who_is_split_off_and_stays_the_same_for_ever() -> None:
    labels = np.repeat(np.arange(2), 10)
    assert stratified_split(labels, 0.2, seed=0)[1].tolist() == [2, 3, 11, 13]
    assert stratified_split(labels, 0.2, seed=1)[1].tolist() == [2, 9, 16, 18]


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_the_total_is_the_rounded_share(fraction: float) -> None:
    labels = np.repeat(np.arange(10), 33)
    assert len(stratified_split(labels, fraction, 0)[1]) == round(330 * fraction)


def test_the_classes_nearest_to_one_more_image_give_it() -> None:
    labels = np.repeat(np.arange(3), [11, 18, 14])  # a tenth of each: 1.1, 1.8 and 1.4 images, 4 in all
    assert np.bincount(labels[stratified_split(labels, 0.1, 0)[1]]).tolist() == [1, 2, 1]
