"""Frames over real pipes."""

import os
from typing import BinaryIO

import pytest

from loramill.worker.frames import MAX_BYTES, Frame, Kind, read_frame, write_frame


@pytest.fixture
def pipe() -> tuple[BinaryIO, BinaryIO]:
    read, write = os.pipe()
    return os.fdopen(read, "rb"), os.fdopen(write, "wb")


def test_frames_come_as_they_were_written(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    inbound, out = pipe
    write_frame(out, Kind.SHARD, b"\0blob", key=3, skip="80", alone=[1, 2])
    write_frame(out, Kind.BEAT, steps=1, busy=True)
    out.close()
    assert read_frame(inbound) == Frame(Kind.SHARD, {"key": 3, "skip": "80", "alone": [1, 2]}, b"\0blob")
    assert read_frame(inbound) == Frame(Kind.BEAT, {"steps": 1, "busy": True})
    assert read_frame(inbound) is None
    inbound.close()


@pytest.mark.parametrize("cut", [3, 8, 12, -1])
def test_a_writer_that_died_amid_a_frame_has_closed_the_pipe(cut: int, pipe: tuple[BinaryIO, BinaryIO]) -> None:
    inbound, out = pipe
    first, second = os.pipe()
    with os.fdopen(second, "wb") as whole:
        write_frame(whole, Kind.ROWS, b"lines", key=1)
    with os.fdopen(first, "rb") as written:
        raw = written.read()
    out.write(raw[:cut])
    out.close()
    assert read_frame(inbound) is None
    inbound.close()


def test_what_is_no_frame_is_refused_before_it_fills_the_memory(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    inbound, out = pipe
    out.write((MAX_BYTES + 1).to_bytes(4, "little") + bytes(4))
    out.close()
    with pytest.raises(ValueError, match="not a frame"):
        read_frame(inbound)
    inbound.close()
