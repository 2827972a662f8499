"""The form parser: the same file however a body is cut up, and a clear refusal of what is no form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from loramill.producer.api.errors import ApiError
from loramill.producer.api.multipart import MAX_FIELD_BYTES, Form

BOUNDARY = "b0undary"


class Taken:
    """What a form came to."""

    def __init__(self) -> None:
        self.files: list[tuple[str, str, bytearray]] = []

    def open(self, name: str, filename: str) -> Callable[[bytes], None]:
        self.files.append((name, filename, bytearray()))
        return self.files[-1][2].extend


def part(content: bytes, disposition: str, boundary: str = BOUNDARY) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\nContent-Type: x/y\r\n\r\n"
    return head.encode() + content + b"\r\n"


def body(*parts: bytes, boundary: str = BOUNDARY) -> bytes:
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def parse(pieces: list[bytes], boundary: str = BOUNDARY) -> tuple[dict[str, str], Taken]:
    taken = Taken()
    form = Form(f"multipart/form-data; boundary={boundary}", taken.open)
    for piece in pieces:
        form.feed(piece)
    form.close()
    return form.fields, taken


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[start:stop] for start, stop in pairwise(places)]


# What looks like the end of the part, or like its beginning, is what a parser stumbles over.
TRICKY = st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"--", b"\r\n", b"\r\n--", b"\r\n--b0undar", b"b0", b"\xff", b"{}"])
    | st.binary(max_size=5)
).map(b"".join)


@given(content=TRICKY, cuts=st.lists(st.integers(0, 10_000), max_size=30), first=st.booleans())
@example(content=b"\r\n--b0undar\r\n--b0undar", cuts=list(range(400)), first=True)
def test_any_chunking_gives_the_same_file(content: bytes, cuts: list[int], first: bool) -> None:
    file, field = part(content, 'name="file"; filename="in.jsonl"'), part(b"batch", 'name="purpose"')
    whole = body(file, field) if first else body(field, file)
    fields, taken = parse(cut(whole, cuts))
    assert fields == {"purpose": "batch"}
    assert taken.files == [("file", "in.jsonl", bytearray(content))]


@given(
    boundary=st.text("abcXYZ019'()+_,-./:=?", min_size=1, max_size=70),
    content=st.binary(max_size=60),
    cuts=st.lists(st.integers(0, 10_000), max_size=10),
)
def test_any_boundary(boundary: str, content: bytes, cuts: list[int]) -> None:
    assume(f"\r\n--{boundary}".encode() not in b"\r\n" + content)
    whole = body(part(content, 'name="file"; filename="a"', boundary), boundary=boundary)
    taken = Taken()
    form = Form(f'multipart/form-data; boundary="{boundary}"', taken.open)
    for piece in cut(whole, cuts):
        form.feed(piece)
    form.close()
    assert taken.files == [("file", "a", bytearray(content))]


@given(noise=st.binary(max_size=300), cuts=st.lists(st.integers(0, 10_000), max_size=5))
@example(noise=b"--b0undary\r\nContent-Disposition: form-data; name=\xff\r\n\r\nx\r\n--b0undary--", cuts=[])
@example(noise=b"--b0undary\r\nContent-Disposition: form-data; name=a\r\n\r\n\xff\r\n--b0undary--", cuts=[])
def test_noise_is_refused(noise: bytes, cuts: list[int]) -> None:
    with pytest.raises(ApiError) as refused:
        parse([*cut(noise, cuts), b"\r\n\xc0\xff"])
    assert (refused.value.status, refused.value.code) == (400, "invalid_multipart")


@given(keep=st.integers(0, 10_000))
def test_a_torn_body_is_refused(keep: int) -> None:
    whole = body(part(b"content", 'name="file"; filename="a"'))
    torn = whole[: keep % (len(whole) - 3)]  # what follows the last two hyphens says nothing
    with pytest.raises(ApiError, match="ends too early"):
        parse([torn])


@pytest.mark.parametrize("name", ["größe.jsonl", "模型.jsonl", "a b;c.jsonl", r"a\"b.jsonl", "..\\x/y.jsonl"])
def test_file_names(name: str) -> None:
    _, taken = parse([body(part(b"", f'name="file"; filename="{name}"'))])
    assert taken.files[0][1] == name.replace(r"\"", '"')


@pytest.mark.parametrize(
    "content_type, status, code",
    [
        (None, 415, "unsupported_media_type"),
        ("application/json", 415, "unsupported_media_type"),
        ("multipart/mixed; boundary=x", 415, "unsupported_media_type"),
        ("multipart/form-data", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=", 400, "invalid_multipart"),
        (f"multipart/form-data; boundary={'x' * 300}", 400, "invalid_multipart"),
    ],
)
def test_content_types(content_type: str | None, status: int, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        Form(content_type, Taken().open)
    assert (refused.value.status, refused.value.code) == (status, code)


@pytest.mark.parametrize(
    "whole, message",
    [
        (body(part(b"x" * (MAX_FIELD_BYTES + 1), 'name="purpose"')), "purpose is longer"),
        (body(part(b"a", 'name="purpose"'), part(b"b", 'name="purpose"')), "purpose is given twice"),
        (body(*[part(b"a", f'name="{number}"') for number in range(17)]), "more than 16 parts"),
        (body(part(b"a", 'filename="x"')), "a part has no name"),
        (part(b"a", 'name="x"') + b"--other--", "ends too early"),
        (body(b"--b0undary\r\n" + b"x" * 9000 + b": y\r\n\r\n\r\n"), "header size"),
        (body(b"--b0undary\r\n" + b"x: y\r\n" * 9 + b"\r\n\r\n"), "header count"),
    ],
)
def test_what_is_too_much_or_makes_no_sense(whole: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        parse([whole])
