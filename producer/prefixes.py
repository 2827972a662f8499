"""Prompts that begin alike: some bits of each prompt's beginnings, and an order in which such rows meet. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

DEPTHS = (16, 64, 256, 1024)
"""Tokens of the beginnings that are compared. Rows that have in common what lies between two of them meet as those do
that have the smaller one in common."""
_BITS = 15
"""Of each beginning. Two beginnings with the same bits (one pair in 32,768) only come to be neighbours."""


def beginnings(prompt: Sequence[int]) -> int:
    """The prompt's beginnings, shortest first, in one number of 60 bits; the same in every process."""
    key = 0
    for depth in DEPTHS:
        key = key << _BITS | hash(tuple(prompt[:depth])) & (1 << _BITS) - 1
    return key


def turns(mix: NDArray[np.int32], length: Ints, begins: Ints | None, prompt: Ints | None) -> Ints:
    """(rows,) the turn of each row: longest first, but rows of one mix that begin alike together.

    Where some begin alike, theirs is the turn of the longest of them, and among them the same holds for what they have
    in common beyond. Of equal length, rows of a mix are side by side, of those equal prompts are, and what is equal in
    all stays in input order.

    length: (rows,) greater for longer ones.  begins: (rows,) what `beginnings` gave.  prompt: (rows,) equal for equal
    prompts.
    """
    keys: list[Ints] = []  # the first decides
    _, group = np.unique(mix, return_inverse=True)
    groups, of_mix = 0, group.astype(np.int64)
    for level in range(len(DEPTHS) if begins is not None else 0):
        assert begins is not None
        part = begins >> (len(DEPTHS) - 1 - level) * _BITS & (1 << _BITS) - 1
        found, first, group = np.unique(group << _BITS | part, return_index=True, return_inverse=True)
        if len(found) > groups:
            groups = len(found)
            longest = np.zeros(groups, np.int64)
            np.maximum.at(longest, group, length)
            keys += [-longest[group], of_mix, first[group]]
    keys += [-length, of_mix]
    if prompt is not None:
        _, first, which = np.unique(prompt, return_index=True, return_inverse=True)
        keys.append(first[which])
    turn = np.empty(len(mix), np.int64)
    turn[np.lexsort(keys[::-1])] = np.arange(len(mix))
    return turn
