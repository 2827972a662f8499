"""The routes under /v1/batches, by the official client against a live server."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from loramill.producer.api.contents import Contents
from loramill.producer.api.keys import Key, write_keys
from loramill.producer.served import published
from loramill.schemas.errors import LineError
from loramill.schemas.manifest import Manifest
from loramill.schemas.request import parse_line
from tests.producer.api.batch_server import Served, chat, chats, serving, until
from tests.producer.served_by_stub import MANIFEST, Place

BOTH = pytest.mark.parametrize("open_store", ["sqlite", "redis"], indirect=True)


@pytest.fixture
def served(place: Place) -> Iterator[Served]:
    with serving(place.store) as one:
        yield one


@BOTH
def test_a_batch_goes_its_way(served: Served) -> None:
    rows = chats(40, None, "a00", "stub:a01")
    made = served.create(rows, metadata={"team": "x"})
    assert (made.object, made.status, made.endpoint) == ("batch", "validating", "/v1/chat/completions")
    assert (made.completion_window, made.metadata, made.request_counts.total) == ("24h", {"team": "x"}, 0)
    assert (made.errors, made.output_file_id, made.error_file_id, made.usage, made.in_progress_at) == (None,) * 5
    running = served.see(made.id, "in_progress")
    assert running.request_counts is not None and running.request_counts.total == 40
    assert running.expires_at is not None and abs(running.expires_at - made.created_at - 86400) <= 1
    claim = served.claim()
    served.answer(claim, [0, 1])
    counts = served.client().batches.retrieve(made.id).request_counts
    assert counts is not None and (counts.completed, counts.failed) == (2, 0)
    bad = {"r3", "r17"}
    served.answer(claim, range(2, claim.rows), fail=bad)
    done = served.work(made.id, fail=bad)
    assert done.status == "completed"
    counts = done.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (40, 38, 2)
    assert done.usage is not None and (done.usage.input_tokens, done.usage.output_tokens) == (38 * 3, 38 * 2)
    assert done.usage.total_tokens == 38 * 5
    assert done.model is None
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert times == sorted(times, key=int)  # type: ignore[arg-type]
    assert (done.failed_at, done.expired_at, done.cancelled_at, done.cancelling_at) == (None,) * 4
    answers = served.lines(done.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"r{at}" for at in range(40) if at not in (3, 17)]
    assert answers[0]["response"]["status_code"] == 200 and answers[0]["error"] is None
    failed = served.lines(done.error_file_id)
    assert [(one["custom_id"], one["response"]["status_code"], one["error"]) for one in failed] == [
        ("r3", 500, None), ("r17", 500, None),
    ]  # fmt: skip


def test_from_an_upload_to_what_came_of_it(served: Served) -> None:
    client = served.client()
    text = "".join(json.dumps(row) + "\n" for row in chats(6, None, "a03")).encode()
    file = client.files.create(file=("work.jsonl", text), purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    done = served.work(made.id)
    content = client.files.content(done.output_file_id or "")
    assert [json.loads(line)["custom_id"] for line in content.text.splitlines()] == [f"r{at}" for at in range(6)]
    [output] = client.files.list(purpose="batch_output").data
    assert (output.id, output.filename) == (done.output_file_id, f"{made.id}_output.jsonl")
    assert client.files.delete(output.id).deleted and client.files.delete(file.id).deleted
    assert client.batches.retrieve(made.id).output_file_id == output.id


def test_one_model_is_named(served: Served) -> None:
    batch = served.work(served.create(chats(3, "a05")).id)
    assert batch.model == "a05"
    assert served.work(served.create(chats(2)).id).model == "stub"


def test_all_rows_may_fail_and_there_is_no_output(served: Served) -> None:
    done = served.work(served.create(chats(3)).id, fail={"r0", "r1", "r2"})
    assert (done.status, done.output_file_id) == ("completed", None)
    assert len(served.lines(done.error_file_id)) == 3


def test_everything_that_is_wrong_with_lines_is_said_by_line(served: Served) -> None:
    rows: list[dict[str, Any] | str | bytes] = [
        b"\xef\xbb\xbf" + json.dumps(chat("a")).encode(), "", "{", "[1]", chat("a"),
        chat("c") | {"url": "/v1/completions", "body": {"prompt": "x"}}, chat("d", model="nobody"),
        chat("e", stream=True), chat("f", max_tokens=100_000), chat("g"),
    ]  # fmt: skip
    batch = served.see(served.create(rows).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None and batch.in_progress_at is None
    assert batch.errors is not None and batch.errors.object == "list" and batch.errors.data is not None
    assert [(one.line, one.code, one.param) for one in batch.errors.data] == [
        (3, "invalid_json_line", None), (4, "invalid_json_line", None), (5, "duplicate_custom_id", "custom_id"),
        (6, "url_mismatch", "url"), (7, "model_not_found", "model"), (8, "invalid_request", "stream"),
        (9, "token_limit_exceeded", "max_tokens"),
    ]  # fmt: skip
    assert all(one.message for one in batch.errors.data)


def test_the_first_hundred_of_many_problems_are_kept(served: Served) -> None:
    batch = served.see(served.create([*chats(5), *["{"] * 300]).id)
    assert batch.errors is not None and batch.errors.data is not None
    assert [one.line for one in batch.errors.data] == list(range(6, 106))


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("in.jsonl", b" \n\n", "empty_file"),
        ("in.jsonl.gz", gzip.compress(b"\n" * 100)[:-9], "invalid_request"),
        ("in.jsonl.zst", b"no zstd", "invalid_request"),
        ("in.jsonl", "{}\n".encode("utf-16"), "invalid_json_line"),
    ],
)
def test_files_that_cannot_be_read(served: Served, name: str, content: bytes, code: str) -> None:
    batch = served.see(served.create(served.upload([content], name=name)).id)
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
    [problem] = batch.errors.data
    assert problem.code == code and problem.message is not None and problem.message.startswith(f"{name}:")


def test_a_packed_file(served: Served) -> None:
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in chats(5)))
    done = served.work(served.create(served.upload([packed], name="in.jsonl.gz", end=b"")).id)
    assert done.status == "completed" and len(served.lines(done.output_file_id)) == 5


def test_lines_that_are_skipped_are_in_the_error_file(served: Served) -> None:
    made = served.create([chat("a"), "{", chat("b")], extra_body={"loramill": {"on_invalid": "skip", "priority": 7}})
    done = served.work(made.id)
    assert done.status == "completed" and done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.failed) == (3, 1)
    [line] = served.lines(done.error_file_id)
    assert (line["custom_id"], line["response"]["status_code"]) == (None, 400)
    assert line["response"]["body"]["error"]["code"] == "invalid_json_line"
    assert served.api.store.job(made.id).spec.priority == 7


@BOTH
def test_pages_over_250_batches(place: Place) -> None:
    with serving(place.store, minds=False) as server:
        _pages(server)


def _pages(server: Served) -> None:
    file, client = server.upload(["{"]), server.client()
    made = [server.create(file, metadata={"n": str(at)}).id for at in range(253)]
    for limit in (20, 100):
        assert [batch.id for batch in client.batches.list(limit=limit)] == made[::-1]
    page = client.batches.list(limit=3, after=made[5])
    assert [batch.id for batch in page.data] == made[4:1:-1] and page.has_more
    last = client.batches.list(limit=2, after=made[2])
    assert [batch.id for batch in last.data] == made[1::-1] and not last.has_more
    for bad in (0, 101):
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.list(limit=bad)
        assert refused.value.param == "limit"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.batches.list(after="batch_nobody")
    assert unknown.value.param == "after"


@BOTH
def test_cancel_midway(served: Served) -> None:
    made = served.create(chats(1000))
    served.see(made.id, "in_progress")
    claim = served.claim()
    served.answer(claim, range(3))
    cancelled = served.client().batches.cancel(made.id)
    assert cancelled.status == "cancelling" and cancelled.cancelling_at is not None
    assert served.client().batches.cancel(made.id).status == "cancelling"
    served.api.store.release(claim.lease)
    done = served.see(made.id)
    assert done.status == "cancelled" and done.cancelled_at is not None and done.completed_at is None
    assert len(served.lines(done.output_file_id)) == 3
    never = served.lines(done.error_file_id)
    assert len(never) == 997
    assert never[0]["response"] is None and never[0]["error"]["code"] == "batch_cancelled"
    with pytest.raises(openai.BadRequestError) as refused:
        served.client().batches.cancel(made.id)
    assert refused.value.code == "batch_not_cancellable"
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_cancel_before_anybody_looked(place: Place) -> None:
    with serving(place.store, minds=False) as server:
        made = server.create(chats(3))
        assert server.client().batches.cancel(made.id).status == "cancelling"
    with serving(place.store) as server:
        done = server.see(made.id)
        assert (done.status, done.output_file_id, done.error_file_id) == ("cancelled", None, None)
        assert done.cancelling_at is not None and done.cancelled_at is not None


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h30"}, "completion_window"),
        ({"completion_window": "9m"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {str(at): "x" for at in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after.seconds"),
        ({"extra_body": {"loramill": {"priority": 101}}}, "loramill.priority"),
        ({"extra_body": {"loramill": {"on_invalid": "maybe"}}}, "loramill.on_invalid"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
    ],
)
def test_creates_that_make_no_sense(served: Served, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        served.create(served.upload([chat("a")]), **asked)
    assert (refused.value.code, refused.value.param) == ("invalid_request", param)
    assert served.client().batches.list().data == []


def test_files_that_are_no_input(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        served.create("file-nobody")
    assert (unknown.value.code, unknown.value.param) == ("file_not_found", "input_file_id")
    done = served.work(served.create(chats(1)).id)
    with pytest.raises(openai.BadRequestError) as output:
        served.create(done.output_file_id or "")
    assert output.value.code == "invalid_file_purpose"
    for call in (served.client().batches.retrieve, served.client().batches.cancel):
        with pytest.raises(openai.NotFoundError) as nobody:
            call("batch_nobody")
        assert nobody.value.code == "batch_not_found"


def test_a_file_may_go_once_it_was_read(served: Served) -> None:
    file = served.upload(chats(3))
    made = served.create(file)
    served.see(made.id, "in_progress")
    Contents(served.api.shelf).remove("", file)
    assert served.work(made.id).status == "completed"


def test_a_file_that_went_before_it_was_read(place: Place) -> None:
    with serving(place.store, minds=False) as server:
        made = server.create(chats(3))
        Contents(server.api.shelf).remove("", made.input_file_id)
    with serving(place.store) as server:
        batch = server.see(made.id)
        assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
        assert [one.message for one in batch.errors.data] == ["the input file was deleted before it was read"]


@BOTH
def test_rows_that_failed_or_never_ran_are_retried(served: Served) -> None:
    first = served.create(chats(40, None, "a00"), metadata={"team": "x"})
    served.see(first.id, "in_progress")
    claim = served.claim()
    ids = [json.loads(line)["custom_id"] for _, line in served.api.store.read_shard(first.id, claim.lease.shard)]
    bad = {ids[0], ids[2]}
    served.answer(claim, range(4), fail=bad)
    served.client().batches.cancel(first.id)
    served.api.store.release(claim.lease)
    ended = served.see(first.id)
    assert ended.request_counts is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (2, 2)

    def post(body: dict[str, Any] | None = None) -> httpx2.Response:
        return httpx2.post(f"{served.url}/v1/batches/{first.id}/retry", json=body)

    failed = post({"failed_only": True}).json()
    assert (failed["loramill"]["retry_of"], failed["status"]) == (first.id, "validating")
    done = served.work(failed["id"])
    assert [line["custom_id"] for line in served.lines(done.output_file_id)] == [one for one in ids if one in bad]
    every = post().json()
    assert every["id"] != failed["id"] and every["metadata"] == {"team": "x"}
    assert post().json()["id"] == every["id"]
    done = served.work(every["id"])
    assert len(served.lines(done.output_file_id)) == 38
    again = httpx2.post(f"{served.url}/v1/batches/{every['id']}/retry")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "nothing_to_retry")


@BOTH
def test_rows_as_they_finish(served: Served) -> None:
    made = served.create(chats(1200))
    url = f"{served.url}/v1/batches/{made.id}/results"
    assert httpx2.get(url).json() == {"object": "list", "data": [], "rows": [], "next": 0, "has_more": True}
    served.see(made.id, "in_progress")
    claim = served.claim()
    served.answer(claim, range(10))
    first = httpx2.get(url, params={"limit": 6}).json()
    assert (len(first["data"]), first["next"], first["has_more"]) == (6, 6, True)
    assert [f"r{row}" for row in first["rows"]] == [one["custom_id"] for one in first["data"]]
    rest = httpx2.get(url, params={"after": 6}).json()
    assert (len(rest["data"]), rest["next"], rest["has_more"]) == (4, 10, True)
    assert [f"r{row}" for row in first["rows"]] == [one["custom_id"] for one in first["data"]]
    # Rows that come twice, in another chunk, count once.
    served.answer(claim, range(5, 15))
    more = httpx2.get(url, params={"after": 10}).json()
    assert (len(more["data"]), more["next"]) == (5, 15)
    served.answer(claim)
    served.work(made.id)
    lines = httpx2.get(url, headers={"accept": "application/jsonl"}, params={"after": 3, "limit": 10000})
    assert lines.headers["x-loramill-next"] == "1200" and lines.headers["x-loramill-has-more"] == "false"
    rows = [json.loads(line)["custom_id"] for line in lines.text.splitlines()]
    every = [one["custom_id"] for one in first["data"][:3]] + rows
    assert len(rows) == 1197 and sorted(every) == sorted(f"r{at}" for at in range(1200))
    assert [one["custom_id"] for one in (first["data"] + rest["data"] + more["data"])] == every[:15]
    assert httpx2.get(url, params={"after": 5000}).json()["has_more"] is False


def test_a_long_poll_waits_for_rows(served: Served) -> None:
    made = served.create(chats(5))
    served.see(made.id, "in_progress")
    url = f"{served.url}/v1/batches/{made.id}/results"
    empty = httpx2.get(url, params={"wait": 0.3}).json()
    assert empty["data"] == [] and empty["has_more"]
    claim = served.claim()
    timer = threading.Timer(0.5, served.answer, [claim])
    timer.start()
    found = httpx2.get(url, params={"wait": 60}, timeout=60).json()
    timer.join()
    assert len(found["data"]) == 5 and not found["has_more"]


def test_events_tell_a_batch_to_its_end(served: Served) -> None:
    made = served.create(chats(5))
    served.see(made.id, "in_progress")
    events: list[dict[str, str]] = []
    with httpx2.stream("GET", f"{served.url}/v1/batches/{made.id}/events", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in stream.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
                continue
            events, event = [*events, event], {}
            if len(events) == 3:
                served.answer(served.claim())
    assert [one["data"] for one in events if one["event"] == "happened"]
    batches = [json.loads(one["data"]) for one in events if one["event"] == "batch"]
    assert batches[0]["status"] == "in_progress" and batches[-1]["status"] == "completed"
    assert batches[-1]["request_counts"]["completed"] == 5 and batches[-1]["output_file_id"]
    assert events[-1]["id"] == "end"
    url = f"{served.url}/v1/batches/{made.id}/events"
    numbers = [int(one["id"]) for one in events if one["event"] == "happened"]
    resumed = httpx2.get(url, headers={"last-event-id": str(numbers[-2])}).text
    assert resumed.count("event: happened") == 1 and resumed.count("event: batch") == 1
    assert httpx2.get(url, headers={"last-event-id": "end"}).status_code == 204


@BOTH
def test_nobody_sees_anothers(tmp_path: Path, place: Place) -> None:
    def key(token: str, **other: Any) -> Key:
        return Key(sha256=hashlib.sha256(token.encode()).hexdigest(), **other)

    keys = tmp_path / "keys.toml"
    write_keys(keys, {"ann": key("lm-ann", adapters=["a00"], open_batches=1), "bob": key("lm-bob", pending_rows=5)})
    with serving(place.store, keys=keys) as server:
        ann, bob = server.client("lm-ann"), server.client("lm-bob")

        def create(client: openai.OpenAI, owner: str, rows: list[dict[str, Any]], **more: Any) -> Any:
            file = server.upload(rows, owner=owner)
            said: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
            return client.batches.create(input_file_id=file, **said)

        made = create(ann, "ann", [chat("x", model="a01"), chat("y", model="a00"), chat("z", model="stub:a01")])
        batch = until(lambda: ann.batches.retrieve(made.id), lambda one: one.status == "failed")
        assert batch.errors is not None and batch.errors.data is not None
        assert [(one.line, one.code) for one in batch.errors.data] == [(1, "model_not_found"), (3, "model_not_found")]
        assert not any("did you mean" in str(one.message) and "a01`?" in str(one.message) for one in batch.errors.data)
        made = create(ann, "ann", [chat("y", model="a00")])
        with pytest.raises(openai.RateLimitError) as over:
            create(ann, "ann", [chat("z")])
        assert over.value.code == "too_many_open_batches"
        for call in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.list(after=made.id)
        assert bob.batches.list().data == [] and len(ann.batches.list().data) == 2
        bearer = {"authorization": "Bearer lm-bob"}
        for method, rest in (("GET", "/events"), ("GET", "/results"), ("POST", "/retry")):
            assert httpx2.request(method, f"{server.url}/v1/batches/{made.id}{rest}", headers=bearer).status_code == 404
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(
                input_file_id=made.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        small, large = create(bob, "bob", chats(4)), create(bob, "bob", chats(6))
        until(lambda: bob.batches.retrieve(small.id).status, lambda status: status == "in_progress")
        refused = until(lambda: bob.batches.retrieve(large.id), lambda one: one.status == "failed")
        assert refused.errors is not None and refused.errors.data is not None
        assert refused.errors.data[0].code == "too_many_tasks"
        one = create(bob, "bob", chats(1))
        until(lambda: bob.batches.retrieve(one.id).status, lambda status: status == "in_progress")
        with pytest.raises(openai.RateLimitError) as full:
            create(bob, "bob", chats(1))
        assert full.value.code == "too_many_pending_rows"


def test_aliases_and_mixes_that_lead_to_anothers_adapter_are_not_there(tmp_path: Path) -> None:
    aliases = {"mine": {"a00": 1.0}, "both": {"a00": 1.0, "a01": 1.0}}
    names = Place(tmp_path, Manifest(**(MANIFEST.model_dump() | {"aliases": aliases})))
    seen = published(names.store, None).offer.names.seen_by(lambda name: name == "a00")

    def comes_to(**body: Any) -> Any:
        line = parse_line(json.dumps(chat("x", **body)).encode())
        try:
            return seen.resolve(line)
        except LineError as error:
            return error.code

    assert comes_to(model="mine") == comes_to(model="a00") == (("a00", 1.0),)
    assert comes_to() == comes_to(model="base") == ()
    for model in ("a01", "both", "stub:both", "base:a01"):
        assert comes_to(model=model) == "model_not_found"
    mix = {"adapters": [{"name": "a00", "scale": 1}, {"name": "a01", "scale": 1}]}
    assert comes_to(loramill=mix) == "model_not_found"
