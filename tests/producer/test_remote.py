"""What a client decides, without a server: whom it asks again, and what it takes for whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loramill.producer.remote.downloads import fetched, lines_of, whole
from loramill.producer.remote.errors import Damaged, Refused, Unreachable
from loramill.producer.remote.follow import watched
from loramill.producer.remote.settings import http_options
from loramill.producer.remote.slices import Slice
from loramill.producer.remote.steps import Body, Call, Item, Next, Pause, Reply, Step, asked, pause_s
from loramill.producer.remote.submits import endpoint_of

CALL = Call("GET", "batches/x")
ONCE = Call("POST", "chat/completions", again=False)
OK = Reply(200, {}, b"{}")
REFUSED = b'{"error": {"message": "no", "type": "t", "param": "p", "code": "c"}}'


def played(steps: Any, *answers: Any) -> tuple[list[Step], Any]:
    """The steps of a task that gets these answers one after another, but for pauses and items; and its result, or what
    it raised."""
    left, seen, given = list(answers), list[Step](), None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(given) if error is None else steps.throw(error)
        except StopIteration as end:
            assert not left
            return seen, end.value
        except (Refused, Unreachable, Damaged) as raised:
            assert not left
            return seen, raised
        seen.append(step)
        given, error = None, None
        if not isinstance(step, Pause | Item):
            given = left.pop(0)
            if isinstance(given, Exception):
                given, error = None, given


def pauses(steps: list[Step]) -> list[float]:
    return [step.seconds for step in steps if isinstance(step, Pause)]


@pytest.mark.parametrize("status", [408, 409, 429, 502, 503, 504])
def test_what_passes_is_asked_again(status: int) -> None:
    steps, result = played(asked(CALL, 60), Reply(status, {}, b""), Unreachable("cut", sent=True), OK)
    assert result is OK
    assert [step for step in steps if isinstance(step, Call)] == [CALL] * 3
    first, second = pauses(steps)
    assert 0.25 <= first <= 0.5 <= second <= 1


@pytest.mark.parametrize(
    ("status", "headers"), [(400, {}), (404, {}), (500, {}), (507, {}), (429, {"x-should-retry": "false"})]
)
def test_what_does_not_is_not(status: int, headers: dict[str, str]) -> None:
    steps, error = played(asked(CALL, 60), Reply(status, {**headers, "x-request-id": "req-1"}, REFUSED))
    assert steps == [CALL]
    assert isinstance(error, Refused)
    assert (error.status, error.message, error.code, error.param, error.request_id) == (status, "no", "c", "p", "req-1")
    assert str(error) == f"{status}: no (c, req-1)"


def test_a_server_is_given_the_time_that_it_asks_for() -> None:
    steps, _ = played(asked(CALL, 60), Reply(429, {"retry-after": "7"}, REFUSED), OK)
    assert pauses(steps) == [7]
    steps, error = played(asked(CALL, 5), Reply(429, {"retry-after": "7"}, REFUSED))
    assert not pauses(steps)
    assert isinstance(error, Refused)
    assert error.status == 429


def test_what_must_not_be_done_twice_is_not_sent_twice() -> None:
    assert isinstance(played(asked(ONCE, 60), Unreachable("cut", sent=True))[1], Unreachable)
    assert played(asked(ONCE, 60), Unreachable("nobody there", sent=False), OK)[1] is OK


def test_pauses_grow_up_to_a_bound() -> None:
    assert [pause_s(attempt, 1e9, None, lambda: 0.0) for attempt in range(7)] == [0.25, 0.5, 1, 2, 4, 4, 4]
    assert pause_s(0, 1e9, None, lambda: 1.0) == 0.5
    assert pause_s(0, 0.2, None) is None


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"[1]", b'{"error": "x"}', b"null"])
def test_an_error_that_is_not_ours(body: bytes) -> None:
    _, error = played(asked(CALL, 60), Reply(404, {}, body))
    assert isinstance(error, Refused)
    assert (error.status, error.code, error.message) == (404, None, body.decode())


CONTENT = os.urandom(1000)
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'
WHOLE = Reply(200, {"content-length": "1000", "etag": ETAG})


def part(start: int, size: int = 1000) -> Reply:
    return Reply(206, {"content-range": f"bytes {start}-{size - 1}/{size}", "content-length": str(size - start)})


def got(steps: list[Step]) -> bytes:
    return b"".join(step.value for step in steps if isinstance(step, Item))


CUT = Unreachable("cut", sent=True)


@pytest.mark.parametrize("how", [CUT, None])
def test_a_download_goes_on_where_it_broke_off(how: object) -> None:
    answers = WHOLE, CONTENT[:300], how, part(300), CONTENT[300:301], how, part(301), CONTENT[301:], None
    steps, result = played(fetched("f", whole, 60), *answers)
    assert result is None
    assert got(steps) == CONTENT
    calls = [step for step in steps if isinstance(step, Call)]
    assert [call.headers.get("range") for call in calls] == [None, "bytes=300-", "bytes=301-"]
    assert [call.headers.get("if-range") for call in calls] == [None, ETAG, ETAG]
    assert {(call.body, call.headers["accept-encoding"]) for call in calls} == {(Body.BYTES, "identity")}


@pytest.mark.parametrize(
    "answers",
    [
        (WHOLE, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), None),
        (WHOLE, CONTENT + b"x", None),
        (WHOLE, CONTENT[:10], CUT, WHOLE),  # another content by now
        (WHOLE, CONTENT[:10], CUT, part(11)),
        (WHOLE, CONTENT[:10], CUT, part(10, 2000)),
    ],
)
def test_what_is_not_what_the_server_has(answers: tuple[object, ...]) -> None:
    assert isinstance(played(fetched("f", whole, 60), *answers)[1], Damaged)


def test_a_download_that_breaks_off_for_good() -> None:
    _, error = played(fetched("f", whole, 0), WHOLE, CONTENT[:10], CUT)
    assert error is CUT


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_come_whole_however_they_are_cut(size: int) -> None:
    text = "één\n\n  \ntwo\r\nlast".encode()
    take = lines_of(bytes.strip)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    assert [line for one in [*parts, b""] for line in take(one)] == ["één".encode(), b"two", b"last"]


def batch(status: str, **given: Any) -> bytes:
    from loramill.schemas.batch_objects import BatchExtras, BatchObject, RequestCounts

    times = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    none = dict.fromkeys([f"{name}_at" for name in times])
    none |= dict.fromkeys(["model", "errors", "output_file_id", "error_file_id", "usage", "metadata"])
    made = BatchObject(
        id="batch_1", endpoint="/v1/completions", input_file_id="f", completion_window="24h", status=status,
        created_at=1, request_counts=RequestCounts(**given), loramill=BatchExtras(priority=0, on_invalid="fail",
        retry_of=None), **none,
    )  # type: ignore[arg-type] # fmt: skip
    return made.model_dump_json().encode()


def told(status: str, id: str = "", **given: Any) -> httpx2.ServerSentEvent:
    return httpx2.ServerSentEvent("batch", batch(status, **given).decode(), id)


EVENTS = Reply(200, {"content-type": "text/event-stream; charset=utf-8"})


def statuses(steps: list[Step]) -> list[tuple[str, int]]:
    return [(step.value.status, step.value.request_counts.completed) for step in steps if isinstance(step, Item)]


def test_events_go_on_after_the_last_one() -> None:
    answers = (
        Reply(200, {}, batch("validating")),
        *(EVENTS, told("validating", "0"), told("in_progress", "3"), CUT),
        *(EVENTS, told("in_progress", "3"), told("in_progress", "5", completed=2), None),
        *(EVENTS, told("completed", "end", completed=2), None),
    )
    steps, result = played(watched("batch_1", 60), *answers)
    assert result is None
    assert statuses(steps) == [("validating", 0), ("in_progress", 0), ("in_progress", 2), ("completed", 2)]
    calls = [step.headers.get("last-event-id") for step in steps if isinstance(step, Call)]
    assert calls == [None, None, "3", "5"]


@pytest.mark.parametrize("none", [Reply(404, {}, REFUSED), Reply(200, {"content-type": "text/html"})])
def test_where_no_events_come_through_it_looks(none: Reply) -> None:
    looks = [Reply(200, {}, batch(*one)) for one in (["in_progress"], ["in_progress"], ["completed"])]
    steps, _ = played(watched("batch_1", 60), Reply(200, {}, batch("validating")), none, *looks)
    assert statuses(steps) == [("validating", 0), ("in_progress", 0), ("completed", 0)]
    assert not any(isinstance(step, Next) for step in steps)


def test_a_batch_that_has_ended_has_no_events() -> None:
    steps, _ = played(watched("batch_1", 60), Reply(200, {}, batch("failed")))
    assert statuses(steps) == [("failed", 0)]


@pytest.fixture
def numbers(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with (tmp_path / "file").open("rb") as file:
        yield file


def test_a_slice_is_a_file_of_its_own(numbers: Any) -> None:
    one, other = Slice(numbers, 10, 30), Slice(numbers, 20, 25)
    assert (one.read(3), other.read(), one.read(2)) == (bytes([10, 11, 12]), bytes(range(20, 25)), bytes([13, 14]))
    assert (one.seek(0, os.SEEK_END), one.read(5), one.seek(0), one.tell()) == (20, b"", 0, 0)
    assert one.read() == bytes(range(10, 30))


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        (b'{"url": "/v1/completions", "body": {}}', "/v1/completions"),
        (b'{"url": "/v1/chat/completions", "body": {}}', "/v1/chat/completions"),
        (b'\xef\xbb\xbf\n  \n{"prompt": "x"}\nnot json', "/v1/completions"),
        (b'{"messages": []}\n', "/v1/chat/completions"),
        (b'not json\n[1]\n{"prompt": "x"}\n', "/v1/completions"),
        (b"[1]", "/v1/chat/completions"),
        (b"\xff\xfe", "/v1/chat/completions"),
        (b"", "/v1/chat/completions"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_where_a_file_belongs(tmp_path: Path, text: bytes, endpoint: str, suffix: str) -> None:
    from loramill.store.files import atomic_writer

    path = tmp_path / f"in.jsonl{suffix}"
    with atomic_writer(path) as write:
        write(text)
    with path.open("rb") as file:
        assert endpoint_of(file, path.name) == endpoint


def test_what_a_client_is_told_of_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAMILL_API", "LORAMILL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert str(http_options(None, None, 1)["base_url"]) == "http://127.0.0.1:8000/v1"
    assert "authorization" not in http_options(None, None, 1)["headers"]
    monkeypatch.setenv("LORAMILL_API", "https://there:1/")
    monkeypatch.setenv("LORAMILL_API_KEY", "lm-1")
    assert str(http_options(None, None, 1)["base_url"]) == "https://there:1/v1"
    assert http_options(None, None, 1)["headers"]["authorization"] == "Bearer lm-1"
    assert str(http_options("http://here/other", "lm-2", 1)["base_url"]) == "http://here/other"
    assert http_options(None, "lm-2", 1)["headers"]["authorization"] == "Bearer lm-2"
    for bad in ("there:80", "ftp://there", "http://"):
        with pytest.raises(ValueError, match="is no http"):
            http_options(bad, None, 1)
