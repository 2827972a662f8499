"""Which adapters the rows to come will ask for, and when. Pure: no torch, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray


class Forecast:
    """The rows of one job that the engine has not been given yet, in the order in which it will be."""

    def __init__(self, order: NDArray[np.int32], adapters: Sequence[tuple[str, ...]]) -> None:
        """`order`: (rows,) the mix of each row to come, -1 for the base; `adapters`: those of each mix."""
        self._adapters = adapters
        self._taken = 0
        self._starts = np.flatnonzero(np.r_[True, order[1:] != order[:-1]][: len(order)])
        self._ends = np.r_[self._starts[1:], len(order)][: len(self._starts)]
        self._mixes = order[self._starts]
        uses: dict[str, list[NDArray[np.int64]]] = {}
        by_mix = np.argsort(self._mixes, kind="stable")
        for runs in np.split(by_mix, np.flatnonzero(np.diff(self._mixes[by_mix])) + 1):
            if len(runs) and self._mixes[runs[0]] >= 0:
                for adapter in adapters[self._mixes[runs[0]]]:
                    uses.setdefault(adapter, []).append(runs)
        self._uses = {adapter: np.sort(np.concatenate(parts)) for adapter, parts in uses.items()}

    def take(self, rows: int) -> None:
        """The engine was given the next `rows` rows."""
        self._taken += rows

    def next_use(self, adapter: str) -> float:
        """How many rows come before the next one that asks for `adapter`; infinity if none does."""
        runs = self._uses.get(adapter)
        if runs is None:
            return inf
        at = int(np.searchsorted(self._ends[runs], self._taken, side="right"))
        return max(0, int(self._starts[runs[at]]) - self._taken) if at < len(runs) else inf

    def coming(self) -> Iterator[str]:
        """The adapters of the rows to come, in their order; again for each run of rows."""
        for run in range(int(np.searchsorted(self._ends, self._taken, side="right")), len(self._starts)):
            if self._mixes[run] >= 0:
                yield from self._adapters[self._mixes[run]]
