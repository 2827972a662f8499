"""Rows and results, packed and unpacked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.store.errors import StoreError
from loramill.store.packing import Chunk, compress, decompress, pack_shard, unpack_shard
from loramill.store.records import DoneRow

lines = st.binary(max_size=200).map(lambda raw: raw.replace(b"\n", b" "))
tokens = st.integers(0, 2**32 - 1)
rows = st.lists(st.builds(DoneRow, st.integers(0, 2**60), st.booleans(), lines, tokens, tokens), max_size=20)


@given(rows)
def test_a_chunk_gives_its_rows_back(rows: list[DoneRow]) -> None:
    chunk = Chunk.of(rows, range(5, 5 + len(rows)))
    assert list(chunk.rows()) == rows
    assert chunk.index["position"].tolist() == list(range(5, 5 + len(rows)))
    again = Chunk.from_bytes(chunk.to_bytes())
    assert list(again.rows()) == rows
    assert np.array_equal(again.index, chunk.index) and again.lines == chunk.lines


@given(rows)
def test_counts_are_four_numbers_a_row(rows: list[DoneRow]) -> None:
    counts = np.frombuffer(Chunk.of(rows, range(len(rows))).counts(), "<u4").reshape(-1, 4).tolist()
    assert counts == [[at, row.failed, row.prompt_tokens, row.completion_tokens] for at, row in enumerate(rows)]


def test_the_lines_of_a_chunk_are_json_lines() -> None:
    chunk = Chunk.of([DoneRow(1, False, b"{}"), DoneRow(2, True, b"[]")], [0, 1])
    assert chunk.lines == b"{}\n[]\n"
    assert len(chunk) == 2


@given(st.lists(st.tuples(st.integers(0, 2**60), lines), min_size=1, max_size=20))
def test_a_shard_gives_its_rows_back(rows: list[tuple[int, bytes]]) -> None:
    assert unpack_shard(pack_shard(rows)) == rows


def test_what_was_never_packed_is_refused() -> None:
    with pytest.raises(StoreError, match="damaged"):
        decompress(b"not zstd")
    with pytest.raises(StoreError, match="3 rows are said and 2 are there"):
        unpack_shard(compress((3).to_bytes(4, "little") + bytes(24) + b"a\nb"))


def test_lines_that_repeat_take_little_room() -> None:
    rows = [
        (row, b'{"custom_id":"%d","body":{"messages":[{"role":"user","content":"hello"}]}}' % row) for row in range(512)
    ]
    assert len(pack_shard(rows)) < sum(len(line) for _, line in rows) / 5
