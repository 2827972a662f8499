"""Cache bookkeeping: a simulated memory shows that no sequence ever loses or shares a token."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.slabs import Place, Slabs


class Memory:
    """A flat memory in which each token is (owner, position)."""

    def __init__(self, slabs: Slabs) -> None:
        self.slabs = slabs
        self.cells: list[tuple[int, int] | None] = [None] * (len(slabs) * slabs.tokens)

    def append(self, owner: int, place: Place) -> None:
        self.carry_out()
        self.cells[self.slabs.room(place).offset + place.length] = (owner, place.length)
        place.length += 1

    def carry_out(self) -> None:
        for source, target, length in self.slabs.moves:
            assert length <= target.capacity
            nothing: list[tuple[int, int] | None] = [None] * length
            moved = nothing
            if source is not None:
                moved = self.cells[source.offset : source.offset + length]
                self.cells[source.offset : source.offset + length] = nothing
            self.cells[target.offset : target.offset + length] = moved
        self.slabs.moves.clear()

    def check(self, owner: int, place: Place) -> None:
        self.carry_out()
        start = self.slabs.room(place).offset
        assert self.cells[start : start + place.length] == [(owner, n) for n in range(place.length)]


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_sequences_keep_their_tokens_through_frees_and_growth(seed: int, count: int) -> None:
    draw = random.Random(seed)
    slabs = Slabs(count, 200)
    memory = Memory(slabs)
    held: dict[int, Place] = {}
    for step in range(120):
        action = draw.random()
        if action < 0.4:
            place = slabs.allocate(draw.randint(1, 200))
            if place is not None:
                held[step] = place
        elif held:
            owner = draw.choice(list(held))
            place = held[owner]
            if action < 0.55:
                start, length = slabs.room(place).offset, place.length
                wipe = draw.random() < 0.5
                slabs.free(held.pop(owner), wipe=wipe)
                memory.carry_out()
                if wipe:
                    assert not any(cell and cell[0] == owner for cell in memory.cells[start : start + length])
            elif place.length < place.capacity:
                for _ in range(min(7, place.capacity - place.length)):
                    memory.append(owner, place)
            elif place.capacity < 200 and slabs.grow(place, place.capacity + 1):
                assert place.length < place.capacity
        assert slabs.reserved == sum(place.capacity for place in held.values())
        for owner, place in held.items():
            memory.check(owner, place)
            assert place in slabs.rows(place.slab)
            assert slabs.rows(place.slab)[place.row] is place, "rows are dense"
    for place in list(held.values()):
        slabs.free(place)
    assert all(slabs.allocate(200) is not None for _ in range(count)), "an empty cache gives every slab again"


def test_a_full_cache_says_so() -> None:
    slabs = Slabs(1, 64)
    assert slabs.allocate(32) is not None
    assert slabs.allocate(32) is not None
    assert slabs.allocate(32) is None
    assert slabs.allocate(60) is None, "the only slab is of another class"


def test_a_row_longer_than_a_slab_is_refused() -> None:
    with pytest.raises(ValueError, match="slab of 64"):
        Slabs(2, 64).allocate(65)
