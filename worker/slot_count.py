"""How many adapters are on the device at once where nobody says so. Pure: no torch, no I/O."""

from __future__ import annotations

from collections.abc import Collection

LEAST, MOST = 8, 64
"""However large or many the adapters are. With more, each has few rows of a batch, and a pass reads them all."""
_SHARE_OF_BASE = 4
_FREELY = 2**29
"""Numbers, 1 GiB in 16 bits, that adapters may take whatever the base's size."""


def slot_count(adapters: Collection[int], base: int) -> int:
    """Slots for adapters of so many numbers each, over a base of so many: one for each adapter, as long as all slots
    together take no more than a quarter of the base does, since each has the room of the largest adapter."""
    fitting = max(base // _SHARE_OF_BASE, _FREELY) // max(adapters, default=1)
    return max(LEAST, min(len(adapters), fitting, MOST))
