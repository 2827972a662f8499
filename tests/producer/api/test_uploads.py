"""/v1/uploads against a live server, by OpenAI's own client."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from openai.types import Upload

from loramill.producer.api import uploads
from loramill.producer.api.contents import Contents
from loramill.producer.api.context import Api, Caller, Limits, Quota
from loramill.producer.api.parts import Parts, file_id_of
from loramill.producer.api.tidier import Tidier
from loramill.store.shelf import PIECE_BYTES
from loramill.store.sqlite_store import SqliteStore
from tests.producer.api.conftest import Live, serving
from tests.producer.api.test_files import nothing_is_left, pieces, refusal

DATA = random.Random(3).randbytes(3 * PIECE_BYTES + 4567)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "store.db", clock=clock)
    yield store
    store.close()


def begin(client: openai.OpenAI, size: int = len(DATA), **more: Any) -> Upload:
    asked = {"bytes": size, "filename": "in.jsonl", "mime_type": "application/jsonl", "purpose": "batch"}
    return client.uploads.create(**cast(Any, asked | more))


def add(client: openai.OpenAI, upload: Upload, *parts: bytes) -> list[str]:
    return [client.uploads.parts.create(upload.id, data=part).id for part in parts]


def parts_left(store: SqliteStore) -> int:
    return store.shelf.usage("part", "ann").count


def test_a_file_in_parts(live: Live, store: SqliteStore, clock: Clock) -> None:
    client = live.client()
    md5 = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
    upload = client.uploads.upload_file_chunked(
        file=DATA, filename="in.jsonl", bytes=len(DATA), mime_type="application/jsonl", purpose="batch",
        part_size=PIECE_BYTES + 1, md5=md5,
    )  # fmt: skip
    assert (upload.status, upload.object, upload.bytes, upload.purpose) == ("completed", "upload", len(DATA), "batch")
    assert upload.expires_at - upload.created_at == 3600
    assert upload.file is not None
    assert upload.file == client.files.retrieve(upload.file.id)
    assert (upload.file.bytes, upload.file.filename, upload.file.status) == (len(DATA), "in.jsonl", "processed")
    content = live.http().get(f"/v1/files/{upload.file.id}/content")
    assert content.content == DATA
    assert content.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    at = PIECE_BYTES - 5
    across = live.http().get(f"/v1/files/{upload.file.id}/content", headers={"range": f"bytes={at}-{at + 19}"})
    assert across.content == DATA[at : at + 20]
    assert parts_left(store) == 0
    assert store.shelf.usage("file", "ann").size == len(DATA)
    clock.now += 4 * 3600
    Tidier(store.shelf, "test").tidy()
    assert client.files.content(upload.file.id).read() == DATA
    client.files.delete(upload.file.id)
    assert nothing_is_left(store)


def test_parts_in_the_order_that_is_said(live: Live, store: SqliteStore) -> None:
    client = live.client()
    upload = begin(client, size=9)
    first, second, _ = add(client, upload, b"second", b"1st", b"unused")
    part = client.uploads.parts.create(upload.id, data=b"x")
    assert (part.object, part.upload_id, part.id[:5]) == ("upload.part", upload.id, "part_")
    done = client.uploads.complete(upload.id, part_ids=[second, first])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"1stsecond"
    assert (parts_left(store), pieces(store)) == (0, 2)
    # As a client does whose first call was answered too late.
    assert client.uploads.complete(upload.id, part_ids=[second, first]) == done
    for call in (
        lambda: client.uploads.complete(upload.id, part_ids=[first, second]),
        lambda: client.uploads.cancel(upload.id),
        lambda: client.uploads.parts.create(upload.id, data=b"late"),
    ):
        with pytest.raises(openai.ConflictError) as refused:
            call()
        assert refusal(refused.value) == (409, "upload_not_pending", None)
    client.files.delete(done.file.id)
    assert client.uploads.complete(upload.id, part_ids=[second, first]).file is None


def test_cancelled(live: Live, store: SqliteStore) -> None:
    client = live.client()
    upload = begin(client)
    add(client, upload, DATA[:PIECE_BYTES], DATA[PIECE_BYTES:])
    other = begin(client, size=1)
    kept = add(client, other, b"x")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert (parts_left(store), pieces(store)) == (1, 1)
    with pytest.raises(openai.ConflictError):
        client.uploads.parts.create(upload.id, data=b"late")
    assert client.uploads.complete(other.id, part_ids=kept).status == "completed"


def test_after_an_hour_it_is_gone(live: Live, store: SqliteStore, clock: Clock) -> None:
    client = live.client()
    upload = begin(client)
    parts = add(client, upload, DATA)
    clock.now += uploads.UPLOAD_S + 1
    calls: list[Callable[[], object]] = [
        lambda: client.uploads.parts.create(upload.id, data=b"late"),
        lambda: client.uploads.complete(upload.id, part_ids=parts),
        lambda: client.uploads.cancel(upload.id),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refusal(refused.value) == (404, "upload_not_found", None)
    tidier = Tidier(store.shelf, "test")
    assert tidier.tidy() == 1
    clock.now += 3600
    assert tidier.tidy() == 1
    assert nothing_is_left(store)
    assert parts_left(store) == 0


def test_a_server_that_died_while_it_completed(live: Live, store: SqliteStore, clock: Clock) -> None:
    client = live.client()
    upload = begin(client, size=6)
    ids = add(client, upload, b"abc", b"def")
    parts, files = Parts(store.shelf), Contents(store.shelf)
    sha256 = hashlib.sha256(b"abcdef").hexdigest()
    made = [parts.find("ann", part_id) for part_id in ids]
    files.join(made, "ann", "in.jsonl", "batch", id=file_id_of(upload.id), sha256=sha256)
    # Asked again, it is the same file; not asked again, its parts go and what they consist of stays.
    clock.now += 2 * 3600 + 1
    assert Tidier(store.shelf, "test").tidy() == 3
    assert client.files.content(file_id_of(upload.id)).read() == b"abcdef"

    upload = begin(client, size=6)
    ids = add(client, upload, b"abc", b"def")
    made = [parts.find("ann", part_id) for part_id in ids]
    files.join(made, "ann", "in.jsonl", "batch", id=file_id_of(upload.id), sha256=sha256)
    with pytest.raises(openai.ConflictError):
        client.uploads.complete(upload.id, part_ids=ids[::-1])
    done = client.uploads.complete(upload.id, part_ids=ids)
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"abcdef"
    assert len(client.files.list().data) == 2


def test_two_that_complete_it_at_once(live: Live, store: SqliteStore) -> None:
    client = live.client()
    upload = begin(client, size=1)
    parts = add(client, upload, b"x")
    assert store.shelf.lock(f"upload:ann:{upload.id}", "another", 60)
    for call in (lambda: client.uploads.complete(upload.id, part_ids=parts), lambda: client.uploads.cancel(upload.id)):
        with pytest.raises(openai.ConflictError) as refused:
            call()
        assert refusal(refused.value) == (409, "upload_busy", None)


@pytest.mark.parametrize(
    "more, code, param",
    [
        ({"bytes": 0}, "invalid_request", "bytes"),
        ({"bytes": -1}, "invalid_request", "bytes"),
        ({"filename": "in.csv"}, "invalid_file_type", "filename"),
        ({"filename": ""}, "missing_required_parameter", "filename"),
        ({"purpose": "vision"}, "invalid_purpose", "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 10}}, "invalid_request", "expires_after.seconds"),
        ({"extra_body": {"color": "red"}}, "invalid_request", "color"),
    ],
)
def test_what_is_no_upload(live: Live, more: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        begin(live.client(), **{"size": more.pop("bytes", 1)} | more)
    assert refusal(refused.value) == (400, code, param)


def test_what_cannot_be_completed(live: Live) -> None:
    client = live.client()
    upload = begin(client, size=6)
    first, second = add(client, upload, b"abc", b"def")
    others = add(client, begin(client), b"ghi")
    for part_ids, md5, code, param in [
        ([first], None, "upload_size_mismatch", "part_ids"),
        ([first, first], None, "invalid_request", "part_ids"),
        ([], None, "invalid_request", "part_ids"),
        (["part_none"], None, "part_not_found", "part_ids"),
        ([first, *others], None, "part_not_found", "part_ids"),
        ([first, second], "0" * 32, "md5_mismatch", "md5"),
    ]:
        with pytest.raises(openai.APIStatusError) as refused:
            client.uploads.complete(upload.id, part_ids=part_ids, md5=md5 or openai.omit)
        assert refusal(refused.value) == (404 if code == "part_not_found" else 400, code, param)
    assert client.uploads.complete(upload.id, part_ids=[first, second]).status == "completed"


def test_parts_that_are_none(live: Live, store: SqliteStore) -> None:
    live.api.limits = Limits(part_bytes=PIECE_BYTES)
    client = live.client()
    upload = begin(client)
    add(client, upload, DATA[:PIECE_BYTES])
    with pytest.raises(openai.APIStatusError) as refused:
        add(client, upload, DATA[: PIECE_BYTES + 1])
    assert refusal(refused.value) == (413, "part_too_large", "data")
    with pytest.raises(openai.BadRequestError) as refused:
        add(client, upload, b"")
    assert refusal(refused.value) == (400, "empty_file", "data")
    answer = live.http().post(f"/v1/uploads/{upload.id}/parts", files={"data": ("a", b"x")}, data={"color": "red"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")
    assert (parts_left(store), pieces(store)) == (1, 1)


def test_limits_and_quotas(live: Live) -> None:
    live.api.limits = Limits(file_bytes=100)
    client = live.client()
    with pytest.raises(openai.APIStatusError) as refused:
        begin(client, size=101)
    assert refusal(refused.value) == (413, "file_too_large", "bytes")
    live.callers["ann"] = Caller("ann", quota=Quota(stored_bytes=10))
    with pytest.raises(openai.PermissionDeniedError):
        begin(client, size=11)
    upload = begin(client, size=10)
    add(client, upload, b"123456")
    with pytest.raises(openai.PermissionDeniedError) as refused:
        add(client, upload, b"12345")
    assert refusal(refused.value) == (403, "storage_quota_exceeded", None)
    with pytest.raises(openai.PermissionDeniedError):
        client.files.create(file=("a.jsonl", b"12345"), purpose="batch")


def test_anothers_upload_is_not_there(live: Live) -> None:
    ann, bob = live.client(), live.client("bob")
    upload = begin(ann, size=1)
    parts = add(ann, upload, b"x")
    calls: list[Callable[[], object]] = [
        lambda: bob.uploads.parts.create(upload.id, data=b"x"),
        lambda: bob.uploads.complete(upload.id, part_ids=parts),
        lambda: bob.uploads.cancel(upload.id),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refusal(refused.value) == (404, "upload_not_found", None)
    own = begin(bob, size=1)
    with pytest.raises(openai.NotFoundError):
        bob.uploads.complete(own.id, part_ids=parts)
    assert ann.uploads.complete(upload.id, part_ids=parts).status == "completed"


def test_the_tidier_runs_by_itself(store: SqliteStore, clock: Clock, until: Any) -> None:
    with serving(Api(store, cast(Any, None))) as live:
        add(live.client(), begin(live.client()), b"x")
    clock.now += 3 * 3600
    tidier = Tidier(store.shelf, "test")
    tidier.start()
    until(lambda: parts_left(store) == 0 and pieces(store) == 0)
    tidier.close()
    assert Tidier(store.shelf, "another").tidy() == 0
