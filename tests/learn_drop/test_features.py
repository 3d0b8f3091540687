"""Stored features are the prefix's own outputs, wherever the cut is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlsearch.learn_drop.features import FeatureCache, available_bytes, num_bytes

CPU = torch.device("cpu")


def filled(images: Tensor, first: nn.Module, views: int = 2) -> FeatureCache:
    shape = tuple(first(images[:1]).shape[1:])
    cache = FeatureCache(len(images), views, shape, torch.float32, CPU)
    for view in range(views):
        for start in range(0, len(images), 4):
            batch = images[start : start + 4]
            cache.write(view, start, first(batch.flip(3) if view else batch))
    return cache


@torch.no_grad()
def test_a_batch_is_what_the_prefix_gives() -> None:
    torch.manual_seed(0)
    images, first = torch.randn(10, 3, 6, 6), nn.Conv2d(3, 5, 3)
    cache = filled(images, first)
    indices, views = torch.tensor([7, 0, 9]), torch.tensor([0, 1, 1])
    batch = cache.batch(indices, views)
    expected = torch.stack([images[7], images[0].flip(2), images[9].flip(2)])
    assert torch.allclose(batch, first(expected), atol=1e-6)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_the_cache_moves_on_without_the_images() -> None:
    torch.manual_seed(0)
    images, first, second = torch.randn(10, 3, 6, 6), nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3, stride=2)
    moved = filled(images, first).advanced(second, (2, 2, 2), batch_size=3)
    assert (moved.num_images, moved.num_views) == (10, 2)
    everything = torch.arange(10)
    assert torch.allclose(moved.batch(everything, torch.zeros(10, dtype=torch.int64)), second(first(images)), atol=1e-6)


@torch.no_grad()
def test_features_of_tokens() -> None:
    images, first = torch.randn(6, 4, 8), nn.Linear(8, 3)
    cache = filled(images, first, views=1)
    assert torch.allclose(cache.batch(torch.tensor([5]), torch.tensor([0])), first(images[5:]))


def test_sizes() -> None:
    assert num_bytes(10, 2, (5, 4, 4), torch.bfloat16) == 10 * 2 * 5 * 4 * 4 * 2
    cache = FeatureCache(10, 2, (5, 4, 4), torch.bfloat16, CPU)
    assert cache.values.untyped_storage().nbytes() == num_bytes(10, 2, (5, 4, 4), torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say what memory is available")
def test_available_memory_is_a_part_of_what_there_is() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < available_bytes(CPU) < int(total.split()[1]) * 1024
