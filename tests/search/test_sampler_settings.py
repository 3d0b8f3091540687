"""``search.sampler`` as users write it."""

from __future__ import annotations

from typing import Any

import pytest

from rlsearch.errors import ConfigError
from rlsearch.search.space import SearchSpace, parse_space


def parsed(**search: Any) -> SearchSpace:
    return parse_space(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "space": {"replacement": {"blocks": ["skip"]}},
            "search": search,
        }
    )


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ("tpe", "tpe", {"n_ei_candidates": 24}),
        ("random", "random", {}),
        ({"name": "front", "candidates": 100}, "front", {"candidates": 100}),
        ({"name": "nsga2"}, "nsga2", {"population_size": 20}),
    ],
)
def test_a_name_alone_or_with_its_options(given: Any, name: str, options: dict[str, int]) -> None:
    sampler = parsed(sampler=given).search.sampler
    assert (sampler.name, sampler.options) == (name, options)


def test_the_searchs_own_sampler_is_the_usual_one() -> None:
    sampler = parsed().search.sampler
    assert (sampler.name, sampler.options) == ("front", {"candidates": 600})


def test_a_resolved_search_space_gives_the_same_again() -> None:
    space = parsed(sampler={"name": "tpe", "n_ei_candidates": 48})
    assert parse_space(space.to_dict()) == space


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("tep", "search.sampler.name: unknown sampler 'tep'; did you mean 'tpe'?"),
        ({"name": "tpe", "candidates": 100}, "search.sampler.candidates: unknown key"),
        ({"name": "front", "candidates": 10}, "search.sampler.candidates: must be at least 50, got 10"),
        ({"name": "front", "candidates": "many"}, "search.sampler.candidates: must be"),
        ({"name": "front", "options": 3}, "search.sampler.options: must be"),
        (3, "search.sampler: must be"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(given: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(sampler=given)
    assert told in str(error.value)
