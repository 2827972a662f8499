"""The HTTP client, waiting and awaiting, against a server with a worker."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.client import AsyncChat, AsyncClient, Client, Refused, Unreachable
from loramill.schemas.batch_objects import BatchObject
from tests.chaos.proxy import Proxy
from tests.serving import STUB, Server
from tests.worker.queueing import until

WAIT_S = 60


class Waited:
    """An AsyncClient, or its Chat, as if it were a Client: so that one test is about both."""

    def __init__(self, asked: AsyncClient | AsyncChat, runner: asyncio.Runner) -> None:
        self._asked, self._runner = asked, runner

    def __getattr__(self, name: str) -> Any:
        there = getattr(self._asked, name)
        return self._called(there) if callable(there) else there

    def _called(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            made = method(*given, **named)
            if inspect.isawaitable(made):
                return self._runner.run(_result(made))
            if isinstance(made, AsyncChat):
                return Waited(made, self._runner)
            return self._each(made)

        return call

    def _each(self, made: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                yield self._runner.run(_result(anext(made)))
            except StopAsyncIteration:
                return


async def _result(awaitable: Any) -> Any:
    return await awaitable


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("serve"), *STUB) as server:
        yield server.ready()


Make = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes a client of one kind or the other."""
    made: list[Any] = []
    with asyncio.Runner() as runner:

        def new(base_url: str, **given: Any) -> Any:
            if request.param == "sync":
                made.append(Client(base_url, **given))
            else:
                made.append(Waited(AsyncClient(base_url, **given), runner))
            return made[-1]

        yield new
        for client in made:
            client.close()


@pytest.fixture
def client(make: Make, server: Server) -> Any:
    return make(server.api)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def rows(count: int, *words: str) -> list[dict[str, Any]]:
    names = (None, "a00", "a01")
    said = words or ("row",)
    return [
        {"id": f"r{at}", "adapter": names[at % 3], "prompt": f"{said[at % len(said)]} {at}", "max_tokens": 100}
        for at in range(count)
    ]


