from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import threading
from pathlib import Path

import pytest
import zstandard

from loramill.producer import reader
from loramill.producer.reader import Input, InputError, open_input
from loramill.schemas.request import MAX_LINE_BYTES

BODY = b'{"a":1}\n\n  \r\n{"b":"\xc3\xa9"}\r\n{"c":3}'
LINES = [(1, b'{"a":1}'), (4, b'{"b":"\xc3\xa9"}'), (5, b'{"c":3}')]


@pytest.fixture
def spool(tmp_path: Path) -> str:
    folder = tmp_path / "spool"
    folder.mkdir()
    return str(folder)


def put(tmp_path: Path, name: str, data: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def check(source: Input, body: bytes = BODY) -> None:
    lines = list(source.lines())
    assert [(number, raw) for number, _, raw in lines] == LINES
    for _, offset, raw in reversed(lines):
        assert source.read(offset, len(raw)) == raw
    assert source.sha256 == hashlib.sha256(body).hexdigest()
    assert [(number, raw) for number, _, raw in source.lines()] == LINES


FORMS = {
    "plain.jsonl": BODY,
    "no suffix": BODY,
    "one.jsonl.gz": gzip.compress(BODY),
    "two members.gz": gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]),
    "padded.gz": gzip.compress(BODY) + bytes(3000),
    "gzip in disguise.jsonl": gzip.compress(BODY),
    "one.jsonl.zst": zstd(BODY),
    "two frames.zst": zstd(BODY[:9]) + zstd(BODY[9:]),
    "skippable frame.zst": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd(BODY),
    "empty frame first.zst": zstd(b"") + zstd(BODY),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_lines(tmp_path: Path, spool: str, name: str) -> None:
    with open_input(put(tmp_path, name, FORMS[name]), spool) as source:
        check(source)
        assert not list(Path(spool).iterdir())


def test_a_plain_file_is_not_copied(tmp_path: Path) -> None:
    with open_input(put(tmp_path, "in.jsonl", BODY), str(tmp_path / "missing")) as source:
        check(source)


@pytest.mark.parametrize("data", [BODY, gzip.compress(BODY), zstd(BODY)], ids=["plain", "gzip", "zstd"])
def test_stdin(data: bytes, spool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, given = os.pipe()
    os.write(given, data)
    os.close(given)
    with os.fdopen(taken, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with open_input("-", spool) as source:
            assert source.name == "stdin"
            check(source)


def test_a_pipe_by_its_path(tmp_path: Path, spool: str) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(BODY,))
    writer.start()
    with open_input(str(path), spool) as source:
        check(source)
    writer.join()


def test_bom_is_skipped_and_offsets_hold(tmp_path: Path, spool: str) -> None:
    with open_input(put(tmp_path, "in", b"\xef\xbb\xbf" + BODY), spool) as source:
        check(source, b"\xef\xbb\xbf" + BODY)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf_16_is_named(tmp_path: Path, spool: str, encoding: str) -> None:
    data = ("\ufeff" if encoding.endswith("be") else "") + '{"a":1}'
    with (
        open_input(put(tmp_path, "in", data.encode(encoding)), spool) as source,
        pytest.raises(InputError, match=r"in:1: the file is UTF-16"),
    ):
        list(source.lines())


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_empty(tmp_path: Path, spool: str, data: bytes, pack: object) -> None:
    assert callable(pack)
    with (
        open_input(put(tmp_path, "in", pack(data)), spool) as source,
        pytest.raises(InputError, match="in: the file is empty"),
    ):
        list(source.lines())


@pytest.mark.parametrize("name", ["in.gz", "in.zst"])
def test_empty_packed_file(tmp_path: Path, spool: str, name: str) -> None:
    with open_input(put(tmp_path, name, b""), spool) as source, pytest.raises(InputError, match="empty"):
        list(source.lines())


BIG = b"".join(b'{"n":%d}\n' % number for number in range(20_000))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("torn.gz", gzip.compress(BIG)[:-1], "gzip data is torn"),
        ("torn.gz", gzip.compress(BIG)[:2000], "gzip data is torn"),
        ("torn member.gz", gzip.compress(BIG) + gzip.compress(BIG)[:50], "gzip data is torn"),
        ("torn.zst", zstd(BIG)[:-1], "zstd data is torn"),
        ("torn.zst", zstd(BIG)[:3000], "zstd data is torn"),
        ("torn frame.zst", zstd(BIG) + zstd(BIG)[:50], "zstd data is torn"),
        ("bad.gz", gzip.compress(BIG)[:-8] + b"\0" * 8, "gzip data is damaged"),
        ("bad.gz", gzip.compress(BIG) + b"tail", "gzip data is damaged"),
        ("bad.zst", zstd(BIG) + b"tail", "zstd data is damaged"),
        ("named.gz", BIG, "not gzip"),
        ("named.zst", gzip.compress(BIG), "not zstd"),
    ],
)
def test_torn_and_damaged(tmp_path: Path, spool: str, name: str, data: bytes, words: str) -> None:
    path = put(tmp_path, name, data)
    with pytest.raises(InputError) as caught:
        open_input(path, spool)
    assert str(caught.value).startswith(path + ": ")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path(spool).iterdir())


