"""Pages without a model: each owned by whoever may write or read it, freed once, found for what it holds alone."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.pages import Pool, Prefixes
from loramill.worker.request import Request, Sampling, plain
from loramill.worker.room import Room
from loramill.worker.sequence import Sequence

SIZE = 4
Cell = tuple[object, tuple[int, ...]]


def test_a_page_goes_from_hand_to_hand() -> None:
    pool = Pool(2, SIZE)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert (pool.free, pool.take()) == (0, None)
    pool.hold(first)
    pool.give_up(first)
    assert pool.take() is None, "it has an owner still"
    pool.give_up(first)
    assert pool.take() == first


def test_what_was_given_up_first_makes_room_first() -> None:
    pool = Pool(3, SIZE)
    for page in [pool.take() for _ in range(3)]:
        assert page is not None
        assert pool.label(page, ("root", bytes([page])))
    for page in (1, 0, 2):
        pool.give_up(page)
    assert pool.free == 3
    pool.hold(1)  # found again
    pool.give_up(1)
    assert [pool.take() for _ in range(3)] == [0, 2, 1]
    assert [pool.find(("root", bytes([page]))) for page in range(3)] == [None] * 3


def test_a_forgotten_page_is_found_by_nobody_and_ends_its_chain() -> None:
    pool = Pool(4, SIZE)
    prefixes = Prefixes(pool)
    tokens = list(range(12))
    pages = [page for _ in range(3) if (page := pool.take()) is not None]
    prefixes.offer("root", tokens, pages, range(3))
    assert prefixes.find("root", tokens, 3) == pages
    assert prefixes.find("root", tokens, 2) == pages[:2]
    assert prefixes.find("root", [*tokens[:5], 99, *tokens[6:]], 3) == pages[:1]
    assert prefixes.find("other", tokens, 3) == []
    pool.forget(pages[1])
    assert prefixes.find("root", tokens, 3) == pages[:1]
    prefixes.offer("root", tokens, pages, range(2, 3))
    assert prefixes.find("root", tokens, 3) == pages[:1], "what led to it is gone"


def test_a_page_that_was_taken_anew_leads_nowhere() -> None:
    """The page after it in an old chain must not be found behind its new contents."""
    pool = Pool(2, SIZE)
    prefixes = Prefixes(pool)
    old, new = [1] * 8, [2] * 4 + [1] * 4
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    prefixes.offer("root", old, [first, second], range(2))
    pool.give_up(first)
    assert pool.take() == first
    prefixes.offer("root", new, [first], range(1))
    assert prefixes.find("root", new, 2) == [first]
    assert prefixes.find("root", old, 2) == []


class Memory:
    """What the pages hold, written and read as a pass would: each place says of which prefix it is the end."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.cells: dict[tuple[int, int], Cell] = {}

    def compute(self, row: Sequence, size: int) -> None:
        for at in range(row.computed, row.computed + size):
            self.cells[row.pages[at // SIZE], at % SIZE] = (row.computed_with, tuple(row.tokens[: at + 1]))
        row.computed += size

    def check(self, row: Sequence) -> None:
        held = [self.cells.get((row.pages[at // SIZE], at % SIZE)) for at in range(row.computed)]
        assert held == [(row.computed_with, tuple(row.tokens[: at + 1])) for at in range(row.computed)]
        line = self.room.tables[row.line, : len(row.pages)]
        assert line.tolist() == row.pages


@given(st.randoms(use_true_random=False), st.integers(10, 40), st.booleans())
def test_rows_read_what_they_would_have_computed(draw: Random, pages: int, sharing: bool) -> None:
    """Rows with prefixes in common start, grow, fail, give way and leave in any order."""
    room = Room(pages, SIZE, rows=4, longest=pages * SIZE, sharing=sharing)
    memory, running, shared = Memory(room), list[Sequence](), 0
    for key in range(draw.randint(1, 60)):
        kind = draw.choice(["start", "start", "compute", "compute", "grow", "leave", "fail"])
        if kind == "start" and len(running) < 4:
            prompt = [1] * draw.randint(1, 9) + [draw.randrange(3) for _ in range(draw.randint(0, 5))]
            mix = plain(draw.choice([None, "a", "b"]))
            row = Sequence(Request(key, prompt, Sampling(draw.randint(1, 9)), mix, draw.random() < 0.3), 0, [*prompt])
            if room.start(row, sum(map(room.growth, running))):
                running.append(row)
                shared += row.shared
                assert row.shared < len(prompt)
        elif running and kind == "compute":
            row = draw.choice(running)
            if row.pending:
                chunk = row.chunk(draw.randint(1, row.pending))
                room.offer(chunk)
                memory.compute(row, chunk.size)
        elif running and kind == "grow":
            row = draw.choice(running)
            if not row.pending and len(row.tokens) < row.longest:
                row.tokens.append(9)
                if not room.grow(row):
                    running.remove(row)
                    room.leave(row)
        elif running:
            row = running.pop(draw.randrange(len(running)))
            room.leave(row, forget=kind == "fail")
        for row in running:
            memory.check(row)
        written = [page for row in running for page in row.pages[row.computed // SIZE :]]
        held = [page for row in running for page in row.pages]
        assert all(held.count(page) == 1 for page in written), "what is still written has one owner"
        assert room.used == SIZE * len(set(held))
    assert sharing or not shared
    for row in running:
        room.leave(row)
    assert (room.used, room.pool.free) == (0, pages), "every page came back once"
    assert len({room.pool.take() for _ in range(pages)} - {None}) == pages
