"""One question at a time: a job of one row before all others, and its answer as it is made."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from loramill.producer.heard import Delta, Heard
from loramill.producer.question_jobs import (
    Answered,
    NobodyServes,
    Put,
    QuestionJobs,
    TooManyQuestions,
    Unanswered,
    new_question_id,
)
from loramill.producer.served_now import ServedNow
from loramill.store.contract import JobStore
from loramill.store.errors import JobNotFound, StoreUnreachable

TIMEOUT_S = 600.0
NOBODY_S = 5.0
"""For how long there may be no worker that could answer."""
POLL_S, MAX_POLL_S = 0.03, 0.25
LOOK_S = 1.0
"""Between looks whether there is such a worker."""
AWAY_S = 0.5
"""Before a store that did not answer is asked again."""
THREADS = 8
"""That speak to the store for all questions: a look takes it some tenths of a millisecond."""

_T = TypeVar("_T")


@dataclass(slots=True, frozen=True)
class Begun:
    """The question waits for a worker."""

    id: str
    """The job's."""
    model: str
    """As the answer shows it."""


Item = Begun | Delta | Answered


@dataclass(slots=True, frozen=True)
class Asker:
    """Who asks."""

    owner: str = ""
    may_use: Callable[[str], bool] = lambda adapter: True
    """Which adapters are there for him."""
    most: int = sys.maxsize
    """How many questions of the owner may be open."""
    timeout_s: float = TIMEOUT_S
    """How long he waits for an answer."""


class Questions:
    """Asks a store's workers. Any number of questions at once, of one event loop."""

    def __init__(self, store: JobStore, served: ServedNow) -> None:
        self._jobs = QuestionJobs(store, served)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="questions")
        self._open: Counter[str] = Counter()

    def start(self) -> None:
        """Looks what is served, so that the first question need not wait for tokenizers to be opened."""
        threading.Thread(target=self._jobs.warm, daemon=True).start()

    def close(self) -> None:
        """Nothing more is asked; questions that nobody waits for any more are taken back first."""
        self._pool.shutdown()

    async def ask(self, line: bytes, asker: Asker) -> Answered:
        """The answer to a batch line. Cancelled, it takes the question back. Raises as `stream`."""
        async with aclosing(self._asked(line, asker, stream=False)) as items:
            async for item in items:
                if isinstance(item, Answered):
                    return item
        raise AssertionError("a question ends with its answer")

    def stream(self, line: bytes, asker: Asker) -> AsyncGenerator[Item, None]:
        """Begun, the answers to a batch line as they are made, and Answered, to whose text they have come by then.
        Closed early, it takes the question back.

        Raises LineError for a line that cannot be answered, NobodyServes, TooManyQuestions, Unanswered, TimeoutError,
        AnswerChanged, StoreError.
        """
        return self._asked(line, asker, stream=True)

    async def _asked(self, line: bytes, asker: Asker, *, stream: bool) -> AsyncGenerator[Item, None]:
        owner = asker.owner
        if self._open[owner] >= asker.most:
            raise TooManyQuestions(f"{asker.most} questions of yours wait for their answers; wait for one of them")
        until_s, question_id = time.monotonic() + asker.timeout_s, new_question_id()
        spec = {"id": question_id, "owner": owner, "stream": stream, "window_s": asker.timeout_s}
        nobody_until_s = time.monotonic() + NOBODY_S
        putting: Future[Put] | None = None
        self._open[owner] += 1
        try:
            while True:
                putting = self._pool.submit(self._jobs.put, line, spec, asker.may_use)
                try:
                    put = await asyncio.wrap_future(putting)
                    break
                except NobodyServes:
                    if time.monotonic() >= nobody_until_s:
                        raise
                await asyncio.sleep(AWAY_S)
            yield Begun(put.job.id, put.model)
            async for item in self._followed(put, stream, until_s):
                yield item
        finally:
            self._open[owner] -= 1
            if putting is not None:  # it may be put yet
                putting.add_done_callback(lambda _: self._let_go(question_id))

    async def _followed(self, put: Put, stream: bool, until_s: float) -> AsyncGenerator[Delta | Answered, None]:
        heard, number, pause_s = Heard(), 0, POLL_S
        looked_s = served_s = time.monotonic()
        while True:
            job, said = await self._insist(partial(self._jobs.look_at, put.job.id, number, stream), until_s)
            number += len(said)
            for entry in said:
                for delta in heard.take(entry):
                    yield delta
            if job.status.ended:
                break
            now_s = time.monotonic()
            if now_s >= until_s:
                raise TimeoutError("the question was not answered in time")
            if now_s >= looked_s + LOOK_S:
                looked_s = now_s
                if number or await self._insist(partial(self._jobs.is_served, put), until_s):
                    served_s = now_s
                elif now_s >= served_s + NOBODY_S:
                    raise NobodyServes("no worker is there that could answer; start one, or try again later")
            # What is slow is not asked after as often: of its time no more than a fiftieth is waited in vain.
            pause_s = POLL_S if said else min(pause_s * 1.02, MAX_POLL_S)
            await asyncio.sleep(pause_s)
        answered = await self._insist(partial(self._jobs.answer, job), until_s)
        if stream and answered.status < 400:
            for delta in heard.rest(answered.body):
                yield delta
        yield answered

    def _let_go(self, question_id: str) -> None:
        try:
            self._pool.submit(self._jobs.let_go, question_id)
        except RuntimeError:  # the pool was closed meanwhile
            self._jobs.let_go(question_id)

    async def _insist(self, look: Callable[[], _T], until_s: float) -> _T:
        """What the store says, as soon as it answers."""
        while True:
            try:
                return await asyncio.wrap_future(self._pool.submit(look))
            except StoreUnreachable:
                if time.monotonic() >= until_s:
                    raise
            except JobNotFound:
                raise Unanswered("the question was removed before it was answered") from None
            await asyncio.sleep(AWAY_S)