def test_paths_that_cannot_be_read(tmp_path: Path, spool: str) -> None:
    for path, words in ((tmp_path / "missing", "No such file"), (tmp_path, "directory")):
        with pytest.raises(InputError, match=words) as caught:
            open_input(str(path), spool)
        assert str(path) in str(caught.value)


def test_a_missing_spool_folder_is_not_the_inputs_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_input(put(tmp_path, "in.gz", gzip.compress(BODY)), str(tmp_path / "missing"))


def test_a_bomb_is_refused(tmp_path: Path, spool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_FREE_BYTES", 2**20)
    bomb = put(tmp_path, "in.zst", zstd(bytes(2**25)))
    with pytest.raises(InputError, match="1000 times its size"):
        open_input(bomb, spool)
    fine = put(tmp_path, "in.gz", gzip.compress(b'{"prompt":"the same words again"}\n' * 100_000))
    with open_input(fine, spool) as source:
        assert sum(1 for _ in source.lines()) == 100_000


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_the_line_cap(tmp_path: Path, spool: str, end: bytes) -> None:
    at_cap = b"x" * MAX_LINE_BYTES
    over = b"y" * (3 * MAX_LINE_BYTES)
    path = put(tmp_path, "in", b"\n".join([b"a", over, at_cap, b"b", at_cap + b"z"]) + end)
    with open_input(path, spool) as source:
        lines = list(source.lines())
        assert [(number, len(raw), raw[:1]) for number, _, raw in lines] == [
            (1, 1, b"a"),
            (2, MAX_LINE_BYTES + 1, b"y"),
            (3, MAX_LINE_BYTES, b"x"),
            (4, 1, b"b"),
            (5, MAX_LINE_BYTES + 1, b"x"),
        ]
        assert all(source.read(offset, len(raw)) == raw for _, offset, raw in lines)
        assert source.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_sha256_is_of_the_whole_file_even_when_the_scan_stopped_early(tmp_path: Path, spool: str) -> None:
    with open_input(put(tmp_path, "in", BODY), spool) as source:
        next(source.lines())
        assert source.sha256 == hashlib.sha256(BODY).hexdigest()


def test_a_file_that_changes_under_our_hands_is_noticed(tmp_path: Path, spool: str) -> None:
    path = Path(put(tmp_path, "in", BODY))
    with open_input(str(path), spool) as source:
        assert source.read(0, 7) == BODY[:7]
        path.write_bytes(BODY.replace(b"1", b"2"))
        os.utime(path, ns=(0, 0))
        with pytest.raises(InputError, match="changed while it was being read"):
            source.read(0, 7)


def test_a_spooled_file_vanishes(tmp_path: Path, spool: str) -> None:
    source = open_input(put(tmp_path, "in.gz", gzip.compress(BODY)), spool)
    source.close()
    assert not list(Path(spool).iterdir())
    with pytest.raises(ValueError):
        next(source.lines())


def test_reading_packed_data_is_bounded_in_memory() -> None:
    file = io.BufferedReader(io.BytesIO(zstd(bytes(2**27))))  # type: ignore[arg-type]
    assert max(len(chunk) for _, chunk in reader._unpack(file, "zstd")) <= 2**26
