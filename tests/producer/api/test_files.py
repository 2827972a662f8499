"""/v1/files against a live server, mostly by OpenAI's own client."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest

from loramill.producer.api.contents import Contents
from loramill.producer.api.context import GIB, Api, Caller, Limits, Quota
from loramill.producer.api.tidier import Tidier
from loramill.store.part_files import Files
from loramill.store.shelf import PIECE_BYTES
from loramill.store.sqlite_store import SqliteStore
from tests.producer.api.conftest import Live, serving

ROWS = b'{"custom_id": "a", "body": {}}\n'
BIG = random.Random(1).randbytes(3 * PIECE_BYTES + 12_345)
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n{}\r\n--x--\r\n'
IS_FORM = {"content-type": "multipart/form-data; boundary=x"}


def pieces(store: SqliteStore) -> int:
    with store._database.read() as db:
        return int(db.execute("SELECT count(*) FROM pieces").fetchone()[0])


def nothing_is_left(store: SqliteStore) -> bool:
    return pieces(store) == 0 and store.shelf.usage("file", "ann").count == 0


def refusal(said: openai.APIStatusError) -> tuple[int, str | None, str | None]:
    assert cast(Any, said.body)["type"]
    return said.status_code, said.code, said.param


def upload(client: openai.OpenAI, data: bytes = ROWS, name: str = "in.jsonl", **more: Any) -> Any:
    return client.files.create(**{"file": (name, data), "purpose": "batch"} | more)


def test_a_file_comes_and_goes(live: Live) -> None:
    client = live.client()
    before = time.time()
    file = upload(client, BIG, "größe, 模型.jsonl")
    assert (file.bytes, file.filename, file.purpose) == (len(BIG), "größe, 模型.jsonl", "batch")
    assert (file.object, file.status, file.expires_at, file.status_details) == ("file", "processed", None, None)
    assert int(before) <= file.created_at <= time.time()
    assert client.files.retrieve(file.id) == file == client.files.wait_for_processing(file.id)
    assert client.files.content(file.id).read() == BIG
    assert [one.id for one in client.files.list()] == [file.id]
    gone = client.files.delete(file.id)
    assert (gone.id, gone.object, gone.deleted) == (file.id, "file", True)
    assert nothing_is_left(live.api.store)  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.delete(file.id)
    assert refusal(refused.value) == (404, "file_not_found", None)


def test_pages(live: Live) -> None:
    client = live.client()
    files = Contents(live.api.shelf)
    ids = []
    for number in range(250):
        with files.begin("ann", f"{number}.jsonl", "batch" if number % 2 else "batch_output") as new:
            ids.append(new.finish().id)
    for order, wanted in (("desc", ids[::-1]), ("asc", ids)):
        assert [one.id for one in client.files.list(limit=50, order=cast(Any, order))] == wanted
    assert [one.id for one in client.files.list(limit=7, purpose="batch", order="asc")] == ids[1::2]
    page = client.files.list(limit=249)
    assert (page.has_more, len(page.data), page.to_dict()["last_id"]) == (True, 249, page.data[-1].id)
    assert not client.files.list(limit=250).has_more
    whole = live.http().get("/v1/files").json()
    assert (whole["object"], whole["has_more"], len(whole["data"])) == ("list", False, 250)
    assert (whole["first_id"], whole["last_id"]) == (ids[-1], ids[0])
    assert client.files.list(purpose="fine-tune").data == []
    nothing = live.http("bob").get("/v1/files").json()
    assert nothing == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    "query, param", [({"limit": 0}, "limit"), ({"limit": 10_001}, "limit"), ({"order": "up"}, "order")]
)
def test_limits_out_of_range(live: Live, query: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        live.client().files.list(**query)
    assert refusal(refused.value) == (400, "invalid_request", param)


def test_unknown_cursor_and_ids(live: Live) -> None:
    client = live.client()
    calls: list[tuple[Callable[[], object], str | None]] = [
        (lambda: client.files.list(after="file-none"), "after"),
        (lambda: client.files.retrieve("file-none"), None),
        (lambda: client.files.content("file-none"), None),
        (lambda: client.files.delete("file-none"), None),
    ]
    for call, param in calls:
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refusal(refused.value) == (404, "file_not_found", param)


def test_anothers_file_is_not_there(live: Live) -> None:
    file, bob = upload(live.client()), live.client("bob")
    calls: list[Callable[[], object]] = [
        lambda: bob.files.retrieve(file.id),
        lambda: bob.files.content(file.id),
        lambda: bob.files.delete(file.id),
        lambda: bob.files.list(after=file.id),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert live.http("bob").head(f"/v1/files/{file.id}/content").status_code == 404


@pytest.mark.parametrize(
    "more, status, code, param",
    [
        ({"file": ("in.json", ROWS)}, 400, "invalid_file_type", "file"),
        ({"file": ("in.jsonl.bz2", ROWS)}, 400, "invalid_file_type", "file"),
        ({"file": ("", ROWS)}, 400, "missing_required_parameter", "file"),
        ({"file": ("folder/", ROWS)}, 400, "missing_required_parameter", "file"),
        ({"file": ("x" * 250 + ".jsonl", ROWS)}, 400, "invalid_request", "file"),
        ({"file": ("in.jsonl", b"")}, 400, "empty_file", "file"),
        ({"purpose": "fine-tune"}, 400, "invalid_purpose", "purpose"),
        ({"purpose": "batch_output"}, 400, "invalid_purpose", "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, 400, "invalid_request", "expires_after"),
        ({"expires_after": {"anchor": "created_at", "seconds": 2_592_001}}, 400, "invalid_request", "expires_after"),
        ({"expires_after": {"anchor": "created_at", "seconds": "soon"}}, 400, "invalid_request", "expires_after"),
        ({"expires_after": {"anchor": "last_used", "seconds": 3600}}, 400, "invalid_request", "expires_after"),
        ({"expires_after": {"seconds": 3600}}, 400, "invalid_request", "expires_after"),
        ({"extra_body": {"color": "red"}}, 400, "unknown_parameter", "color"),
    ],
)
def test_what_is_no_file(live: Live, more: dict[str, Any], status: int, code: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        upload(live.client(), **more)
    assert refusal(refused.value) == (status, code, param)
    assert nothing_is_left(live.api.store)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given, status, code, param",
    [
        ({"json": {"file": "x", "purpose": "batch"}}, 415, "unsupported_media_type", None),
        ({"data": {"file": "x", "purpose": "batch"}}, 415, "unsupported_media_type", None),
        ({}, 415, "unsupported_media_type", None),
        ({"files": {"purpose": (None, "batch")}}, 400, "missing_required_parameter", "file"),
        ({"files": {"file": (None, ROWS), "purpose": (None, "batch")}}, 400, "missing_required_parameter", "file"),
        ({"files": {"file": ("a.jsonl", ROWS)}}, 400, "missing_required_parameter", "purpose"),
        ({"files": {"other": ("a.jsonl", ROWS)}}, 400, "unknown_parameter", "other"),
        ({"files": [("file", ("a.jsonl", ROWS)), ("file", ("b.jsonl", ROWS))]}, 400, "invalid_request", "file"),
        ({"content": FORM % b"a\x01.jsonl", "headers": IS_FORM}, 400, "invalid_request", "file"),
        ({"content": FORM % b"a\xff.jsonl", "headers": IS_FORM}, 400, "invalid_multipart", None),
        ({"content": (FORM % b"a.jsonl")[:-9], "headers": IS_FORM}, 400, "invalid_multipart", None),
    ],
)
def test_what_is_no_form(live: Live, given: dict[str, Any], status: int, code: str, param: str | None) -> None:
    answer = live.http().post("/v1/files", **given)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert nothing_is_left(live.api.store)  # type: ignore[arg-type]


def test_a_name_without_its_folders(live: Live) -> None:
    for given in ("C:\\rows\\in.jsonl", "/ann/rows/in.jsonl", "..\\/in.jsonl"):
        assert upload(live.client(), name=given).filename == "in.jsonl"
    for name in ("IN.JSONL", "in.jsonl.gz", "in.jsonl.zst"):
        assert upload(live.client(), name=name).filename == name


def test_how_long_it_is_kept(live: Live, store: SqliteStore) -> None:
    file = upload(live.client(), expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == pytest.approx(file.created_at + 3600, abs=5)
    live.api.limits = Limits(retention_s=60)
    file = upload(live.client())
    assert file.expires_at == pytest.approx(file.created_at + 60, abs=5)


def test_a_file_over_the_limit(live: Live) -> None:
    live.api.limits = Limits(file_bytes=2 * PIECE_BYTES)
    edge = upload(live.client(), BIG[: 2 * PIECE_BYTES])
    for data in (BIG[: 2 * PIECE_BYTES + 1], BIG):  # found while it is written, and before
        with pytest.raises(openai.APIStatusError) as refused:
            upload(live.client(), data)
        assert refusal(refused.value) == (413, "file_too_large", "file")

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for _ in range(200):
            yield BIG

    answer = live.http().post("/v1/files", content=endless(), headers=IS_FORM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    live.client().files.delete(edge.id)
    assert nothing_is_left(live.api.store)  # type: ignore[arg-type]


def test_a_key_over_its_quota(live: Live) -> None:
    live.callers["ann"] = Caller("ann", quota=Quota(stored_bytes=3 * PIECE_BYTES))
    client = live.client()
    first = upload(client, BIG[: 2 * PIECE_BYTES])
    for size in (PIECE_BYTES + 1, 3 * PIECE_BYTES):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            upload(client, BIG[:size])
        assert refusal(refused.value) == (403, "storage_quota_exceeded", None)
    upload(client, BIG[:PIECE_BYTES])
    client.files.delete(first.id)
    upload(client, BIG[: 2 * PIECE_BYTES])
    assert upload(live.client("bob"), BIG).bytes == len(BIG)


def test_two_at_once_do_not_share_a_quota(live: Live) -> None:
    live.callers["ann"] = Caller("ann", quota=Quota(stored_bytes=3 * PIECE_BYTES))
    with Contents(live.api.shelf).begin("ann", "other.jsonl", "batch") as other:
        other.write(BIG[: 2 * PIECE_BYTES])
        other.renew()
        with pytest.raises(openai.PermissionDeniedError):
            upload(live.client(), BIG[: 2 * PIECE_BYTES])


def test_ranges(live: Live) -> None:
    file = upload(live.client(), BIG)
    http, path, size = live.http(), f"/v1/files/{file.id}/content", len(BIG)
    whole = http.get(path)
    etag = whole.headers["etag"]
    assert etag == f'"{hashlib.sha256(BIG).hexdigest()}"'
    assert whole.headers["accept-ranges"] == "bytes"
    for given, start, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        (f"bytes={PIECE_BYTES - 1}-{PIECE_BYTES}", PIECE_BYTES - 1, PIECE_BYTES + 1),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{size * 2}", 0, size),
        (f"bytes=10-{size * 2}", 10, size),
        ("Bytes= 1-2", 1, 3),
    ]:
        answer = http.get(path, headers={"range": given})
        assert (answer.status_code, answer.content) == (206, BIG[start:stop])
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert answer.headers["content-length"] == str(stop - start)
    for given in (f"bytes={size}-", "bytes=-0", f"bytes={size + 5}-{size + 9}"):
        answer = http.get(path, headers={"range": given})
        assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{size}"
    for given in ("bytes=0-0,2-2", "bytes=5-4", "bytes=-", "rows=0-5", "bytes=a-b", "bytes=" + "9" * 30 + "-"):
        answer = http.get(path, headers={"range": given})
        assert (answer.status_code, len(answer.content)) == (200, size)
    assert http.get(path, headers={"range": "bytes=0-0", "if-range": etag}).status_code == 206
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert http.get(path, headers={"range": "bytes=0-0", "if-range": other}).status_code == 200


def test_a_client_that_has_it_is_sent_nothing(live: Live) -> None:
    file = upload(live.client())
    http, path = live.http(), f"/v1/files/{file.id}/content"
    etag = http.get(path).headers["etag"]
    for given in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = http.get(path, headers={"if-none-match": given})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert http.get(path, headers={"if-none-match": '"x"'}).status_code == 200
    head = http.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(ROWS)))
    assert head.headers["etag"] == etag


def test_what_a_browser_is_told(live: Live) -> None:
    file = upload(live.client(), name='a"b; größe.jsonl')
    headers = live.http().get(f"/v1/files/{file.id}/content").headers
    assert headers["content-disposition"].startswith("attachment; filename*=UTF-8''a%")
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-content-type-options"] == "nosniff"


def test_a_download_that_loses_its_file_is_cut_short(live: Live) -> None:
    file = upload(live.client(), random.Random(2).randbytes(40 * PIECE_BYTES))
    with (
        pytest.raises(httpx2.RemoteProtocolError),
        live.http().stream("GET", f"/v1/files/{file.id}/content") as answer,
    ):
        chunks = answer.iter_bytes()
        next(chunks)
        live.client().files.delete(file.id)
        for _ in chunks:
            pass


def begin_upload(live: Live, size: int, sent: bytes) -> socket.socket:
    """A request whose body is not all sent."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    connection.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer ann\r\n".encode()
        + b"Content-Type: multipart/form-data; boundary=x\r\n"
        + f"Content-Length: {size}\r\n\r\n".encode()
        + head
        + sent
    )
    return connection


