"""Questions asked of a store whose worker is played here: both stores, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from loramill.producer import questions as questions_module
from loramill.producer.heard import AnswerChanged, Delta
from loramill.producer.question_jobs import Answered, NobodyServes, Unanswered
from loramill.producer.questions import Asker, Begun, Questions
from loramill.producer.served_now import ServedNow
from loramill.schemas.errors import LineError
from loramill.schemas.job import Lane
from loramill.schemas.said import Said, SaidChoice
from loramill.store.contract import JobStore
from loramill.store.errors import StoreUnreachable
from loramill.store.packing import Chunk
from loramill.store.records import Claim, WorkerRecord
from loramill.store.redis_store import RedisStore
from loramill.store.sqlite_store import SqliteStore
from tests.producer.queued import done_row
from tests.producer.served_by_stub import BLOBS, MANIFEST, manifest, offer


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened: JobStore
    if request.param == "sqlite":
        opened = SqliteStore(tmp_path / "jobs.db")
    else:
        opened = RedisStore(request.getfixturevalue("redis_server").url, prefix=uuid.uuid4().hex)
    with opened as store:
        for content in BLOBS.values():
            store.put_blob(content)
        store.publish(MANIFEST)
        hello(store)
        yield store


def hello(store: JobStore, state: str = "ready") -> None:
    store.hello(WorkerRecord("w", MANIFEST.id, MANIFEST.base_id, "cpu", state, 1, 2, "here"))


class Play:
    """A server's questions, and the worker."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.questions = Questions(store, ServedNow(store, None))

    async def claim(self) -> Claim:
        while (claim := self.store.claim("w", MANIFEST.id, lane=Lane.ASK)) is None:
            await asyncio.sleep(0.01)
        return claim

    def say(self, claim: Claim, text: str, at: int = 0) -> None:
        said = Said(token=claim.lease.token, choices=[SaidChoice(index=0, at=at, text=text)])
        self.store.shelf.say(claim.lease.job, said.model_dump_json().encode())

    def answer(self, claim: Claim, text: str = "so it is", *, fail: bool = False) -> None:
        [(number, line)] = self.store.read_shard(claim.lease.job, 0)
        custom_id = json.loads(line)["custom_id"]
        done = done_row(claim.lease.job, number, line, text=text, fail={custom_id} if fail else set())
        self.store.commit(claim.lease, Chunk.of([done], [0]))


def played(store: JobStore, script: Callable[[Play], Coroutine[Any, Any, None]]) -> Play:
    play = Play(store)
    try:
        asyncio.run(asyncio.wait_for(script(play), 60))
    finally:
        play.questions.close()
    return play


