"""What an upload may hold that was made to do harm: every line is a row or a clear error, and nothing else happens."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loramill.producer import reader
from loramill.producer.reader import InputError, open_input
from loramill.schemas.errors import ErrorCode, LineError
from loramill.schemas.request import MAX_LINE_BYTES, parse_line

GOOD = '{"custom_id":"größe","method":"POST","url":"/v1/completions","body":{"prompt":"模型 🦙"}}'.encode()


def outcomes(data: bytes, name: str = "in.jsonl") -> list[str]:
    """Of each line: its id, or what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        found = []
        with open_input(str(path), folder) as source:
            for _, _, line in source.lines():
                try:
                    found.append(str(parse_line(line).custom_id))
                except LineError as error:
                    assert "\n" not in error.message
                    found.append(error.code)
        return found


@given(at=st.integers(1, len(GOOD) - 1), noise=st.binary(max_size=20).filter(lambda noise: b"\n" not in noise))
@example(at=GOOD.index("ö".encode()) + 1, noise=b"")
def test_torn_utf_8(at: int, noise: bytes) -> None:
    lines = outcomes(b"\n".join([GOOD, GOOD[:at] + noise + b"\xff", GOOD]))
    assert lines == ["größe", ErrorCode.INVALID_JSON_LINE, "größe"]


@given(data=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
@example(data=b"\0" * 50)
@example(data=b'{"custom_id": "\\ud800"}')
@example(data=b'{"custom_id": 1e999, "id": NaN}')
def test_any_bytes(data: bytes) -> None:
    try:
        assert len(outcomes(data)) <= data.count(b"\n") + 1
    except InputError as error:
        assert "\n" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
FIELDS = ["model", "prompt", "messages", "max_tokens", "n", "stop", "logit_bias", "loramill", "adapters", "metadata"]


@given(
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, max_size=5),
    more=st.dictionaries(st.sampled_from(["custom_id", "method", "url", "id", "adapter", "prompt"]), JSON, max_size=3),
)
@example(body={"\n\x1b[2J": None}, more={})
def test_any_json(body: object, more: dict[str, object]) -> None:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body} | more)
    assert len(outcomes(line.encode())) == 1


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
@pytest.mark.parametrize("depth", [100, 1000, 1025, 100_000, 2_000_000])
def test_deep_json(opening: str, closing: str, depth: int) -> None:
    deep = opening * depth + "1" + closing * depth
    for line in (deep, opening * depth, '{"id":"a","prompt":' + deep + "}", '{"id":"a","messages":[' + deep + "]}"):
        assert set(outcomes(line.encode() + b"\n" + GOOD)[:-1]) <= set(ErrorCode)


def test_huge_lines() -> None:
    huge = b'{"id":"a","prompt":"' + b"x" * (MAX_LINE_BYTES * 2) + b'"}'
    assert outcomes(b"\n".join([GOOD, huge, GOOD])) == ["größe", ErrorCode.INVALID_JSON_LINE, "größe"]


def zstd_members(member: bytes, count: int) -> bytes:
    packed = zstandard.ZstdCompressor(level=19).compress(member)
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    return (packed + skippable) * count


def gzip_members(member: bytes, count: int) -> bytes:
    return gzip.compress(member, 9) * count


@settings(max_examples=20)
@given(count=st.integers(1, 40), size=st.integers(1, 2**21), data=st.randoms(use_true_random=False))
def test_bombs_in_any_number_of_members(count: int, size: int, data: random.Random) -> None:
    """Each is below what is free, and their sum is not."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(reader, "_FREE_BYTES", 2**20)
        patch.setattr(reader, "_MAX_RATIO", 100)
        for name, bomb in (
            ("in.jsonl.zst", zstd_members(bytes(size), count)),
            ("in.jsonl.gz", gzip_members(bytes(size), count)),
        ):
            path = Path(folder) / name
            path.write_bytes(bomb)
            before = sum(file.stat().st_size for file in Path(folder).iterdir())
            # A chunk more than both bounds may be unpacked before it is noticed.
            allowed = max(2**20, 100 * len(bomb))
            if count * size > allowed + 100 * 2**10 + 2**20:
                with pytest.raises(InputError, match="100 times its size"):
                    open_input(str(path), folder)
            elif count * size <= 2**20:
                open_input(str(path), folder).close()
            assert sum(file.stat().st_size for file in Path(folder).iterdir()) == before


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
def test_more_than_may_be_unpacked(tmp_path: Path, name: str) -> None:
    rows = b"".join(b'{"prompt": %d}\n' % number for number in range(100_000))
    path = tmp_path / name
    path.write_bytes(gzip_members(rows, 2) if name.endswith(".gz") else zstd_members(rows, 2))
    open_input(str(path), str(tmp_path), max_bytes=2 * len(rows)).close()
    with pytest.raises(InputError, match=f"more than {2 * len(rows) - 1} bytes"):
        open_input(str(path), str(tmp_path), max_bytes=2 * len(rows) - 1)


UNPACK = """
import resource, sys, tempfile
from loramill.producer.reader import InputError, open_input
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    with tempfile.TemporaryDirectory() as folder, open_input(sys.argv[1], folder) as source:
        print(sum(1 for _ in source.lines()))
except InputError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("window_log", [27, 31])
def test_a_window_that_takes_memory(tmp_path: Path, window_log: int) -> None:
    """A frame says how much of what it has given must be kept. Over 128 MiB is refused."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=False)
    line = random.Random(1).randbytes(700).hex().encode() + b"\n"
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "in.jsonl.zst"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(packer.compress(line * 1000))
        file.write(packer.flush())
    said = subprocess.run([sys.executable, "-c", UNPACK, str(path)], capture_output=True, text=True, check=True).stdout
    outcome, grown = said.splitlines()
    assert outcome == "100000" if window_log == 27 else "is damaged" in outcome
    assert int(grown) < 300 * 1024  # KiB
