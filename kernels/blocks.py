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

DECODE_ROWS = 16
"""Rows of a tile of a sequence with one query row: the least that tensor cores take, mostly more than a group has."""
MOST_PARTS = 32
"""Parts of a long cache at most: what one program adds."""
GATED_BLOCKS = Blocks(1, 1024, 4, 1)
"""Columns (k) that one program multiplies."""


def padded(size: int) -> int:
    """The power of two that a head of this size takes."""
    return max(16, 1 << (size - 1).bit_length())


def attend_blocks(dim: int, itemsize: int, aligned: bool, hip: bool, one: bool) -> tuple[int, Blocks]:
    """Rows of a tile, and the keys (n) that are met at once; `dim` is the padded head size.

    What spills nothing: float32 multiplies without tensor cores, and AMD's masked loads take scalar registers by key.
    """
    if not aligned:
        return DECODE_ROWS, Blocks(16, dim, 4, 2)
    if itemsize == 4:
        return 16 if one or dim > 128 else 32, Blocks(32 if dim <= 64 and not hip else 16, dim, 4, 3 if one else 2)
    if one:
        return DECODE_ROWS, Blocks((64 if dim <= 128 else 32) // (2 if hip else 1), dim, 4, 3)
    return 128 if dim <= 128 else 64, Blocks(16 if hip else 64 if dim <= 64 else 32, dim, 8, 3)


def combine_blocks(dim: int) -> Blocks:
    """All parts at once."""
    return Blocks(MOST_PARTS, dim, 4, 1)


def store_blocks(dim: int) -> Blocks:
    """Heads that one program stores."""
    return Blocks(max(1, 1024 // dim), dim, 4, 1)


def norm_blocks(columns: int) -> Blocks:
    """A whole row in one program, 32 numbers in each thread at most."""
    size = padded(columns)
    return Blocks(1, size, max(1, min(16, size // 512)), 1)


def rope_blocks(dim: int) -> Blocks:
    """Heads that one program turns, and half of a head."""
    half = padded(dim) // 2
    return Blocks(max(1, 1024 // half), half, 4, 1)