def line(**body: Any) -> bytes:
    body = {"prompt": "why", "model": "a03", **body}
    return json.dumps({"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body}).encode()


async def texts(play: Play) -> list[str]:
    async with aclosing(play.questions.stream(line(), Asker())) as items:
        return [item.text async for item in items if isinstance(item, Delta)]


def nothing_is_left(store: JobStore, job_id: str) -> bool:
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        try:
            store.job(job_id)
        except Exception:
            return True
        time.sleep(0.02)
    return False


def test_an_answer_and_whose_question_it_was(store: JobStore) -> None:
    seen = []

    async def script(play: Play) -> None:
        asked = asyncio.create_task(play.questions.ask(line(), Asker("ann")))
        claim = await play.claim()
        spec = store.job(claim.lease.job).spec
        assert (spec.owner, spec.lane, spec.stream, list(spec.names.adapters)) == ("ann", Lane.ASK, False, ["a03"])
        assert claim.adapters == ("key-03",)
        assert store.jobs() == []
        play.answer(claim)
        answered = await asked
        assert (answered.status, answered.body["choices"][0]["text"]) == (200, "so it is")
        seen.append(claim.lease.job)

    played(store, script)
    assert nothing_is_left(store, seen[0])


def test_what_is_said_is_passed_on_and_the_result_ends_it(store: JobStore) -> None:
    async def script(play: Play) -> None:
        async with aclosing(play.questions.stream(line(), Asker())) as items:
            assert isinstance(await anext(items), Begun)
            claim = await play.claim()
            for at, text in ((0, "so "), (3, "it")):
                play.say(claim, text, at)
                assert await anext(items) == Delta(0, text)
            play.answer(claim)
            last = await anext(items)
            assert isinstance(last, Delta)
            assert (last.text, last.finish_reason) == (" is", "stop")
            assert isinstance(await anext(items), Answered)

    played(store, script)


@pytest.mark.parametrize("again", ["so it is", "or is it"])
def test_another_worker_begins_anew(store: JobStore, again: str) -> None:
    async def script(play: Play) -> None:
        asked = asyncio.create_task(texts(play))
        claim = await play.claim()
        play.say(claim, "so ")
        store.release(claim.lease)
        second = await play.claim()
        play.say(second, again[:2])
        play.say(second, again[2:6], 2)
        play.answer(second, again)
        if again == "so it is":
            assert "".join(await asked) == again
        else:
            with pytest.raises(AnswerChanged):
                await asked

    played(store, script)


def test_a_row_that_fails_is_an_answer(store: JobStore) -> None:
    async def script(play: Play) -> None:
        asked = asyncio.create_task(play.questions.ask(line(), Asker()))
        play.answer(await play.claim(), fail=True)
        answered = await asked
        assert (answered.status, answered.body["error"]["code"]) == (500, "engine_error")

    played(store, script)


def test_who_does_not_wait_takes_it_back(store: JobStore) -> None:
    async def script(play: Play) -> None:
        asked = asyncio.create_task(play.questions.ask(line(), Asker()))
        claim = await play.claim()
        asked.cancel()
        while store.job(claim.lease.job).status != "cancelling":
            await asyncio.sleep(0.01)
        store.release(claim.lease)

    played(store, script)
    assert store.claim("w", MANIFEST.id, lane=Lane.ASK) is None


def test_it_ends_with_its_time(store: JobStore) -> None:
    async def script(play: Play) -> None:
        with pytest.raises(TimeoutError):
            await play.questions.ask(line(), Asker(timeout_s=0.3))

    played(store, script)
    assert store.claim("w", MANIFEST.id, lane=Lane.ASK) is None


def test_it_ends_if_another_cancels_it(store: JobStore) -> None:
    async def script(play: Play) -> None:
        asked = asyncio.create_task(play.questions.ask(line(), Asker()))
        claim = await play.claim()
        store.cancel(claim.lease.job)
        store.release(claim.lease)
        with pytest.raises(Unanswered):
            await asked

    played(store, script)


def test_nobody_who_could_answer(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions_module, "NOBODY_S", 0.5)
    monkeypatch.setattr(questions_module, "LOOK_S", 0.1)

    async def script(play: Play) -> None:
        hello(store, "draining")
        with pytest.raises(NobodyServes):
            await play.questions.ask(line(), Asker())
        hello(store, "loading")  # that may be one who will
        with pytest.raises(TimeoutError):
            await play.questions.ask(line(), Asker(timeout_s=2))

    played(store, script)


def test_an_adapter_that_has_just_come_is_known(store: JobStore) -> None:
    async def script(play: Play) -> None:
        with pytest.raises(LineError, match="no adapter or model is named `new`"):
            await play.questions.ask(line(model="new"), Asker())
        grown = manifest(*MANIFEST.adapters, offer("new"))
        store.publish(grown)
        store.hello(WorkerRecord("w2", grown.id, grown.base_id, "cpu", "ready", 1, 2, "here"))
        asked = asyncio.create_task(play.questions.ask(line(model="new"), Asker()))
        while (claim := store.claim("w2", grown.id, lane=Lane.ASK)) is None:
            await asyncio.sleep(0.01)
        play.answer(claim)
        assert (await asked).status == 200

    played(store, script)


def test_a_store_that_is_away_for_a_while(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(play: Play) -> None:
        asked = asyncio.create_task(texts(play))
        claim = await play.claim()
        play.say(claim, "so ")
        real, away = store.job, [3]

        def job(job_id: str) -> Any:
            if away[0] > 0:
                away[0] -= 1
                raise StoreUnreachable("nobody answers")
            return real(job_id)

        monkeypatch.setattr(store, "job", job)
        await asyncio.sleep(0.5)
        play.answer(claim)
        assert "".join(await asked) == "so it is"
        assert away == [0]

    played(store, script)
