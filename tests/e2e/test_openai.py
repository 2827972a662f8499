"""The official openai package, unmodified, against `loramill serve`: with a worker of its own on SQLite, and beside a
Celery worker on Redis."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
from openai.types import Batch

from tests.serving import STUB, Server
from tests.worker.queueing import ENVIRONMENT, until

TINY = Path(__file__).parents[2] / "examples" / "tiny"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDED = ("completed", "failed", "cancelled", "expired")
SECRET = "whsec_" + base64.b64encode(b"a secret of twenty-four b").decode()
# Windows are of ten minutes at least, and a test has no time for that.
SHORT_WINDOWS = "from loramill.schemas import batch_objects; batch_objects.LEAST_WINDOW_S = 1"


class Hook(BaseHTTPRequestHandler):
    """Takes webhooks; the very first one only when it comes again."""

    taken: ClassVar[list[tuple[dict[str, str], bytes]]] = []
    refused: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        is_first = not self.refused
        if is_first:
            self.refused.append(self.headers["webhook-id"])
        else:
            self.taken.append((dict(self.headers), body))
        self.send_response(503 if is_first else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@dataclass
class Place:
    """A server with a worker, and the client."""

    server: Server
    client: openai.OpenAI

    def upload(self, rows: list[Any], name: str = "in.jsonl") -> str:
        """A file's id."""
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        return self.client.files.create(file=(name, text.encode()), purpose="batch").id

    def create(self, rows: list[Any], endpoint: Any = CHAT, window: Any = "24h", **given: Any) -> Batch:
        """A batch of these lines."""
        file = self.upload(rows)
        return self.client.batches.create(input_file_id=file, endpoint=endpoint, completion_window=window, **given)

    def ended(self, batch: Batch) -> Batch:
        """The batch at its end."""
        until(lambda: self.client.batches.retrieve(batch.id).status in ENDED, 90)
        return self.client.batches.retrieve(batch.id)

    def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        """Of a file."""
        assert file_id is not None
        return [json.loads(line) for line in self.client.files.content(file_id).iter_lines()]


def chat(number: int, text: str = "hello", model: str | None = "stub", **body: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": text}], "max_tokens": 200, **body}
    said |= {} if model is None else {"model": model}
    return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": said}


def texts(lines: list[dict[str, Any]]) -> list[str]:
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


@pytest.fixture(scope="module")
def hook() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hook: str) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "secret").write_text(SECRET)
    more = ["--webhook-url", hook, "--webhook-secret-file", folder / "secret", "--webhook-allow-private"]
    environment, worker = dict[str, str](), None
    if request.param == "sqlite":
        more += STUB
    else:
        url = request.getfixturevalue("redis_server").url
        environment = {"LORAMILL_STORE": url, "LORAMILL_STORE_PREFIX": uuid.uuid4().hex}
        settings = {"LORAMILL_BASE_MODEL": "stub", "LORAMILL_DEVICE": "cpu"}
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "loramill.worker.app", "worker", "-P", "threads", "-c", "4"],
            env={**os.environ, **ENVIRONMENT, **environment, **settings}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    with ExitStack() as stack:
        if worker is not None:
            stack.callback(worker.wait, 60)
            stack.callback(worker.terminate)
        server = stack.enter_context(Server(folder, *more, before=SHORT_WINDOWS, **environment))
        client = stack.enter_context(openai.OpenAI(base_url=server.api, api_key="anything", webhook_secret=SECRET))
        until(lambda: [model.id for model in client.models.list()] != [], 90)
        yield Place(server, client)


def test_a_batch_from_upload_to_download(place: Place) -> None:
    client = place.client
    file_id = place.upload([chat(at, f"row {at}") for at in range(120)])
    file = client.files.wait_for_processing(file_id, poll_interval=0.05)
    assert (file.status, file.purpose, file.filename, file.object) == ("processed", "batch", "in.jsonl", "file")
    batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"who": "me"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"who": "me"})
    done = place.ended(batch)
    assert done.status == "completed"
    assert done.request_counts is not None and done.usage is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (120, 120, 0)
    assert done.error_file_id is None
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    lines = place.lines(done.output_file_id)
    assert [line["custom_id"] for line in lines] == [f"r{at}" for at in range(120)]
    assert texts(lines) == [f"ok:user: row {at}\nassistant: " for at in range(120)]
    used = [line["response"]["body"]["usage"] for line in lines]
    assert done.usage.input_tokens == sum(one["prompt_tokens"] for one in used)
    assert done.usage.output_tokens == sum(one["completion_tokens"] for one in used)
    output = client.files.retrieve(done.output_file_id or "")
    assert output.purpose == "batch_output"
    raw = client.files.content(output.id).read()
    assert len(raw) == output.bytes
    head = client.files.content(output.id, extra_headers={"Range": "bytes=0-9"})
    assert (head.response.status_code, head.read()) == (206, raw[:10])


