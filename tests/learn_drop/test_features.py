"""Stored features are the prefix's own outputs, wherever they lie and wherever the cut is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlsearch.learn_drop.feature_store import (
    TIERS,
    Places,
    available_bytes,
    available_disk_bytes,
    is_shortage,
)
from rlsearch.learn_drop.features import FeatureCache, FeatureForm

CPU = torch.device("cpu")
EVERYTHING = torch.arange(10)
MUCH = 1 << 20


def places(folder: Path, **room: int) -> Places:
    return Places(CPU, room, folder, "run")


def built(images: Tensor, first: nn.Module, where: Places, views: int = 2) -> FeatureCache:
    sample = first(images[:1])
    form = FeatureForm(len(images), views, tuple(sample.shape[1:]), sample.dtype)
    store = where.opened(form.num_bytes)
    assert store is not None
    cache = FeatureCache(form, store, CPU)
    for view in range(views):
        for start in range(0, len(images), 4):
            batch = images[start : start + 4]
            cache.write(view, start, first(batch.flip(3) if view else batch))
    store.commit(form.num_bytes, {})
    return cache


def view_of(cache: FeatureCache, view: int) -> Tensor:
    return cache.batch(EVERYTHING, torch.full_like(EVERYTHING, view))


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(10, 3, 6, 6)


@pytest.mark.parametrize("tier", TIERS)
@torch.no_grad()
def test_a_batch_is_what_the_prefix_gives(images: Tensor, tier: str, tmp_path: Path) -> None:
    first = nn.Conv2d(3, 5, 3)
    cache = built(images, first, places(tmp_path, **{tier: MUCH}))
    assert cache.store.tier == tier
    indices, views = torch.tensor([7, 0, 9]), torch.tensor([0, 1, 1])
    batch = cache.batch(indices, views)
    expected = torch.stack([images[7], images[0].flip(2), images[9].flip(2)])
    assert torch.allclose(batch, first(expected), atol=1e-6)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(next(iter(cache.batches([(indices, views)]))), batch)
    part = cache.read(1, 2, 6)
    assert torch.equal(part, view_of(cache, 1)[2:6])
    part.zero_()  # as an in-place activation may
    assert torch.equal(cache.batch(indices, views), batch)


@pytest.mark.parametrize("tier", TIERS)
@torch.no_grad()
def test_the_cache_moves_on_without_the_images(images: Tensor, tier: str, tmp_path: Path) -> None:
    first, second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3, stride=2)
    where = places(tmp_path, **{tier: MUCH})
    moved = built(images, first, where).moved(second, FeatureForm(10, 2, (2, 1, 1), torch.float32), 3, where, {})
    assert moved is not None
    assert moved.store.tier == tier
    for view in range(2):
        expected = second(first(images.flip(3) if view else images))
        assert torch.allclose(view_of(moved, view), expected, atol=1e-6)
    moved.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("channels", [1, 5])
@torch.no_grad()
def test_without_room_for_two_it_moves_over_itself(images: Tensor, tier: str, channels: int, tmp_path: Path) -> None:
    first, second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, channels, 1)
    cache = built(images, first, places(tmp_path, **{tier: MUCH}))
    store, size = cache.store, cache.form.num_bytes
    names: set[str] = set()

    def module(inputs: Tensor) -> Tensor:
        names.update(path.name for path in tmp_path.iterdir())
        return second(inputs)

    form = FeatureForm(10, 2, (channels, 4, 4), torch.float32)
    moved = cache.moved(module, form, 3, places(tmp_path, **{tier: size // 10}), {})
    assert moved is not None
    assert all("partial" in name for name in names), "meanwhile it may not be taken for whole"
    assert moved.store is store
    for view in range(2):
        expected = second(first(images.flip(3) if view else images))
        assert torch.allclose(view_of(moved, view), expected, atol=1e-6)


@torch.no_grad()
def test_what_has_grown_moves_a_tier_down_and_what_has_shrunk_up(images: Tensor, tmp_path: Path) -> None:
    first, wider, narrow = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 1, 1)
    cache = built(images, first, places(tmp_path, device=MUCH))
    room = places(tmp_path, device=cache.form.num_bytes, file=MUCH)
    down = cache.moved(wider, FeatureForm(10, 2, (8, 6, 6), torch.float32), 4, room, {})
    assert down is not None
    assert down.store.tier == "file"
    up = down.moved(narrow, FeatureForm(10, 2, (1, 6, 6), torch.float32), 4, room, {})
    assert up is not None
    assert up.store.tier == "device"
    assert torch.allclose(view_of(up, 1), narrow(wider(first(images.flip(3)))), atol=1e-5)
    assert list(tmp_path.iterdir()) == [], "the file went with the move"


@torch.no_grad()
def test_where_nothing_fits_nothing_is_left(images: Tensor, tmp_path: Path) -> None:
    cache = built(images, nn.Conv2d(3, 2, 1), places(tmp_path, file=MUCH))
    form = FeatureForm(10, 2, (8, 6, 6), torch.float32)
    assert cache.moved(nn.Conv2d(2, 8, 1), form, 4, places(tmp_path, device=10, file=10), {}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [MUCH, 10])
@torch.no_grad()
def test_a_move_that_fails_leaves_no_file(images: Tensor, room: int, tmp_path: Path) -> None:
    cache = built(images, nn.Conv2d(3, 2, 1), places(tmp_path, file=MUCH))
    calls = []

    def failing(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("made up")
        return inputs

    with pytest.raises(torch.OutOfMemoryError):
        cache.moved(failing, cache.form, 4, places(tmp_path, file=room), {})
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_features_of_tokens_keep_their_layout(tmp_path: Path) -> None:
    tokens, first = torch.randn(10, 4, 8), nn.Linear(8, 3)
    cache = built(tokens, first, places(tmp_path, device=MUCH), views=1)
    batch = cache.batch(torch.tensor([5]), torch.tensor([0]))
    assert torch.allclose(batch, first(tokens[5:6]), atol=1e-6)
    assert batch.is_contiguous()


def test_sizes_and_tiers(tmp_path: Path) -> None:
    form = FeatureForm(10, 2, (5, 4, 4), torch.bfloat16)
    assert form.num_bytes == 10 * 2 * 5 * 4 * 4 * 2
    where = places(tmp_path, device=99, pinned=100, file=1000)
    assert [where.tier_of(size) for size in (99, 100, 1000, 1001)] == ["device", "pinned", "file", None]
    assert places(tmp_path).opened(0) is None
    store = where.opened(100)
    assert store is not None
    assert (store.tier, store.num_bytes) == ("pinned", 100)


def test_what_is_refused_is_noted_and_the_next_tier_tried(tmp_path: Path) -> None:
    where = places(tmp_path, device=1 << 60, file=1 << 60)
    assert where.opened(1 << 60) is None, "no machine has an exabyte"
    assert [reason.split(":")[0] for reason in where.refused] == ["device", "file"]
    assert list(tmp_path.iterdir()) == []


def test_a_shortage_is_told_from_a_fault() -> None:
    shortages = [
        MemoryError(),
        OSError(28, "No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ]
    assert all(is_shortage(error) for error in shortages)
    assert not any(is_shortage(error) for error in (RuntimeError("shapes differ"), ValueError("out of memory")))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say what memory is available")
def test_available_memory_is_a_part_of_what_there_is(tmp_path: Path) -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < available_bytes(CPU) < int(total.split()[1]) * 1024
    assert available_disk_bytes(tmp_path) > 0
    assert available_disk_bytes(tmp_path / "missing") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tier", TIERS)
def test_batches_arrive_in_order_on_the_gpu(tier: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    form = FeatureForm(1000, 1, (8, 4, 4), torch.float32)
    store = Places(device, {tier: MUCH}, tmp_path, "run").opened(form.num_bytes)
    assert store is not None
    cache = FeatureCache(form, store, device)
    features = torch.randn(1000, 8, 4, 4, device=device)
    cache.write(0, 0, features)
    store.commit(form.num_bytes, {})
    order = torch.randperm(1000).split(128)
    where = device if tier == "device" else CPU
    positions = [(part.to(where), torch.zeros_like(part).to(where)) for part in order]
    for part, batch in zip(order, cache.batches(positions), strict=True):
        assert torch.equal(batch, features[part.to(device)])
        assert batch.is_contiguous(memory_format=torch.channels_last)
