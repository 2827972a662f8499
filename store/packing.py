"""Rows and results as the store keeps them: compressed, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from loramill.store.errors import StoreError
from loramill.store.records import DoneRow

LEVEL = 3
INDEX = np.dtype(
    [
        ("position", "<u4"), ("failed", "<u4"), ("prompt_tokens", "<u4"), ("completion_tokens", "<u4"),
        ("row", "<u8"), ("length", "<u4"),
    ]
)  # fmt: skip
"""One row of a chunk; `position` is its place in its shard, `length` its line's in bytes."""


@dataclass(slots=True, frozen=True)
class Chunk:
    """Results of some rows of one shard: what is committed at once."""

    index: NDArray[np.void]
    """(rows,) of INDEX."""
    lines: bytes
    """The lines one after another, each ended by a newline, which `length` counts."""

    @classmethod
    def of(cls, rows: Sequence[DoneRow], positions: Sequence[int]) -> Chunk:
        """`positions` are the rows' places in their shard."""
        index = np.empty(len(rows), INDEX)
        for at, (row, position) in enumerate(zip(rows, positions, strict=True)):
            length = len(row.line) + 1
            index[at] = (position, row.failed, row.prompt_tokens, row.completion_tokens, row.row, length)
        return cls(index, b"".join(part for row in rows for part in (row.line, b"\n")))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Chunk:
        """What `to_bytes` made."""
        split = 4 + int.from_bytes(raw[:4], "little") * INDEX.itemsize
        return cls(np.frombuffer(raw[4:split], INDEX), raw[split:])

    def to_bytes(self) -> bytes:
        """For another process, uncompressed."""
        return len(self.index).to_bytes(4, "little") + self.index.tobytes() + self.lines

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> Iterator[DoneRow]:
        """Every row, in order."""
        start = 0
        for one in self.index:
            end = start + int(one["length"])
            line = self.lines[start : end - 1]
            tokens = int(one["prompt_tokens"]), int(one["completion_tokens"])
            yield DoneRow(int(one["row"]), bool(one["failed"]), line, *tokens)
            start = end

    def counts(self) -> bytes:
        """(rows, 4) unsigned 32 bits, little-endian: position, failed, prompt and completion tokens. For the store's
        own counting, which must look at every row and at no line."""
        return (
            self.index[["position", "failed", "prompt_tokens", "completion_tokens"]].astype("<u4,<u4,<u4,<u4").tobytes()
        )


def pack_shard(rows: Sequence[tuple[int, bytes]]) -> bytes:
    """A shard's rows, compressed."""
    numbers = np.array([number for number, _ in rows], "<u8").tobytes()
    lines = b"\n".join(line for _, line in rows)
    return compress(len(rows).to_bytes(4, "little") + numbers + lines)


def unpack_shard(blob: bytes) -> list[tuple[int, bytes]]:
    """(row number, line) of each row. Raises StoreError for what `pack_shard` never made."""
    raw = decompress(blob)
    count = int.from_bytes(raw[:4], "little")
    numbers = np.frombuffer(raw, "<u8", count, 4).tolist()
    lines = raw[4 + 8 * count :].split(b"\n")
    if len(lines) != count:
        raise StoreError(f"a stored shard is damaged: {count} rows are said and {len(lines)} are there")
    return list(zip(numbers, lines, strict=True))


def compress(raw: bytes) -> bytes:
    """With zstd; safe in any thread."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(raw)


def decompress(blob: bytes) -> bytes:
    """Raises StoreError for what `compress` never made."""
    try:
        return zstandard.ZstdDecompressor().decompress(blob)
    except zstandard.ZstdError as error:
        raise StoreError(f"stored data is damaged: {error}") from error