def test_one_file_mixes_any_models(place: Place) -> None:
    models = ["stub", "a00", "stub:a01", "", None, "a15"]
    mix = {"loramill": {"adapters": [{"name": "a00", "scale": 0.5}, {"name": "a01", "scale": 0.5}]}}
    rows = [chat(at, model=model) for at, model in enumerate(models)] + [chat(6, **mix)]
    lines = place.lines(place.ended(place.create(rows)).output_file_id)
    served = [line["response"]["body"]["loramill"]["adapter"] for line in lines]
    assert served == [None, "a00", "a01", None, None, "a15", None]
    assert [one["name"] for one in lines[6]["response"]["body"]["loramill"]["adapters"]] == ["a00", "a01"]


def test_lists_of_more_than_two_hundred_and_fifty(place: Place) -> None:
    client = place.client
    before = {file.id for file in client.files.list()}
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda at: place.upload([chat(at)], f"many-{at}.jsonl"), range(255)))
    assert len(made) == 255
    for order in ("desc", "asc"):
        listed = [file.id for file in client.files.list(limit=100, order=order) if file.id not in before]  # type: ignore[arg-type]
        assert sorted(listed) == sorted(made)
    times = [file.created_at for file in client.files.list(limit=100)]
    assert times == sorted(times, reverse=True)
    page = client.files.list(limit=2, purpose="batch")
    assert len(page.data) == 2
    assert page.has_more
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda file: client.files.delete(file).deleted, made))
    assert {file.id for file in client.files.list(limit=100)} <= before


def test_lists_of_batches(place: Place) -> None:
    client = place.client
    file = place.upload([chat(0)])
    made = [
        client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h", metadata={"n": str(at)}).id
        for at in range(23)
    ]
    listed = [batch.id for batch in client.batches.list(limit=5)]
    assert listed[:23] == list(reversed(made))
    assert len(listed) == len(set(listed))


def test_a_create_that_is_sent_twice_is_one_batch(place: Place) -> None:
    file = place.upload([chat(0)])
    given: dict[str, Any] = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    first = place.client.batches.create(**given)
    assert place.client.batches.create(**given).id == first.id
    assert place.client.batches.create(**given, metadata={"a": "b"}).id != first.id
    keyed = place.client.batches.create(**given, extra_headers={"Idempotency-Key": f"k-{file}"})
    assert keyed.id != first.id
    assert place.client.batches.create(**given, extra_headers={"Idempotency-Key": f"k-{file}"}).id == keyed.id


