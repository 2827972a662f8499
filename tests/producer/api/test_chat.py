"""Questions by the official client, unmodified, over a live server and a worker with a stub of an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from openai.types.chat import ChatCompletionChunk

from loramill.producer.api.keys import Key, hash_of, new_token, write_keys
from loramill.store.contract import JobStore
from loramill.store.sqlite_store import SqliteStore
from loramill.worker import engine_process
from loramill.worker.node import Node
from tests.producer.api.asked import asked
from tests.worker.queueing import ENVIRONMENT, staged, until, working

WORDS = "SLOW: " + "wörter und words " * 12
"""Whose answer takes three seconds."""


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
        yield patch


@pytest.fixture(scope="module")
def store(patched: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobStore]:
    folder = tmp_path_factory.mktemp("asked")
    patched.setenv("XDG_CACHE_HOME", str(folder))
    with SqliteStore(folder / "jobs.db") as store:
        yield store


@pytest.fixture(scope="module")
def node(store: SqliteStore) -> Iterator[Node]:
    with working(SqliteStore(store._database.path), threads=4) as (node, _):
        until(lambda: node.ready)
        yield node


@pytest.fixture(scope="module")
def url(store: JobStore, node: Node) -> Iterator[str]:
    with asked(store) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        yield client


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="stub", **says("hi"))
    assert answer.choices[0].message.content == "ok:user: hi\nassistant: "
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "stub", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="a03", prompt="hi", n=2, max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["ok:hi"] * 2
    assert (answer.object, answer.model) == ("text_completion", "a03")
    assert answer.model_extra == {"loramill": {"adapter": "a03", "adapter_sha256": f"{3:064x}", "mode": "dynamic"}}


def test_several_turns_and_adapters(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "be brief"}]
    for turn, model in enumerate(("stub", "a00", "stub:a01", "")):
        messages.append({"role": "user", "content": f"turn {turn}"})
        answer = client.chat.completions.create(model=model, messages=messages).choices[0].message
        messages.append({"role": "assistant", "content": answer.content})
    said = "".join(f"{one['role']}: {one['content']}\n" for one in messages[:-1])
    assert answer.content == f"ok:{said}assistant: "
    extra = {"loramill": {"adapters": [{"name": "a02", "scale": 0.5}, {"name": "a05"}]}}
    mixed = client.completions.create(model="", prompt="m", extra_body=extra)
    assert [one["name"] for one in (mixed.model_extra or {})["loramill"]["adapters"]] == ["a02", "a05"]


def test_tokens_come_while_the_engine_works(client: openai.OpenAI, store: JobStore) -> None:
    began_s = time.monotonic()
    times, chunks = [], []
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(model="a01", stream=True, stream_options=options, n=2, **says(WORDS)):  # type: ignore[call-overload]
        times.append(time.monotonic() - began_s)
        chunks.append(chunk)
    whole = f"ok:user: {WORDS}\nassistant: "
    assert [text_of(chunks, index) for index in (0, 1)] == [whole, whole]
    assert times[0] < times[-1] / 2
    assert sum(time_s < times[-1] - 0.5 for time_s in times) > 10
    assert len({chunk.id for chunk in chunks}) == 1
    *others, last = chunks
    assert last.usage is not None
    assert last.usage.completion_tokens == 2 * (len(whole.encode()) + 1)
    assert all(chunk.usage is None for chunk in others)
    reasons = [choice.finish_reason for chunk in others for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop", "stop"]
    roles = [choice.delta.role for chunk in others for choice in chunk.choices if choice.delta.role]
    assert roles == ["assistant", "assistant"]
    until(lambda: no_questions(store))  # nothing of it is left


def no_questions(store: JobStore) -> bool:
    assert isinstance(store, SqliteStore)
    with store._database.read() as db:
        return db.execute("SELECT count(*) FROM jobs WHERE lane = 'ask'").fetchone() == (0,)


def test_the_async_client_and_many_at_once(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await client.completions.create(model=f"a{number % 16:02}", prompt=f"row {number}")
                    return answer.choices[0].text
                stream = await client.completions.create(model="stub", prompt=f"row {number}", stream=True)
                return "".join([choice.text async for chunk in stream for choice in chunk.choices])

            return await asyncio.gather(*(one(number) for number in range(40)))

    assert asyncio.run(ask()) == [f"ok:row {number}" for number in range(40)]


def test_a_question_overtakes_a_job(client: openai.OpenAI, store: JobStore) -> None:
    # One pass takes 64 rows.
    staged(store, "bulk", [f"SLOW {row}" for row in range(3000)], per_shard=500)
    until(lambda: bool(store.workers()) and any(shard.state == "leased" for shard in store.shards("bulk")))
    assert client.completions.create(model="a07", prompt="first").choices[0].text == "ok:first"
    assert store.job("bulk").completed < 1500
    store.cancel("bulk")
    until(lambda: store.job("bulk").status.ended)


def test_the_engine_may_die_amid_an_answer(client: openai.OpenAI, node: Node) -> None:
    chunks = []
    for chunk in client.chat.completions.create(model="stub", stream=True, **says(WORDS)):
        chunks.append(chunk)
        if len(chunks) == 5:
            node.engines[0].kill()
    assert text_of(chunks) == f"ok:user: {WORDS}\nassistant: "
    assert node.engines[0].restarts


def test_who_goes_away_takes_the_question_back(client: openai.OpenAI, store: JobStore, node: Node) -> None:
    stream = client.chat.completions.create(model="stub", stream=True, **says(WORDS))
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model="stub", **says(WORDS))
    until(lambda: not node._express.running, 10)
    assert all(job.status == "cancelled" for job in questions_in(store))


def questions_in(store: JobStore) -> list[Any]:
    assert isinstance(store, SqliteStore)
    with store._database.read() as db:
        ids = [id for (id,) in db.execute("SELECT id FROM jobs WHERE lane = 'ask'")]
    return [store.job(id) for id in ids]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_request", "messages"),
        ({}, 400, "invalid_request", "messages"),
        (says("x", temperature=9), 400, "invalid_request", "temperature"),
        (says("x", model="nobody"), 404, "model_not_found", "model"),
        (says("x", max_tokens=5000), 400, "token_limit_exceeded", "max_tokens"),
        (says("x" * 5000), 400, "token_limit_exceeded", "messages"),
        (says("x", tools=[{}]), 400, "invalid_request", "tools"),
        (says("x", stream="yes"), 400, "invalid_request", "stream"),
        (says("x", stream_options={"include_usage": True}), 400, "invalid_request", "stream_options"),
        (says("x", stream=True, stream_options={"usage": 1}), 400, "invalid_request", "stream_options"),
        (says("x", logit_bias={"400": 1}), 400, "invalid_request", "logit_bias"),
        (says("x", loramill={"scale": 2}), 400, "invalid_request", "scale"),
        (says("ABORT"), 500, "engine_crash", None),
        (says("ABORT", stream=True), 500, "engine_crash", None),
        ([], 400, "invalid_request", None),
    ],
)
def test_what_is_wrong_is_said(client: openai.OpenAI, body: Any, status: int, code: str, param: str | None) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.post("/chat/completions", cast_to=object, body=body)
    error = raised.value
    assert (error.status_code, error.code, error.param) == (status, code, param)


def test_what_is_no_json_is_said(client: openai.OpenAI) -> None:
    for content, kind, status in ((b"{", "application/json", 400), (b"{}", "text/plain", 415)):
        answer = client._client.post("completions", content=content, headers={"content-type": kind})
        assert answer.status_code == status
        assert orjson.loads(answer.content)["error"]["code"]


def test_models(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == ["stub", *(f"a{number:02}" for number in range(16))]
    for name, id in {"a03": "a03", "stub:a03": "a03", "base": "stub", "base:a15": "a15"}.items():
        assert client.models.retrieve(name).id == id
    assert client.models.retrieve("a03").created > 1_500_000_000
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("nobody")
    assert raised.value.code == "model_not_found"


def test_a_key_has_its_adapters_and_its_share(store: JobStore, node: Node, tmp_path: Path) -> None:
    path, token = tmp_path / "keys.toml", new_token()
    write_keys(path, {"ann": Key(sha256=hash_of(token), adapters=["a0*"], questions=1)})
    with (
        asked(store, path) as url,
        openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["stub", *(f"a{number:02}" for number in range(10))]
        assert client.completions.create(model="a09", prompt="x").choices[0].text == "ok:x"
        for refused in ("a10", "stub:a10"):
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model=refused, prompt="x")
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve(refused)
        with pytest.raises(openai.NotFoundError):
            mix = {"loramill": {"adapters": [{"name": "a01"}, {"name": "a11"}]}}
            client.completions.create(model="", prompt="x", extra_body=mix)
        stream = client.completions.create(model="stub", prompt=WORDS, stream=True)
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model="stub", prompt="x")
        assert raised.value.code == "too_many_questions"
        stream.close()
        until(lambda: all(job.status == "cancelled" for job in questions_in(store)))
        assert client.completions.create(model="stub", prompt="y").choices[0].text == "ok:y"
    with asked(store, path) as url, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="lm-other", max_retries=0).models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_before_the_first_token(
    stream: bool, patched: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        SqliteStore(tmp_path / "empty.db") as empty,
        asked(empty) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=0.5) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.completions.create(model="", prompt="x", stream=stream)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_without_a_worker_it_says_so(patched: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patched.setattr("loramill.producer.questions.NOBODY_S", 1.0)
    with (
        SqliteStore(tmp_path / "empty.db") as empty,
        asked(empty) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client,
    ):
        assert list(client.models.list()) == []
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as raised:
                client.completions.create(model="", prompt="x", stream=stream)
            assert (raised.value.status_code, raised.value.code) == (503, "no_workers")
        with working(SqliteStore(tmp_path / "empty.db"), threads=0) as (node, _):
            until(lambda: node.ready)
        with pytest.raises(openai.InternalServerError) as raised:  # it has gone again
            client.completions.create(model="", prompt="x", stream=True)
        assert raised.value.code == "no_workers"
