"""A fixture of all tests: what they decode is kept in a folder of their own, never in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In the environment, so that processes which a test starts have it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
