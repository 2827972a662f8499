"""A job's rows cut into shards: what a worker claims, runs and commits at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 512
MIN_ROWS = 16
"""Small jobs are cut so that every worker gets some, and no finer: a claim and its commits cost some milliseconds."""
MAX_BYTES = 2**20
_BLOCK = 4096


@dataclass(slots=True, frozen=True)
class Need:
    """What the rows of one mix need of a worker."""

    adapters: frozenset[str] = frozenset()
    """Keys."""
    apart: str = ""
    """Rows of another one are never in the same shard: other workers can run them, or they are served merged."""


@dataclass(slots=True, frozen=True)
class Shard:
    """Rows that run together."""

    rows: NDArray[np.int64]
    """Their positions, in the order to start: a part of the order that was cut, not a copy."""
    adapters: tuple[str, ...]
    """Keys, ascending."""


def rows_a_shard(rows: int, workers: int) -> int:
    """How large the shards of a job of `rows` are to be while so many workers run."""
    return min(MAX_ROWS, max(MIN_ROWS, -(-rows // max(1, workers))))


def cut(
    order: NDArray[np.int64],
    mix: NDArray[np.int32],
    length: NDArray[np.int32],
    needs: Sequence[Need],
    *,
    max_loras: int,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Shard]:
    """Every row of `order` in one shard, the order kept; the same for the same arguments.

    order: positions, as the plan starts them.  mix: (all rows,) position in `needs`, whose last one, -1, is the base's.
    length: (all rows,) bytes of each line.

    No shard has more than `max_rows` rows, `max_bytes` of lines with their ends or `max_loras` adapters, unless a
    single row does. One that is half full takes in no further adapter: a worker has several shards at a time, and
    the slots are for all of them.
    """
    enough = max(MIN_ROWS, max_rows // 2)
    start, size, has = 0, 0, Need()
    for at, (number, line) in enumerate(_rows(order, mix, length)):
        need = needs[number]
        if at > start and (
            at - start == max_rows
            or size + line + 1 > max_bytes
            or need.apart != has.apart
            or (
                not need.adapters <= has.adapters
                and (at - start >= enough or len(need.adapters | has.adapters) > max_loras)
            )
        ):
            yield Shard(order[start:at], tuple(sorted(has.adapters)))
            start, size = at, 0
        if at == start:
            has = need
        elif not need.adapters <= has.adapters:
            has = Need(need.adapters | has.adapters, has.apart)
        size += line + 1
    if len(order):
        yield Shard(order[start:], tuple(sorted(has.adapters)))


def _rows(order: NDArray[np.int64], mix: NDArray[np.int32], length: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Mix and length of each row: taken out of the arrays many at a time, and never all."""
    for start in range(0, len(order), _BLOCK):
        some = order[start : start + _BLOCK]
        yield from zip(mix[some].tolist(), length[some].tolist(), strict=True)
