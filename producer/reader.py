"""The input file: a seekable view of its uncompressed lines, wherever it comes from."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, cast

import zstandard

from loramill.schemas.errors import ErrorCode
from loramill.schemas.request import MAX_LINE_BYTES

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; parallel zstd starts its files so
_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 2**20
# One call turns 4 bytes of zstd into at most 128 KiB: small pieces bound the memory.
_PACKED_CHUNK = 2**10
# A file of near-equal rows packs a few hundredfold; beyond both bounds it is a bomb.
_FREE_BYTES = 2**30
_MAX_RATIO = 1000


class InputError(Exception):
    """The input as a whole cannot be used; the message is one line that names the file."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID_REQUEST) -> None:
        super().__init__(message)
        self.code = code


class Input:
    """The lines of one input: scanned once in order, then read again by offset. Made by `open_input`."""

    def __init__(self, name: str, file: io.BufferedReader | io.BufferedRandom) -> None:
        """`file` is a seekable regular file of uncompressed bytes; it is closed with this object."""
        self.name = name
        """The path as given, for messages."""
        self._file = file
        self._state = self._stat()
        self._sha256: str | None = None

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Every non-blank line in order: its number (from 1), its byte offset, its bytes without the line end.

        Of a line over the cap only `MAX_LINE_BYTES + 1` bytes are given, which `parse_line` refuses.
        Raises InputError when there is none, or the file is UTF-16.
        """
        try:
            yield from self._scan()
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def _scan(self) -> Iterator[tuple[int, int, bytes]]:
        file = self._file
        file.seek(0)
        digest = hashlib.sha256()
        offset = 0
        number = 0
        empty = True
        while raw := file.readline(MAX_LINE_BYTES + 2):
            digest.update(raw)
            number += 1
            start = offset
            offset += len(raw)
            while not raw.endswith(b"\n") and len(raw) > MAX_LINE_BYTES and (rest := file.readline(_CHUNK)):
                digest.update(rest)
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            if number == 1:
                self._refuse_wide(raw)
                if raw.startswith(_BOM):
                    raw = raw[len(_BOM) :]
                    start += len(_BOM)
            line = raw.rstrip(b" \t\r\n")[: MAX_LINE_BYTES + 1]
            if line:
                empty = False
                yield number, start, line
        self._sha256 = digest.hexdigest()
        if empty:
            raise InputError(f"{self.name}: the file is empty", ErrorCode.EMPTY_FILE)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of one line again. Raises InputError when the file has changed since it was opened."""
        raw = os.pread(self._file.fileno(), length, offset)
        if len(raw) != length or self._stat() != self._state:
            raise InputError(f"{self.name}: the file changed while it was being read")
        return raw

    @property
    def sha256(self) -> str:
        """Of all the uncompressed bytes, in hex; free once `lines` has been exhausted."""
        if self._sha256 is None:
            self._file.seek(0)
            self._sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        return self._sha256

    def close(self) -> None:
        """Close the file; a spooled copy is gone with it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stat(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def _refuse_wide(self, raw: bytes) -> None:
        if raw.startswith(_WIDE_BOMS):
            raise InputError(f"{self.name}:1: the file is UTF-16; save it as UTF-8", ErrorCode.INVALID_JSON_LINE)


def open_input(path: str, spool_dir: str, *, max_bytes: int | None = None) -> Input:
    """Open a file of lines, plain, gzip or zstd, or `-` for stdin.

    A plain regular file is read in place. Anything else is copied, uncompressed, into an unnamed temporary file in
    `spool_dir`, which vanishes at `close`; `max_bytes` is what it may come to. Raises InputError; OSError is about the
    spool (folder missing, disk full).
    """
    if path == "-":
        return _spool("stdin", cast(io.BufferedReader, sys.stdin.buffer), spool_dir, max_bytes)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("rb"))
            in_place = stat.S_ISREG(os.fstat(file.fileno()).st_mode) and _compression(path, file) is None
        except OSError as error:
            raise _unreadable(path, error) from None
        if not in_place:
            return _spool(path, file, spool_dir, max_bytes)
        stack.pop_all()
        return Input(path, file)


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(f"{name}: cannot be read: {error.strerror or error}")


def _compression(name: str, file: io.BufferedReader) -> str | None:
    head = file.peek(4)[:4]
    found = "gzip" if head[:2] == _GZIP else "zstd" if head == _ZSTD or head[1:] == _ZSTD_SKIPPABLE else None
    wanted = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    if head and wanted not in (None, found):
        raise InputError(f"{name}: the file is not {wanted}, whatever its name says")
    return found


def _spool(name: str, file: io.BufferedReader, spool_dir: str, max_bytes: int | None) -> Input:
    with ExitStack() as stack:
        target = stack.enter_context(tempfile.TemporaryFile(dir=spool_dir))
        for chunk in _chunks(name, file):
            if max_bytes is not None and target.tell() + len(chunk) > max_bytes:
                raise InputError(f"{name}: unpacks to more than {max_bytes} bytes")
            target.write(chunk)
        target.flush()
        stack.pop_all()
        return Input(name, target)


def _chunks(name: str, file: io.BufferedReader) -> Iterator[bytes]:
    """The uncompressed bytes, in pieces. Raises InputError where they are torn or not what they claim to be."""
    try:
        compression = _compression(name, file)
        if compression is None:
            while chunk := file.read(_CHUNK):
                yield chunk
            return
        taken = given = 0
        for packed, chunk in _unpack(file, compression):
            taken, given = packed, given + len(chunk)
            if given > _FREE_BYTES and given > _MAX_RATIO * taken:
                raise InputError(f"{name}: unpacks to more than {_MAX_RATIO} times its size")
            yield chunk
    except EOFError:
        raise InputError(f"{name}: the {compression} data is torn: it ends too early") from None
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{name}: the {compression} data is damaged: {error}") from None
    except OSError as error:
        raise _unreadable(name, error) from None


def _unpack(file: io.BufferedReader, compression: str) -> Iterator[tuple[int, bytes]]:
    """Pieces of uncompressed bytes, each with how many bytes of `file` were taken so far; members follow each other.

    With decompression objects, as zstandard's stream reader takes a torn frame for the end of the file.
    """
    member: Any = None
    taken = 0
    while data := file.read(_PACKED_CHUNK):
        taken += len(data)
        while data:
            if member is None:
                data = data.lstrip(b"\0") if taken > len(data) else data  # tapes and block devices pad with zeros
                if not data:
                    break
                is_gzip = compression == "gzip"
                member = (
                    zlib.decompressobj(zlib.MAX_WBITS | 16) if is_gzip else zstandard.ZstdDecompressor().decompressobj()
                )
            yield taken, member.decompress(data)
            data = b""
            if member.eof:
                data, member = member.unused_data, None
    if member is not None:
        raise EOFError
