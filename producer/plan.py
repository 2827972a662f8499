"""In which order the rows go to the engine. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def plan_order(
    adapter: NDArray[np.int32], cost: NDArray[np.int64], *, slots: int, max_num_seqs: int
) -> NDArray[np.int64]:
    """The positions of the rows in the order in which the engine should start them.

    adapter: (rows,) adapter of each row, -1 for the base.  cost: (rows,) its tokens, prompt and answer.
    slots: adapters that fit on the device at once.  max_num_seqs: rows that run at once.

    The rows of one adapter keep together, longest first, so that it is loaded once and its short rows fill the gaps
    at its end. Adapters with few rows cannot fill a batch by themselves, so they come first, a slot short of as many
    as fit at a time, and rows of the base or of the heaviest adapters fill up the batch beside them.
    """
    if not len(adapter):
        return np.empty(0, np.int64)
    groups = _group(adapter, cost)
    adapters = sorted((name for name in groups if name >= 0), key=lambda name: (groups[name].work, name))
    if len(adapter) <= 2 * max_num_seqs or len(adapters) <= slots:
        return _join([groups[name].rows for name in [*reversed(adapters), *(name for name in groups if name < 0)]])
    fillers = [groups[name] for name in groups if name < 0]
    return _join(_interleave([groups[name] for name in adapters], fillers, slots, max_num_seqs))


class _Group:
    """The rows of one adapter, longest first."""

    def __init__(self, rows: Rows, work: int) -> None:
        self.rows = rows
        self.work = work

    def take(self, count: int) -> Rows:
        taken, self.rows = self.rows[:count], self.rows[count:]
        return taken


def _group(adapter: NDArray[np.int32], cost: NDArray[np.int64]) -> dict[int, _Group]:
    order = np.lexsort((-cost, adapter))  # stable: equal rows stay in input order
    sorted_adapter = adapter[order]
    starts = np.flatnonzero(np.r_[True, sorted_adapter[1:] != sorted_adapter[:-1]])
    ends = np.r_[starts[1:], len(order)]
    return {
        int(sorted_adapter[start]): _Group(order[start:end], int(cost[order[start:end]].sum()))
        for start, end in zip(starts, ends, strict=True)
    }


def _interleave(light: list[_Group], base: list[_Group], slots: int, max_num_seqs: int) -> list[Rows]:
    """`light` by ascending work: taken from the front a few at a time, and from the back to fill up beside them."""
    beside = max(1, slots - 1)  # one slot is the filler's
    out: list[Rows] = []
    filler: _Group | None = None
    while light:
        group, light = light[:beside], light[beside:]
        out += [one.rows for one in group]
        missing = max_num_seqs - sum(len(one.rows) for one in group)
        if missing <= 0 and filler and filler in light:
            # Not needed for a while: finished here, as the engine would evict what it sees no rows of.
            missing = len(filler.rows)
        while missing > 0:
            filler = base[0] if base else light[-1] if light and slots > 1 else None
            if filler is None:
                break
            taken = filler.take(missing)
            missing -= len(taken)
            out.append(taken)
            if not len(filler.rows):
                (base or light).pop()
    return out + [one.rows for one in base]


def _join(parts: list[Rows]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64, copy=False)
