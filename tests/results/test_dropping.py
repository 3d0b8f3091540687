"""dropping.png: right at any size, and whole or not there."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from rlsearch.results.departures import departures
from rlsearch.results.dropping import LEFT, dropping_png, learning_cells, shown_rows, write_dropping_png
from rlsearch.results.figures import BLUE


def rows(num_layers: int, epochs: int, leaving: float = 0.0, **more: Any) -> list[dict[str, Any]]:
    """A training in which that share of the layers leaves, evenly, from the second epoch on."""
    names = ["stem", *(f"encoder.layers.encoder_layer_{index}" for index in range(num_layers - 2)), "head"]
    found = []
    cut = 0
    for epoch in range(1, epochs + 1):
        before, cut = cut, int(leaving * num_layers * (epoch - 1) / epochs)
        row = {"epoch": epoch, "accuracy": 1 - 0.5**epoch, "step_memory": 10**8 - cut * 10**5}
        shares = {"forward_share": 0.8, "mean_learnable_params": 1234.5}
        found.append(row | shares | {"left": names[before:cut], "learning": names[cut:]} | more)
    return found


def colours(content: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where a picture is of the colour of what learns, and of what left."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue, grey = (np.array(ImageColor.getrgb(name)) for name in (BLUE, LEFT))
    return (pixels == blue).all(-1), (pixels == grey).all(-1)


@pytest.mark.parametrize(("num_layers", "epochs"), [(150, 200), (5, 3), (17, 30), (5, 1), (2, 500)])
@pytest.mark.parametrize("leaving", [0.0, 0.9])
def test_each_cell_has_its_colour(num_layers: int, epochs: int, leaving: float) -> None:
    history = rows(num_layers, epochs, leaving)
    found = departures(history)
    assert found is not None
    # What learned in an epoch is what the epoch before it left.
    learned = [set(found.layers), *(set(row["learning"]) for row in history[:-1])]
    cells = learning_cells(found)
    assert [[int(layer in then) for then in learned] for layer in found.layers] == cells.tolist()
    blue, grey = colours(dropping_png(history, "resnet on digits"))
    # Without the legend's two squares, which lie above the cells.
    top = np.flatnonzero((blue | grey).sum(1) > blue.shape[1] / 2)[0]
    learning, left = blue[top:], grey[top:]
    assert learning.sum() / (learning.sum() + left.sum()) == pytest.approx(cells.mean(), abs=0.02)
    if leaving and epochs > 1:
        # What leaves first is on top, and what has left is on the right.
        ys, xs = np.nonzero(left)
        blue_ys, blue_xs = np.nonzero(learning)
        assert ys.mean() < blue_ys.mean()
        assert xs.mean() > blue_xs.mean()


def test_pictures_stay_within_reason() -> None:
    for num_layers, epochs in ((1000, 3), (2, 1)):
        with Image.open(io.BytesIO(dropping_png(rows(num_layers, epochs), "title"))) as image:
            assert image.format == "PNG"
            assert 300 < min(image.size) <= max(image.size) < 2000


def test_the_picture_says_what_it_shows() -> None:
    with Image.open(io.BytesIO(dropping_png(rows(10, 4, 0.8), "a $title$ of <mine>"))) as image:
        assert image.info["Title"] == "a $title$ of <mine>"
        assert image.info["Description"] == (
            "6 of 10 layers left, after epochs 2 to 4; forward compute 80.0 % of end-to-end; "
            "1,234 parameters learned on average"
        )


def test_what_is_missing_leaves_a_gap() -> None:
    gaps = [{"epoch": 1, "learning": [], "left": []}, {"epoch": 2, "accuracy": math.nan, "step_memory": None}]
    with Image.open(io.BytesIO(dropping_png(gaps, "title"))) as image:
        assert image.info["Description"] == "no Learn&Drop"
    assert dropping_png(rows(3, 3, accuracy=math.nan, step_memory=None), "title")


def test_the_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "dropping.png"
    write_dropping_png(path, rows(5, 3), "title")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="at least one epoch"):
        write_dropping_png(path, [], "title")
    assert path.read_bytes() == before == dropping_png(rows(5, 3), "title")
    assert [item.name for item in tmp_path.iterdir()] == ["dropping.png"]
    with pytest.raises(FileNotFoundError):
        write_dropping_png(tmp_path / "none" / "dropping.png", rows(5, 3), "title")


@given(st.integers(1, 400), st.integers(1, 80))
def test_labels_have_room(count: int, most: int) -> None:
    shown = shown_rows(count, most)
    assert shown == sorted(set(shown))
    assert 1 <= len(shown) <= most
    assert shown[-1] == count - 1
    assert shown[0] == 0 or most == 1
    assert all(after - before >= count / most for before, after in itertools.pairwise(shown))
