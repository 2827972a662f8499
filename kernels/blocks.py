"""Every block size that a kernel can be launched with. Pure: no torch, no triton.

The list is short and finite on purpose: a test compiles all of it, for every architecture, before any device sees it.
A plan chooses from it and from nothing else. Sizes of shapes the hardware prefers; which of them a shape gets is the
plan's to say.
"""

from __future__ import annotations

from dataclasses import dataclass

HEIGHTS = (16, 64, 128)
"""Rows a tile can have: 16 is the least that tensor cores take, 64 and 128 are one and two Hopper warp groups."""


@dataclass(slots=True, frozen=True)
class Blocks:
    """A block of `n` columns and `k` of the reduced dimension, the warps of a program and its loads in flight."""

    n: int
    k: int
    warps: int
    stages: int


def plain_shrink(height: int) -> Blocks:
    """The blocks of shapes that are not aligned: small, since addresses one by one take the registers."""
    return Blocks(32, 32, 8 if height == 128 else 4, 2)


def plain_expand(height: int) -> Blocks:
    """As `plain_shrink`; the columns are those that spill nothing in Triton 3.6, 3.7 and 3.9."""
    return {16: Blocks(64, 16, 4, 2), 64: Blocks(16, 16, 8, 2), 128: Blocks(32, 16, 8, 2)}[height]


def shrink_blocks(height: int, itemsize: int) -> tuple[Blocks, ...]:
    """Blocks of the grouped shrink for tiles of `height` rows."""
    if itemsize == 4:  # float32 multiplies without tensor cores: small blocks, or accumulators spill
        return (Blocks(32, 32, 4, 3),)
    if height == 16:
        return Blocks(32, 128, 4, 4), Blocks(64, 128, 4, 4)
    return Blocks(64, 128, 4, 3) if height == 64 else Blocks(64, 64, 8, 3), Blocks(128, 64, 8, 3)


def expand_blocks(height: int, itemsize: int) -> tuple[Blocks, ...]:
    """Blocks of the grouped expand: `k` columns of the rank at once."""
    if itemsize == 4:
        return (Blocks(32 if height == 64 else 64, 16, 4 if height == 16 else 8, 2),)
    if height == 16:
        return Blocks(128, 16, 4, 3), Blocks(128, 32, 4, 3)
    if height == 64:
        return Blocks(64, 16, 4, 2), Blocks(64, 32, 8, 2)
    return (Blocks(64, 16, 8, 2),)


ROW_SHRINK, PLAIN_ROW_SHRINK = Blocks(16, 256, 4, 2), Blocks(8, 128, 4, 2)
ROW_EXPAND, PLAIN_ROW_EXPAND = Blocks(256, 16, 4, 2), Blocks(128, 16, 4, 2)
"""Blocks of the forms that give each row programs of its own: 32 numbers of a weight in each thread."""
