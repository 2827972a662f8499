"""Adapters between disk and slots: bounds, who goes, and what is read ahead."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramill.worker.adapters import Adapter, AdapterError, open_adapter
from loramill.worker.host_form import HostForm
from loramill.worker.host_tier import HostTier
from loramill.worker.slots import Eviction

MakeTier = Callable[..., HostTier]


@pytest.fixture
def adapters(family: Callable[[str], Any]) -> list[Adapter]:
    return list(family("llama").adapters)


@pytest.fixture
def make_tier() -> Iterator[MakeTier]:
    made: list[HostTier] = []

    def make(**options: Any) -> HostTier:
        settings_ = {"max_count": None, "max_bytes": 10**9, "eviction": Eviction.PLAN}
        made.append(
            HostTier(HostForm((), torch.float32, pin=False), **{**settings_, "next_use": lambda name: inf, **options})
        )
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def test_what_is_held_is_not_read_again(make_tier: MakeTier, adapters: list[Adapter]) -> None:
    tier = make_tier()
    first = tier.take(adapters[0])
    assert tier.take(adapters[0]) is first
    assert (tier.stats.loads, tier.stats.hits, tier.stats.evictions) == (1, 1, 0)
    assert tier.stats.bytes_read == tier.stats.most_bytes == first.nbytes == adapters[0].nbytes(torch.float32)
    tier.drop(adapters[0].sha256)
    assert tier.take(adapters[0]) is not first


def test_what_is_read_ahead_is_a_hit(make_tier: MakeTier, adapters: list[Adapter]) -> None:
    tier = make_tier()
    tier.preload(adapters[:3])
    assert tier.stats.loads == 3
    for adapter in adapters[:3]:
        tier.take(adapter)
    assert (tier.stats.loads, tier.stats.hits) == (3, 3)


@pytest.mark.parametrize(
    ("eviction", "gone"), [(Eviction.PLAN, 1), (Eviction.LRU, 2), (Eviction.FIFO, 0)], ids=lambda value: str(value)
)
def test_who_goes(make_tier: MakeTier, adapters: list[Adapter], eviction: Eviction, gone: int) -> None:
    next_use = {adapters[0].sha256: 5, adapters[1].sha256: 90, adapters[2].sha256: 7}
    tier = make_tier(max_count=3, eviction=eviction, next_use=lambda name: next_use.get(name, inf))
    held = {number: tier.take(adapters[number]) for number in (0, 1, 2, 1, 0)}
    tier.take(adapters[3])
    for number in {0, 1, 2} - {gone}:
        assert tier.take(adapters[number]) is held[number]
    assert tier.stats.evictions == 1


def test_reading_ahead_puts_out_nothing_that_is_needed_sooner(make_tier: MakeTier, adapters: list[Adapter]) -> None:
    next_use = {adapter.sha256: number for number, adapter in enumerate(adapters)}
    tier = make_tier(max_count=2, next_use=lambda name: next_use.get(name, inf))
    held = [tier.take(adapters[0]), tier.take(adapters[2])]
    tier.prefetch(adapters[3:])
    assert [tier.take(adapters[0]), tier.take(adapters[2])] == held
    tier.prefetch([adapters[1]])
    tier.take(adapters[1])
    assert tier.take(adapters[0]) is held[0]
    assert tier.stats.evictions == 1


def test_the_pinned_stay(make_tier: MakeTier, adapters: list[Adapter]) -> None:
    tier = make_tier(max_count=2, pinned=frozenset({adapters[0].sha256}))
    first = tier.take(adapters[0])
    for adapter in adapters[1:]:
        tier.take(adapter)
    assert tier.take(adapters[0]) is first


def test_one_that_can_never_be_held_is_named(make_tier: MakeTier, adapters: list[Adapter]) -> None:
    size = adapters[0].nbytes(torch.float32)
    assert make_tier(max_bytes=size).refuses(adapters[0]) is None
    assert f"{size:,} bytes are more than the {size - 1:,}" in str(make_tier(max_bytes=size - 1).refuses(adapters[0]))


def test_files_that_changed_are_refused_also_when_read_ahead(
    make_tier: MakeTier, family: Callable[[str], Any], tmp_path: Path
) -> None:
    one = family("llama")
    folder = shutil.copytree(one.adapter_folders[0], tmp_path / "a")
    adapter = open_adapter(str(folder), one.base, max_rank=64)
    shutil.copytree(one.adapter_folders[2], folder, dirs_exist_ok=True)
    tier = make_tier()
    with pytest.raises(AdapterError, match="changed"):
        tier.take(adapter)
    tier.prefetch([adapter])
    with pytest.raises(AdapterError, match="changed"):
        tier.take(adapter)
    assert not tier.stats.loads


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=30),
    st.sampled_from(Eviction),
    st.integers(1, 4),
    st.integers(100, 300),
)
def test_the_bounds_hold(
    make_tier: MakeTier,
    adapters: list[Adapter],
    uses: list[tuple[bool, int]],
    eviction: Eviction,
    count: int,
    percent: int,
) -> None:
    sizes = {adapter.sha256: adapter.nbytes(torch.float32) for adapter in adapters}
    bound = max(sizes.values()) * percent // 100
    tier = make_tier(max_count=count, max_bytes=bound, eviction=eviction)
    for ahead, number in uses:
        if ahead:
            tier.prefetch([adapters[number]])
        else:
            assert tier.take(adapters[number]).nbytes == sizes[adapters[number].sha256]
        named = [*tier._held, *tier._coming]
        assert len(named) <= count
        assert sum(sizes[name] for name in named) <= bound