def test_cancelled_midway(place: Place) -> None:
    batch = place.create([chat(at, "SLOW" if at % 20 else "quick") for at in range(800)])
    until(lambda: (place.client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed > 0)  # type: ignore[union-attr]
    assert place.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = place.ended(batch)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert done.cancelling_at is not None and done.cancelled_at is not None
    finished, never = place.lines(done.output_file_id), place.lines(done.error_file_id)
    assert len(finished) == done.request_counts.completed > 0
    assert len(finished) + len(never) == 800
    assert {line["error"]["code"] for line in never} == {"batch_cancelled"}
    with pytest.raises(openai.BadRequestError) as caught:
        place.client.batches.cancel(batch.id)
    assert caught.value.code == "batch_not_cancellable"


def test_a_window_that_passes(place: Place) -> None:
    batch = place.create([chat(at, "SLOW" if at % 20 else "quick") for at in range(800)], window="2s")
    done = place.ended(batch)
    assert done.status == "expired"
    assert done.expired_at is not None
    never = place.lines(done.error_file_id)
    finished = place.lines(done.output_file_id) if done.output_file_id else []
    assert len(finished) + len(never) == 800
    assert {line["error"]["code"] for line in never} == {"batch_expired"}
    assert {line["response"] is None for line in never} == {True}


def test_a_file_with_bad_lines(place: Place) -> None:
    elsewhere = {**chat(1), "url": TEXT, "body": {"prompt": "x"}}
    refused = [chat(2, model="nobody"), chat(3, temperature=-1), chat(4, stream=True)]
    bad = [chat(0), "not json", chat(0), elsewhere, *refused]
    done = place.ended(place.create(bad))
    assert done.status == "failed"
    assert done.output_file_id is None
    assert done.failed_at is not None
    assert done.errors is not None and done.errors.data is not None
    assert [(one.line, one.code) for one in done.errors.data] == [
        (2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "url_mismatch"), (5, "model_not_found"),
        (6, "invalid_request"), (7, "invalid_request"),
    ]  # fmt: skip
    assert all(one.message for one in done.errors.data)
    skipped = place.ended(place.create(bad, extra_body={"loramill": {"on_invalid": "skip"}}))
    assert skipped.status == "completed"
    assert skipped.request_counts is not None
    assert (skipped.request_counts.completed, skipped.request_counts.failed) == (1, 6)


def test_rows_that_all_fail(place: Place) -> None:
    done = place.ended(place.create([chat(at, "OOM1") for at in range(3)]))
    assert (done.status, done.output_file_id) == ("completed", None)
    errors = place.lines(done.error_file_id)
    assert [(line["error"], line["response"]["body"]["error"]["code"]) for line in errors] == [
        (None, "out_of_memory")
    ] * 3


def test_files_that_are_deleted(place: Place) -> None:
    client = place.client
    file = place.upload([chat(0)])
    assert client.files.delete(file).deleted
    for ask in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(file)
        assert caught.value.code == "file_not_found"
        assert caught.value.request_id
    with pytest.raises(openai.NotFoundError) as caught:
        client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


def test_files_that_expire(place: Place) -> None:
    file = place.client.files.create(
        file=("in.jsonl", b"{}\n"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600


def test_an_upload_in_parts(place: Place) -> None:
    content = "".join(json.dumps(chat(at)) + "\n" for at in range(2000)).encode()
    upload = place.client.uploads.upload_file_chunked(
        file=content, filename="parts.jsonl", bytes=len(content), mime_type="application/jsonl", purpose="batch",
        part_size=100_000,
    )  # fmt: skip
    assert upload.status == "completed"
    assert upload.file is not None
    assert place.client.files.content(upload.file.id).read() == content
    begun = place.client.uploads.create(filename="no.jsonl", bytes=10, mime_type="application/jsonl", purpose="batch")
    assert place.client.uploads.cancel(begun.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        place.client.uploads.parts.create(begun.id, data=b"x")


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"completion_window": "1y"}, "completion_window", None),
        ({"endpoint": "/v1/embeddings"}, "endpoint", None),
        ({"metadata": {f"k{at}": "v" for at in range(17)}}, "metadata", None),
        ({"input_file_id": "file-nobody"}, "input_file_id", "file_not_found"),
        ({"extra_body": {"unheard": 1}}, "unheard", None),
        ({"extra_body": {"loramill": {"priority": 1000}}}, "loramill.priority", None),
    ],
)
def test_creates_that_make_no_sense(place: Place, given: dict[str, Any], param: str, code: str | None) -> None:
    file = place.upload([chat(0)])
    asked: dict[str, Any] = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **given}
    with pytest.raises(openai.APIStatusError) as caught:
        place.client.batches.create(**asked)
    assert caught.value.status_code == (404 if code else 400)
    assert isinstance(caught.value, openai.NotFoundError if code else openai.BadRequestError)
    assert (caught.value.param or "").startswith(param)
    assert caught.value.code == (code or "invalid_request")


@pytest.mark.parametrize(
    ("name", "content", "purpose", "code"),
    [
        ("in.txt", b"{}", "batch", "invalid_file_type"),
        ("in.jsonl", b"", "batch", "empty_file"),
        ("in.jsonl", b"{}", "assistants", "invalid_purpose"),
    ],
)
def test_files_that_are_refused(place: Place, name: str, content: bytes, purpose: Any, code: str) -> None:
    before = len(list(place.client.files.list()))
    with pytest.raises(openai.BadRequestError) as caught:
        place.client.files.create(file=(name, io.BytesIO(content)), purpose=purpose)
    assert caught.value.code == code
    assert len(list(place.client.files.list())) == before


