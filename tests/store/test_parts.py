"""Payloads in the store, or in files that it speaks of."""

import uuid
from pathlib import Path

import pytest

from loramill.store.errors import StoreError
from loramill.store.packing import Chunk
from loramill.store.part_files import Files
from loramill.store.parts import fetch, fetch_chunk, keep, keep_chunk, part_name
from loramill.store.records import DoneRow, Lease

LEASE = Lease("job", 3, 2, 17, 30.0)


def a_chunk(*texts: bytes) -> Chunk:
    return Chunk.of([DoneRow(row, False, text, 1, 2) for row, text in enumerate(texts)], range(len(texts)))


def test_without_files_the_store_keeps_the_payload() -> None:
    assert fetch(None, keep(None, "a", b"payload")) == b"payload"


def test_with_files_the_store_keeps_where_it_is(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    kept = keep(files, "job/a", b"payload" * 1000)
    assert len(kept) < 200
    assert (tmp_path / "job/a").read_bytes() == b"payload" * 1000
    assert fetch(files, kept) == b"payload" * 1000


@pytest.mark.parametrize("files", [None, f"memory://{uuid.uuid4().hex}"])
def test_a_chunk_comes_back_from_its_entry(files: str | None) -> None:
    folder = None if files is None else Files(files)
    chunk = a_chunk(b"one", b"two")
    again = fetch_chunk(folder, keep_chunk(folder, "job/a", chunk))
    assert list(again.rows()) == list(chunk.rows())


def test_a_file_that_changed_or_went_is_said(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    kept = keep(files, "job/a", b"payload")
    (tmp_path / "job/a").write_bytes(b"pay")
    with pytest.raises(StoreError, match="is not what was written: 3 of 7 bytes"):
        fetch(files, kept)
    (tmp_path / "job/a").unlink()
    with pytest.raises(StoreError, match="cannot read"):
        fetch(files, kept)


def test_a_store_opened_without_its_files_says_so(tmp_path: Path) -> None:
    kept = keep(Files(str(tmp_path)), "job/a", b"payload")
    with pytest.raises(StoreError, match="give --files"):
        fetch(None, kept)


def test_a_part_is_named_after_its_lease_and_what_it_holds() -> None:
    name = part_name(LEASE, a_chunk(b"one", b"two"))
    assert name.startswith("job/part-000003-2.17-000000-")
    assert name == part_name(LEASE, a_chunk(b"one", b"two")), "the same when a commit is tried again"
    others = {
        part_name(LEASE, a_chunk(b"one", b"six")),
        part_name(Lease("job", 3, 2, 18, 30.0), a_chunk(b"one", b"two")),
    }
    assert name not in others and len(others) == 2