def test_a_client_that_goes_away_leaves_nothing(live: Live, store: SqliteStore, until: Any) -> None:
    connection = begin_upload(live, 2 * len(BIG), BIG)
    until(lambda: pieces(store) >= 2)
    connection.close()
    until(lambda: nothing_is_left(store))


def test_a_client_that_falls_silent_leaves_nothing(
    live: Live, store: SqliteStore, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramill.producer.api import receiving

    monkeypatch.setattr(receiving, "IDLE_S", 0.5)
    with begin_upload(live, 2 * len(BIG), BIG) as connection:
        assert b"408" in connection.recv(4096)
    until(lambda: nothing_is_left(store))


def test_a_full_store_leaves_nothing(live: Live, store: SqliteStore) -> None:
    [(pages,)] = store._database._db.execute("PRAGMA page_count")
    store._database._db.execute(f"PRAGMA max_page_count = {pages + 300}")
    with pytest.raises(openai.InternalServerError) as refused:
        upload(live.client(max_retries=2), BIG)
    assert refusal(refused.value) == (507, "storage_full", None)
    assert nothing_is_left(store)
    store._database._db.execute(f"PRAGMA max_page_count = {pages + 100_000}")
    assert upload(live.client(), BIG).bytes == len(BIG)


@pytest.fixture
def process(tmp_path: Path, until: Any) -> Iterator[Callable[..., tuple[Live, subprocess.Popen[bytes]]]]:
    """Starts `loramill serve`, which can be killed."""
    from tests.servers import free_port

    started: list[subprocess.Popen[bytes]] = []
    lives: list[Live] = []

    def start() -> tuple[Live, subprocess.Popen[bytes]]:
        port = free_port()
        command = [sys.executable, "-c", "from loramill.producer.cli import main; main()", "serve"]
        where = ["--port", str(port), "--store", f"sqlite:///{tmp_path}/store.db", "--files", str(tmp_path / "files")]
        started.append(subprocess.Popen([*command, *where], cwd=tmp_path))
        live = Live(cast(Any, None), f"http://127.0.0.1:{port}")
        lives.append(live)

        def answers() -> bool:
            assert started[-1].poll() is None
            try:
                return live.http().get("/v1/files").status_code == 200
            except httpx2.TransportError:
                return False

        until(answers)
        return live, started[-1]

    yield start
    for live in lives:
        live.close()
    for one in started:
        one.kill()
        one.wait()


def test_a_killed_server_leaves_what_is_found(process: Any, tmp_path: Path, until: Any) -> None:
    live, server = process()
    folder = tmp_path / "files"

    def kept() -> int:
        return sum(len(names) for _, _, names in os.walk(folder))

    with begin_upload(live, 2 * len(BIG), BIG):
        until(lambda: kept() >= 2)
        server.kill()
        server.wait()
    live, _ = process()
    assert live.client().files.list().data == []
    later = SqliteStore(tmp_path / "store.db", files=Files(str(folder)), clock=lambda: time.time() + 3700)
    assert Tidier(later.shelf, "test").tidy() == 1
    assert (kept(), pieces(later)) == (0, 0)
    later.close()


def test_a_disk_that_is_full(process: Any, tmp_path: Path) -> None:
    live, server = process()
    # No file may grow beyond it: pieces of noise cannot be packed so far, and the database stays far below.
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (PIECE_BYTES // 2, PIECE_BYTES // 2))
    with pytest.raises(openai.InternalServerError) as refused:
        upload(live.client(), BIG)
    assert refusal(refused.value) == (507, "storage_full", None)
    assert not [names for _, _, names in os.walk(tmp_path / "files") if names]
    assert live.client().files.list().data == []
    assert upload(live.client()).bytes == len(ROWS)


def test_memory_stays_small(live: Live, store: SqliteStore) -> None:
    """However large a file is, a server holds some pieces of it."""
    import tracemalloc

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for _ in range(30):
            yield BIG
        yield b'\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'

    tracemalloc.start()
    try:
        answer = live.http().post("/v1/files", content=body(), headers=IS_FORM)
        with live.http().stream("GET", f"/v1/files/{answer.json()['id']}/content") as content:
            assert sum(len(chunk) for chunk in content.iter_bytes()) == 30 * len(BIG)
        assert tracemalloc.get_traced_memory()[1] < 24 * PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_the_document_says_what_is_sent(live: Live) -> None:
    paths = live.http().get("/openapi.json").json()["paths"]
    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"] == {
        "type": "string",
        "format": "binary",
        "description": "Its name ends in .jsonl, .jsonl.gz, .jsonl.zst.",
    }
    content = paths["/v1/files/{file_id}/content"]
    assert set(content) == {"get", "head"}
    assert {"200", "206", "304", "4XX"} <= set(content["get"]["responses"])
    assert "application/octet-stream" in content["get"]["responses"]["206"]["content"]
    assert {one["name"] for one in content["get"]["parameters"]} >= {"range", "if-range", "if-none-match"}


def test_servers_share_a_store(live: Live, store: SqliteStore) -> None:
    file = upload(live.client())
    with serving(Api(store, cast(Any, None))) as other:
        assert other.client().files.content(file.id).read() == ROWS
    assert live.api.limits.file_bytes == 8 * GIB