def test_unknown_ids(place: Place) -> None:
    client = place.client
    for ask, code in (
        (client.files.retrieve, "file_not_found"), (client.files.content, "file_not_found"),
        (client.files.delete, "file_not_found"), (client.batches.retrieve, "batch_not_found"),
        (client.batches.cancel, "batch_not_found"), (client.uploads.cancel, "upload_not_found"),
        (client.models.retrieve, "model_not_found"),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as caught:
            ask("nobody")
        assert caught.value.code == code
    for lists, code in ((client.files.list, "file_not_found"), (client.batches.list, "batch_not_found")):
        with pytest.raises(openai.NotFoundError) as caught:
            lists(after="nobody")
        assert (caught.value.code, caught.value.param) == (code, "after")
    for limit in (0, 101):
        with pytest.raises(openai.BadRequestError):
            client.batches.list(limit=limit)


def test_models(place: Place) -> None:
    listed = {model.id: model for model in place.client.models.list()}
    assert set(listed) == {"stub", *(f"a{number:02}" for number in range(16))}
    assert place.client.models.retrieve("a07").id == "a07"


def test_a_question(place: Place) -> None:
    answer = place.client.chat.completions.create(model="a00", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "ok:user: hi\nassistant: "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text = place.client.completions.create(model="stub", prompt="hi", n=2, max_tokens=100)
    assert [choice.text for choice in text.choices] == ["ok:hi", "ok:hi"]


def test_a_question_that_is_streamed(place: Place) -> None:
    asked = [{"role": "user", "content": "one two three " * 20}]
    given: dict[str, Any] = {"model": "stub", "messages": asked, "max_tokens": 500}
    whole = place.client.chat.completions.create(**given)
    with place.client.chat.completions.stream(**given) as stream:
        events = list(stream)
    final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert events
    chunks = list(place.client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    text = place.client.completions.create(model="a01", prompt="hi", max_tokens=100, stream=True)
    assert "".join(choice.text for chunk in text for choice in chunk.choices) == "ok:hi"


@pytest.mark.parametrize("stream", [False, True])
def test_questions_that_are_refused(place: Place, stream: bool) -> None:
    def ask(**given: Any) -> Any:
        asked: dict[str, Any] = {"model": "stub", "messages": [{"role": "user", "content": "hi"}], **given}
        return place.client.chat.completions.create(**asked, stream=stream)

    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="a0")
    assert missing.value.code == "model_not_found"
    for given, param in (
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"tools": [1]}}, "tools"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(**given)
        assert refused.value.param == param


def test_webhooks(place: Place) -> None:
    batches = [place.create([chat(0)]), place.create(["not json"])]
    wanted = {(f"batch.{place.ended(batch).status}", batch.id) for batch in batches}
    assert {kind for kind, _ in wanted} == {"batch.completed", "batch.failed"}

    def heard() -> set[tuple[str, str]]:
        events = [place.client.webhooks.unwrap(body, headers) for headers, body in Hook.taken]
        return {(event.type, event.data.id) for event in events if event.data.id in {batch.id for batch in batches}}

    until(lambda: heard() == wanted, 60)
    ids = [headers["webhook-id"] for headers, _ in Hook.taken]
    until(lambda: Hook.refused[0] in [headers["webhook-id"] for headers, _ in Hook.taken], 60)
    assert len(ids) == len(set(ids))
    headers, body = Hook.taken[-1]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        place.client.webhooks.unwrap(body.replace(b"batch.", b"batcH."), headers)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A real model, and adapters that change what it says."""
    given = ["--base-model", TINY / "base", "--adapters-dir", TINY / "adapters", "--dtype", "float32"]
    one_thread = {"OMP_NUM_THREADS": "1", "LORAMILL_CHILD": ""}
    with (
        Server(tmp_path_factory.mktemp("trained"), "--embedded", *given, "--device", "cpu", **one_thread) as server,
        openai.OpenAI(base_url=server.api, api_key="anything") as client,
    ):
        until(lambda: [model.id for model in client.models.list()] != [], 180)
        yield Place(server, client)


def test_a_trained_model_answers_a_question_as_it_does_a_batch(trained: Place) -> None:
    asked = {"upper": ("silver", "SILVER"), "reverse": ("lantern", "nretnal"), "count": ("bicycle", "7")}
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
    rows = [chat(at, text, model, **given) for at, (model, (text, _)) in enumerate(asked.items())]
    done = trained.ended(trained.create(rows))
    assert texts(trained.lines(done.output_file_id)) == [right for _, right in asked.values()]
    for model, (text, right) in asked.items():
        question: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], **given}
        assert trained.client.chat.completions.create(**question).choices[0].message.content == right
        chunks = trained.client.chat.completions.create(**question, stream=True)
        parts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
        assert "".join(parts) == right
