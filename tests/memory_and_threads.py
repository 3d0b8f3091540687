"""Fixtures of the folders whose tests need nothing of a search's results: they run where only torch is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rlsearch.learn_drop import feature_store


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bitwise equal sums need one order of additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files have room."""
    monkeypatch.setattr(feature_store, "available_bytes", lambda device: 0)