def written(path: Path, lines: list[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_files_and_rows_come_to_the_same(client: Any, tmp_path: Path) -> None:
    given = rows(50)
    ways = [
        written(tmp_path / "in.jsonl", given), str(written(tmp_path / "in.jsonl.gz", given)), given, iter(given),
    ]  # fmt: skip
    batches = [client.submit(way, metadata={"way": str(at)}, priority=2) for at, way in enumerate(ways)]
    for at, batch in enumerate(batches):
        ended = client.wait(batch.id, WAIT_S)
        assert (ended.status, ended.metadata, ended.endpoint) == ("completed", {"way": str(at)}, "/v1/completions")
        assert ended.request_counts.model_dump() == {"total": 50, "completed": 50, "failed": 0}
        answers = list(client.output(batch.id))
        assert [(one.index, one.id, one.text) for one in answers] == [
            (at, f"r{at}", f"ok:row {at}") for at in range(50)
        ]
        assert [one.adapter for one in answers[:3]] == [None, "a00", "a01"]
        assert list(client.errors(batch.id)) == []
    listed = [batch.id for batch in client.batches()]
    assert listed[:4] == [batch.id for batch in reversed(batches)]


def test_rows_as_they_are_awaited(server: Server) -> None:
    async def given() -> AsyncIterator[dict[str, Any]]:
        for row in rows(20):
            await asyncio.sleep(0)
            yield row

    async def main() -> list[str]:
        async with AsyncClient(server.api) as client:
            batch = await client.submit(given())
            return [one.id async for one in client.results(batch.id, ordered=True)]

    assert asyncio.run(main()) == [f"r{at}" for at in range(20)]


def test_rows_that_are_none(client: Any) -> None:
    before = len(list(client.files("batch")))
    with pytest.raises(ValueError, match="row 1: it is no JSON object"):
        client.submit([{"prompt": "x"}, {"prompt": object()}])
    with pytest.raises(FileNotFoundError):
        client.submit("nowhere.jsonl")
    assert len(list(client.files("batch"))) == before


def test_results_come_as_they_finish_and_can_be_taken_up_again(client: Any) -> None:
    batch = client.submit(rows(60, "row", "SLOW"))
    results = client.results(batch.id)
    first = [next(results) for _ in range(5)]
    assert not client.batch(batch.id).status.ended
    rest = list(client.results(batch.id, after=5))
    assert sorted(one.index for one in first + rest) == list(range(60))
    assert all(one.id == f"r{one.index}" for one in first + rest)
    assert [one.index for one in client.results(batch.id, follow=False)] == [one.index for one in first + rest]
    assert [one.index for one in client.results(batch.id, ordered=True)] == list(range(60))
    assert [one.index for one in client.results(batch.id, ordered=True, after=58)] == [58, 59]


def test_what_fails_says_so(client: Any, tmp_path: Path) -> None:
    batch = client.submit(rows(6, "row", "OOM1"))
    assert client.wait(batch.id, WAIT_S).request_counts.failed == 3
    assert [(one.index, one.id, one.error) for one in client.errors(batch.id)] == [
        (at, f"r{2 * at + 1}", "out of memory") for at in range(3)
    ]
    failed = client.wait(client.submit(written(tmp_path / "bad.jsonl", [*rows(2), "not json"])).id, WAIT_S)
    assert failed.status == "failed"
    assert [(one.code, one.line) for one in failed.errors.data] == [("invalid_json_line", 3)]
    skipped = client.submit(written(tmp_path / "bad2.jsonl", ["not json", *rows(2)]), on_invalid="skip")
    assert client.wait(skipped.id, WAIT_S).request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
    again = client.retry(batch.id, failed_only=True)
    assert client.wait(again.id, WAIT_S).request_counts.total == 3


def test_errors_of_the_server_have_all_that_it_says(client: Any) -> None:
    for ask in (
        lambda: client.batch("batch_nobody"),
        lambda: client.cancel("batch_nobody"),
        lambda: client.wait("batch_nobody"),
        lambda: next(client.watch("batch_nobody")),
        lambda: next(client.results("batch_nobody")),
    ):
        with pytest.raises(Refused) as caught:
            ask()
        assert (caught.value.status, caught.value.code) == (404, "batch_not_found")
        assert caught.value.request_id
    with pytest.raises(Refused) as caught:
        client.submit(rows(1), window="1s")
    assert (caught.value.status, caught.value.param) == (400, "completion_window")


def test_a_create_that_is_refused_leaves_no_file(client: Any) -> None:
    before = {file.id for file in client.files("batch")}
    with pytest.raises(Refused):
        client.submit(rows(1), metadata={"": "x"})
    assert {file.id for file in client.files("batch")} == before


def test_the_same_key_is_the_same_batch(client: Any) -> None:
    key = f"key-{id(client)}"
    first = client.submit(rows(3), idempotency_key=key)
    inputs = {file.id for file in client.files("batch")}
    assert client.submit(rows(3), idempotency_key=key).id == first.id
    assert {file.id for file in client.files("batch")} == inputs
    with pytest.raises(Refused) as caught:
        client.submit(rows(4), idempotency_key=key)
    assert (caught.value.status, caught.value.code) == (409, "idempotency_key_reused")


def test_no_server(make: Make) -> None:
    client = make("http://127.0.0.1:9", patience_s=0.5)
    with pytest.raises(Unreachable, match=r"no answer from http://127\.0\.0\.1:9"):
        client.batch("batch_1")


def test_a_wait_that_is_too_long(client: Any) -> None:
    batch = client.submit(rows(4, "SLOW"))
    with pytest.raises(TimeoutError, match=rf"{batch.id} has not ended after 0 s: .*; it goes on"):
        client.wait(batch.id, 0)
    with pytest.raises(ValueError, match="it has no files yet"):
        next(client.output(batch.id))
    assert client.wait(batch.id, WAIT_S).status == "completed"


def test_cancelling_keeps_what_is_finished(client: Any) -> None:
    batch = client.submit(rows(100, "row", "SLOW"))
    results = client.results(batch.id)
    next(results)
    assert client.cancel(batch.id).status in ("cancelling", "cancelled")
    ended = client.wait(batch.id, WAIT_S)
    assert ended.status == "cancelled"
    answers, errors = list(client.output(batch.id)), list(client.errors(batch.id))
    assert len(answers) == ended.request_counts.completed > 0
    assert len(answers) + len(errors) == 100
    assert {one.error for one in errors} == {"the job was cancelled before this row was run"}
    again = client.retry(batch.id)
    assert client.wait(again.id, WAIT_S).request_counts.total == len(errors)


def test_watching(client: Any) -> None:
    batch = client.submit(rows(40, "row", "SLOW"))
    seen = [one for one in client.watch(batch.id) if isinstance(one, BatchObject)]
    assert seen[-1].status == "completed"
    assert seen[-1] == client.batch(batch.id)
    done = [one.request_counts.completed for one in seen]
    assert done == sorted(done)
    assert 0 < done[-2] < 40 or 0 in done


def test_watching_and_results_outlast_their_server(make: Make, tmp_path: Path) -> None:
    with Server(tmp_path / "serve", *STUB, "--lease", 2) as server:
        client = make(server.ready().api)
        batch = client.submit(rows(80, "row", "SLOW"))
        seen, results = client.watch(batch.id), client.results(batch.id)
        next(seen)
        first = next(results)
        server.kill()
        restart = threading.Thread(target=server.start)
        restart.start()
        found = [first, *results]
        restart.join()
        assert sorted(one.index for one in found) == list(range(80))
        assert list(seen)[-1].status == "completed"


def test_large_files_go_in_parts_over_a_bad_network(make: Make, server: Server, proxy: Proxy, tmp_path: Path) -> None:
    content = "".join(json.dumps({"id": f"r{at}", "prompt": f"row {at}" * 50}) + "\n" for at in range(10_000))
    path = tmp_path / "large.jsonl"
    path.write_text(content)
    client = make(f"http://127.0.0.1:{proxy.port}/v1", part_bytes=2**20, patience_s=WAIT_S)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.15):
            proxy.reset()

    meddler = threading.Thread(target=disturb)
    meddler.start()
    try:
        file = client.upload(path)
    finally:
        stop.set()
        meddler.join()
    assert (file.bytes, file.filename) == (len(content), "large.jsonl")
    meddler = threading.Thread(target=disturb)
    stop.clear()
    meddler.start()
    try:
        assert client.download(file.id, tmp_path / "back.jsonl.gz") == len(content)
    finally:
        stop.set()
        meddler.join()
    assert (tmp_path / "back.jsonl.gz").read_text() == content
    assert not list(tmp_path.glob("*.part"))
    assert client.delete_file(file.id) is None
    with pytest.raises(Refused):
        client.file(file.id)


def test_a_small_file(client: Any, tmp_path: Path) -> None:
    file = client.upload(written(tmp_path / "in.jsonl", rows(3)))
    assert client.file(file.id) == file
    assert file.id in [one.id for one in client.files("batch")]
    assert file.id not in [one.id for one in client.files("batch_output")]
    client.download(file.id, tmp_path / "back.jsonl")
    assert (tmp_path / "back.jsonl").read_bytes() == (tmp_path / "in.jsonl").read_bytes()
    with pytest.raises(Refused) as caught:
        client.upload(written(tmp_path / "in.txt", rows(3)))
    assert caught.value.code == "invalid_file_type"


def test_a_question(client: Any) -> None:
    answer = client.ask("hello", "a00")
    assert (answer.text, answer.adapter, answer.finish_reason) == ("ok:hello", "a00", "stop")
    assert client.ask([{"role": "user", "content": "hi"}]).text == "ok:user: hi\nassistant: "
    assert len(client.ask("hello", n=2).samples) == 2
    with pytest.raises(Refused) as caught:
        client.ask("hello", "a0")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_question_that_is_answered_as_it_is_made(client: Any) -> None:
    parts = list(client.ask("hello " * 40, stream=True, max_tokens=500))
    assert "".join(part.text for part in parts) == "ok:" + "hello " * 40
    assert [part.finish_reason for part in parts if part.finish_reason] == ["stop"]


def test_a_talk(client: Any) -> None:
    chat = client.chat("a01", system="be short", max_tokens=500)
    first = chat.say("hi")
    assert first.text == "ok:system: be short\nuser: hi\nassistant: "
    second = "".join(part.text for part in chat.stream("and now?"))
    assert second == f"ok:system: be short\nuser: hi\nassistant: {first.text}\nuser: and now?\nassistant: "
    assert [one["role"] for one in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    with pytest.raises(Refused):
        chat.say("x" * 5000)
    assert len(chat.messages) == 5


def test_what_is_served(client: Any) -> None:
    names = {f"a{number:02}" for number in range(16)}
    assert {one.id for one in client.models()} == {"stub", *names}
    assert {one.id for one in client.adapters()} == names
    until(lambda: client.ask("x", "a03").text == "ok:x")
