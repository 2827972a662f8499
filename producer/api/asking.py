"""The server's questions, and what it knows of what is served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import TypeVar, cast

from fastapi import Request

from loramill.producer.api.context import Api, Caller
from loramill.producer.api.errors import ApiError, of_store
from loramill.producer.heard import AnswerChanged
from loramill.producer.question_jobs import NobodyServes, QuestionError, TooManyQuestions
from loramill.producer.questions import Asker, Questions
from loramill.producer.served_now import ServedNow
from loramill.schemas.errors import ErrorCode, LineError
from loramill.store.errors import StoreError

_LATER_S = 5
_ONCE = {"x-should-retry": "false"}
_making = threading.Lock()

_T = TypeVar("_T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def served_now(api: Api) -> ServedNow:
    """What is served, as the server last looked."""
    with _making:
        return cast(ServedNow, api.shared.setdefault("served", ServedNow(api.store, api.base)))


def questions_of(api: Api) -> Questions:
    """Of the server; a part of it, to be started and closed."""
    served = served_now(api)
    with _making:
        if "questions" not in api.shared:
            api.shared["questions"] = Questions(api.store, served)
        return cast(Questions, api.shared["questions"])


def asker_of(caller: Caller) -> Asker:
    """Who asks, as questions know him."""
    return Asker(caller.name, caller.may_use, caller.quota.questions)


def as_api_error(error: Exception) -> ApiError:
    """Why a question has no answer; whatever is none of that is raised again."""
    match error:
        case ApiError():
            return error
        case LineError():
            status = 404 if error.code == ErrorCode.MODEL_NOT_FOUND else 400
            return ApiError(status, error.message, code=error.code, param=error.param)
        case NobodyServes():
            return ApiError(503, str(error), code="no_workers", headers={"retry-after": str(_LATER_S)})
        case TooManyQuestions():
            return ApiError(429, str(error), code="too_many_questions", headers={"retry-after": "1"})
        case TimeoutError():
            return ApiError(504, str(error), code="timeout", headers=_ONCE)
        case AnswerChanged():
            return ApiError(500, str(error), code="answer_changed", headers=_ONCE)
        case QuestionError():
            return ApiError(409, str(error), code="question_cancelled", headers=_ONCE)
        case StoreError():
            return of_store(error)
    raise error


async def unless_gone(request: Request, waiting: Awaitable[_T]) -> _T:
    """What is waited for, as long as the client does. Raises ClientGone, and what `waiting` raises."""
    task, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})  # a generator that runs cannot be closed


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
