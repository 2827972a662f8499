"""The room that running rows have in the cache: their pages, and a table of them. Pure: no torch, no I/O."""

from __future__ import annotations

import numpy as np

from loramill.worker.pages import Pool, Prefixes
from loramill.worker.sequence import Chunk, Sequence

GROWTH_TOKENS = 256
"""How far beyond what it has a row is kept room to grow when others start: what starts and soon has to give way again
is computed twice, and room that is kept for answers that end early stays empty."""


class Room:
    """`pages` pages of `size` tokens for at most `rows` rows of at most `longest` tokens each.

    A row gets pages for the tokens that it has when it starts, and one more whenever it outgrows them. With `sharing`,
    the first of them may be pages of other rows of the same mix whose prompts begin alike.
    """

    def __init__(self, pages: int, size: int, *, rows: int, longest: int, sharing: bool = True) -> None:
        self.pool = Pool(pages, size)
        self.tables = np.zeros((rows, self.pool.pages_of(longest)), np.int32)
        """The pages of each running row in order, in its `line`; what comes after the last one is any page."""
        self._lines = list(range(rows - 1, -1, -1))
        self._prefixes = Prefixes(self.pool) if sharing else None

    @property
    def tokens(self) -> int:
        """Of the whole cache."""
        return len(self.pool) * self.pool.size

    @property
    def used(self) -> int:
        """Tokens of the pages that rows have."""
        return (len(self.pool) - self.pool.free) * self.pool.size

    def start(self, sequence: Sequence, kept: int) -> bool:
        """Give a row that starts its pages; False where fewer than `kept` would be left."""
        shared = self._shared(sequence)
        needed = self.pool.pages_of(len(sequence.tokens)) - len(shared)
        needed += sum(not self.pool.is_owned(page) for page in shared)
        if needed + kept > self.pool.free:
            return False
        for page in shared:
            self.pool.hold(page)
        sequence.line = self._lines.pop()
        sequence.pages = shared
        sequence.computed = sequence.shared = len(shared) * self.pool.size
        self.tables[sequence.line, : len(shared)] = shared
        return self.grow(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """See that a row has a page for each of its tokens; False where there is none."""
        while len(sequence.pages) * self.pool.size < sequence.length:
            page = self.pool.take()
            if page is None:
                return False
            self.tables[sequence.line, len(sequence.pages)] = page
            sequence.pages.append(page)
        return True

    def offer(self, chunk: Chunk) -> None:
        """A pass is going to compute this: others that begin alike may read what it fills, in the same pass too."""
        sequence, size = chunk.sequence, self.pool.size
        prompt = sequence.request.prompt
        if self._prefixes is not None and chunk.start < len(prompt):
            full = range(chunk.start // size, min(chunk.start + chunk.size, len(prompt)) // size)
            self._prefixes.offer(sequence.computed_with, prompt, sequence.pages, full)

    def leave(self, sequence: Sequence, *, forget: bool = False) -> None:
        """A row gives up what it has. `forget` what others could have read of it: it may not be what it should."""
        # The last page first: of a chain it is of use to the fewest.
        for page in reversed(sequence.pages):
            if forget:
                self.pool.forget(page)
            self.pool.give_up(page)
        self._lines.append(sequence.line)
        sequence.pages = []
        sequence.computed = sequence.shared = 0

    def _shared(self, sequence: Sequence) -> list[int]:
        if self._prefixes is None:
            return []
        prompt = sequence.request.prompt
        # The last token is always computed: what comes after it is drawn from its logits.
        most = min(len(prompt), len(sequence.tokens) - 1) // self.pool.size
        return self._prefixes.find(sequence.computed_with, prompt, most)

    def growth(self, sequence: Sequence) -> int:
        """Pages to keep for a row beside those for the tokens that it has."""
        room = min(sequence.longest, sequence.length + GROWTH_TOKENS)
        return max(0, self.pool.pages_of(room) - self.pool.pages_of(sequence.length))
