"""A question as a job of one row: put into a store, looked at, and removed."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from loramill.producer.pinning import pin
from loramill.producer.served import Served
from loramill.producer.served_now import ServedNow
from loramill.producer.validate import usable
from loramill.schemas.errors import ErrorCode, LineError
from loramill.schemas.failures import Failure
from loramill.schemas.job import MAX_PRIORITY, JobSpec, JobStatus, Lane
from loramill.schemas.prompters import Prompters
from loramill.schemas.request import parse_line
from loramill.schemas.sampling import resolve_max_tokens
from loramill.store.contract import JobStore
from loramill.store.errors import JobNotFound, StoreError
from loramill.store.records import Job, NewShard

_log = logging.getLogger("loramill.api")


class QuestionError(Exception):
    """A question that gets no answer; the message says why."""


class NobodyServes(QuestionError):
    """No worker is there that could answer."""


class TooManyQuestions(QuestionError):
    """Its owner waits for as many answers as he may."""


class Unanswered(QuestionError):
    """It was cancelled by somebody else, or lost."""


@dataclass(slots=True, frozen=True)
class Answered:
    """What it came to: the response of the row's result line."""

    status: int
    body: dict[str, Any]


@dataclass(slots=True, frozen=True)
class Put:
    """An accepted question."""

    job: Job
    model: str
    """As the answer shows it."""
    adapters: tuple[str, ...]
    """Their keys."""


def new_question_id() -> str:
    """Of a question to come."""
    return f"ask_{secrets.token_hex(12)}"


class QuestionJobs:
    """Those of one store. Any thread may call it; every method may raise StoreError."""

    def __init__(self, store: JobStore, served: ServedNow) -> None:
        self._store, self._served = store, served

    def put(self, line: bytes, spec: dict[str, Any], may_use: Callable[[str], bool]) -> Put:
        """Has a batch line accepted; `spec`: the id and the other fields of the job that are not the line's. Raises
        LineError, NobodyServes, StoreError."""
        try:
            return self._accept(line, spec, self._look(), may_use)
        except LineError as error:
            if error.code != ErrorCode.MODEL_NOT_FOUND:
                raise
        return self._accept(line, spec, self._look(fresh=True), may_use)  # it may just have come

    def _accept(self, line: bytes, given: dict[str, Any], served: Served, may_use: Callable[[str], bool]) -> Put:
        offer = served.offer
        names = offer.names.seen_by(may_use)
        prompters = Prompters(offer.prompter, names)
        row = parse_line(line, names.route_fields)
        uses = usable(row, prompters, offer.max_mix)
        [prompt] = prompters.encode_rows([row], [uses])
        if isinstance(prompt, LineError):
            raise prompt
        resolve_max_tokens(row.params, len(prompt), prompters.base.limits.max_model_len)
        adapters = tuple(sorted({offer.keys[name] for name, _ in uses}))
        spec = JobSpec(
            base_id=offer.base_id, names=pin(names, offer.keys, [uses], base=not uses), endpoint=row.endpoint.value,
            dedupe=False, priority=MAX_PRIORITY, input_name="question", lane=Lane.ASK, **given,
        )  # fmt: skip
        self._store.stage(spec)
        self._store.add_shard(spec.id, NewShard(0, [(0, line)], adapters))
        return Put(self._store.accept(spec.id), row.model or names.base, adapters)

    def _look(self, *, fresh: bool = False) -> Served:
        try:
            return self._served(fresh=fresh)
        except Failure as failure:
            raise NobodyServes(str(failure)) from None

    def look_at(self, job_id: str, number: int, stream: bool) -> tuple[Job, list[bytes]]:
        """The job, and what was said since entry `number`: all of it, if the job has ended."""
        job = self._store.job(job_id)
        return job, self._store.shelf.heard(job_id, number) if stream else []

    def is_served(self, put: Put) -> bool:
        """Whether a worker is there that could answer, or one that may become such."""
        served = self._look()
        loading = any(worker.state == "loading" for worker in served.workers)
        return loading or bool(served.able([put.adapters]).all_of_it)

    def answer(self, job: Job) -> Answered:
        """What an ended question came to. Raises Unanswered, StoreError."""
        if job.status is not JobStatus.COMPLETED:
            raise Unanswered(f"the question was {job.status.value} before it was answered")
        [chunk, *_] = self._store.results(job.id)
        [row, *_] = chunk.rows()
        response = orjson.loads(row.line)["response"]
        return Answered(response["status_code"], response["body"])

    def let_go(self, question_id: str) -> None:
        """Removes the question, now or once its worker has let go of it: what is left then is reaped."""
        try:
            job = self._store.job(question_id)
            if job.status is JobStatus.VALIDATING:
                return self._store.abandon(question_id)
            if job.status.ended or self._store.cancel(question_id).status.ended:
                self._store.purge(question_id)
        except JobNotFound:
            return
        except StoreError as error:
            _log.warning("question %s is left to the reaper: %s", question_id, error)

    def warm(self) -> None:
        """Opens the tokenizers, so that the first question need not wait for them."""
        try:
            self._served()
        except (Failure, StoreError):
            return  # it is looked again when somebody asks
