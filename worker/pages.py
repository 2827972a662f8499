"""Who owns the pages of the cache, and which of them hold a prefix that others can read. Pure: no torch, no I/O."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from itertools import count

Label = tuple[Hashable, bytes]
"""What a page holds: what the page before it in the chain holds (by its stamp; the first by what it is computed with),
and its own tokens. Equal labels mean equal contents: nothing is told apart by a hash alone."""


class Pool:
    """`pages` pages of `size` tokens each. A page is free, or it has owners: rows that read it.

    A page with a label is found by it. It stays found when its last owner gives it up, until its room is needed: of
    those the one that was given up first goes.
    """

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self._owners = [0] * pages
        self._stamps = [0] * pages
        self._labels: list[Label | None] = [None] * pages
        self._found: dict[Label, int] = {}
        self._empty = list(range(pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # labelled and without an owner, given up first first
        self._next_stamp = count(1)

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._empty) + len(self._idle)

    def pages_of(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.size)

    def take(self) -> int | None:
        """A page with one owner and no label, or None where every page has an owner."""
        if not self._empty:
            if not self._idle:
                return None
            self.forget(next(iter(self._idle)))
        page = self._empty.pop()
        self._owners[page] = 1
        self._stamps[page] = next(self._next_stamp)
        return page

    def hold(self, page: int) -> None:
        """One more owner of a page that is labelled or has one."""
        self._idle.pop(page, None)
        self._owners[page] += 1

    def give_up(self, page: int) -> None:
        """One owner fewer."""
        self._owners[page] -= 1
        if self._owners[page]:
            return
        if self._labels[page] is None:
            self._empty.append(page)
        else:
            self._idle[page] = None

    def is_owned(self, page: int) -> bool:
        """Whether a row has it."""
        return self._owners[page] > 0

    def stamp(self, page: int) -> int | None:
        """What names the contents of a labelled page, and never another's; None for one without a label."""
        return None if self._labels[page] is None else self._stamps[page]

    def label(self, page: int, label: Label) -> bool:
        """Let an owned page be found by a label, unless another is: whether it is found now."""
        if self._found.setdefault(label, page) != page:
            return False
        self._labels[page] = label
        return True

    def find(self, label: Label) -> int | None:
        """The page of that label."""
        return self._found.get(label)

    def forget(self, page: int) -> None:
        """Take its label away, if it has one."""
        label = self._labels[page]
        if label is None:
            return
        self._labels[page] = None
        del self._found[label]
        if page in self._idle:
            del self._idle[page]
            self._empty.append(page)


class Prefixes:
    """The full pages of prompts, by what they were computed with and all tokens up to their end."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def find(self, root: Hashable, tokens: Sequence[int], most: int) -> list[int]:
        """The pages that hold the first of these tokens, at most so many."""
        size, pages, before = self._pool.size, list[int](), root
        for first in range(0, most * size, size):
            page = self._pool.find((before, _packed(tokens[first : first + size])))
            if page is None:
                break
            pages.append(page)
            before = self._pool.stamp(page)
        return pages

    def offer(self, root: Hashable, tokens: Sequence[int], pages: Sequence[int], places: range) -> None:
        """Let those of a row's pages be found, the row's prefix up to them being found already: a chain ends where
        another page was found first, or where one was forgotten."""
        for place in places:
            before = root if not place else self._pool.stamp(pages[place - 1])
            first = place * self._pool.size
            label = before, _packed(tokens[first : first + self._pool.size])
            if before is None or not self._pool.label(pages[place], label):
                return


def _packed(tokens: Sequence[int]) -> bytes:
    """Half of what a tuple takes, and nothing that the garbage collector walks: 3,000 new labels take 7 ms, not 200."""
    return array("i", tokens).tobytes()
