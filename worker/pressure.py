"""How large a pass may be where memory turns out to be short. Pure: no torch, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

ATTEMPTS = 3
"""Times that a row may run out of memory with nothing beside it before it fails."""
RECOVERY_PASSES = 256
"""Passes that went well before twice as much is tried again: the row that was too much may be gone, or whoever else
used the device. If not, starting over costs less than 1% of them."""


class Pressure:
    """The limits of a pass: what was asked for, or less since passes ran out of memory."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._asked = max_num_seqs, max_num_batched_tokens
        self._good = 0
        self._lone: int | None = None
        self._attempts = 0

    def ran_out(self, keys: Sequence[int], tokens: int) -> int | None:
        """A pass with sequences of these rows (at least one), computing so many tokens, ran out of memory: it is
        halved. The key of the row to give up, if it has been alone in ATTEMPTS such passes in a row."""
        self._good = 0
        self.max_num_seqs = max(1, len(keys) // 2)
        self.max_num_batched_tokens = max(self.max_num_seqs, tokens // 2)
        lone = keys[0] if len(keys) == 1 else None
        self._attempts = self._attempts + 1 if lone is not None and lone == self._lone else 1
        self._lone = lone
        if lone is None or self._attempts < ATTEMPTS:
            return None
        self._lone = None
        self.max_num_seqs, self.max_num_batched_tokens = self._asked  # it was too much by itself: others may not be
        return lone

    def went_well(self) -> None:
        """A pass did not run out."""
        if (self.max_num_seqs, self.max_num_batched_tokens) == self._asked:
            return
        self._good += 1
        if self._good == RECOVERY_PASSES:
            self._good = 0
            self.max_num_seqs = min(self._asked[0], 2 * self.max_num_seqs)
            self.max_num_batched_tokens = min(self._asked[1], 2 * self.max_num_batched_tokens)
