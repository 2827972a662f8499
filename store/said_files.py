"""What is said on channels of an embedded store, in files beside it: nothing is synced, and nobody waits for a lock."""

from __future__ import annotations

import base64
import hashlib
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramill.store.errors import StoreFull, StoreRefused
from loramill.store.part_files import NO_ROOM

TIDY_S = 60.0
PLACES = 4096


class SaidFiles:
    """One file a channel, to which a line is added for each thing said: a newline before it and after it, its checksum,
    and the bytes in base64. What a killed speaker left torn is then a line of its own, which nobody takes for one."""

    def __init__(self, folder: Path, kept_s: float) -> None:
        """`folder`: made when it is needed. Files that grew last `kept_s` ago are removed, now and then."""
        self._folder, self._kept_s, self._tidied_s = folder, kept_s, -TIDY_S
        self._places: dict[tuple[str, int], int] = {}
        """(channel, number) -> where in its file the search for it begins: whoever listens goes on where he was."""

    def say(self, channel: str, data: bytes) -> None:
        """Raises StoreFull, StoreRefused."""
        path, said = self._path(channel), base64.b64encode(data)
        line = b"\n%08x%s\n" % (zlib.crc32(said), said)
        with self._failures():
            if not path.exists():
                self._folder.mkdir(exist_ok=True)
                self._tidy()
            with path.open("ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise StoreFull(f"cannot write {self._folder}: its disk, or what may be used of it, is full")

    def heard(self, channel: str, start: int) -> list[bytes]:
        """From number `start` on. Raises StoreRefused."""
        place = self._places.get((channel, start), 0)
        number, end = (start, place) if place else (0, 0)
        found = []
        with self._failures():
            try:
                with self._path(channel).open("rb") as file:
                    file.seek(place)
                    lines = file.read().splitlines(keepends=True)
            except FileNotFoundError:
                return []
        for line in lines:
            place += len(line)
            if line.endswith(b"\n") and (data := _unpacked(line[:-1])) is not None:
                if number >= start:
                    found.append(data)
                number, end = number + 1, place
        if found:
            if len(self._places) >= PLACES:
                self._places.clear()
            self._places[channel, number] = end
        return found

    def _path(self, channel: str) -> Path:
        return self._folder / hashlib.sha256(channel.encode()).hexdigest()[:32]

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied_s < TIDY_S:
            return
        self._tidied_s = time.monotonic()
        for path in self._folder.iterdir():
            try:
                if path.stat().st_mtime < time.time() - self._kept_s:
                    path.unlink()
            except FileNotFoundError:
                continue  # another came first

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = StoreFull if error.errno in NO_ROOM else StoreRefused
            raise kind(f"cannot use {self._folder}: {error.strerror or error}") from error


def _unpacked(line: bytes) -> bytes | None:
    said = line[8:]
    return base64.b64decode(said) if line[:8] == b"%08x" % zlib.crc32(said) else None
