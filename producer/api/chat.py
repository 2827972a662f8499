"""One question and its answer, at once or as it is made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from loramill.producer.api.asking import ClientGone, as_api_error, asker_of, questions_of, unless_gone
from loramill.producer.api.context import ApiOf, Caller, CallerOf
from loramill.producer.api.errors import ApiError, invalid
from loramill.producer.api.event_streams import EVENT_STREAM
from loramill.producer.question_jobs import Answered, new_question_id
from loramill.producer.questions import Asker, Begun, Item, Questions
from loramill.schemas.chunks import Chunks
from loramill.schemas.completion_objects import ChatCompletion, TextCompletion
from loramill.schemas.request import Endpoint
from loramill.schemas.response import answer_id

router = APIRouter(tags=["questions"])

_SHARED = {
    "model": {"type": "string"},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "loramill": {"type": "object", "description": "`scale`, or `adapters`: a list of {name, scale}"},
}


def _body(required: str, shape: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": [required], "properties": {required: shape, **_SHARED}}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
}
_CHAT = _body("messages", {"type": "array", "minItems": 1, "items": _MESSAGE})
_PROMPT = _body("prompt", {"type": "string", "minLength": 1})


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": EVENT_STREAM}},
    openapi_extra=_CHAT,
)
async def ask_chat(request: Request, api: ApiOf, caller: CallerOf) -> Response:
    """Answers a chat: the body of a batch's line, with `stream` and `stream_options` beside."""
    return await _answer(request, questions_of(api), caller, Endpoint.CHAT)


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses={200: {"content": EVENT_STREAM}},
    openapi_extra=_PROMPT,
)
async def ask_completion(request: Request, api: ApiOf, caller: CallerOf) -> Response:
    """Continues a prompt: the body of a batch's line, with `stream` and `stream_options` beside."""
    return await _answer(request, questions_of(api), caller, Endpoint.COMPLETIONS)


async def _answer(request: Request, questions: Questions, caller: Caller, endpoint: Endpoint) -> Response:
    body = _object(request, await request.body())
    stream, with_usage = _take_stream(body)
    line, asker = _line(endpoint, body), asker_of(caller)
    try:
        if stream:
            return await _streamed(request, questions, line, asker, endpoint, with_usage)
        answered = await unless_gone(request, questions.ask(line, asker))
    except ClientGone:
        return Response(status_code=499)
    except Exception as error:
        raise as_api_error(error) from error
    return _response(answered)


async def _streamed(
    request: Request, questions: Questions, line: bytes, asker: Asker, endpoint: Endpoint, with_usage: bool
) -> Response:
    """The stream from its first piece on: what goes wrong before that has a status of its own."""
    items = questions.stream(line, asker)
    try:
        begun = await unless_gone(request, anext(items))
        assert isinstance(begun, Begun)
        first = await unless_gone(request, anext(items))
    except BaseException:
        await items.aclose()
        raise
    if isinstance(first, Answered):  # without any text: it failed
        await items.aclose()
        return _response(first)
    is_chat = endpoint is Endpoint.CHAT
    chunks = Chunks(answer_id(begun.id, 0, is_chat=is_chat), int(time.time()), begun.model, is_chat, with_usage)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(first, items, chunks), media_type="text/event-stream", headers=headers)


async def _events(first: Item, items: AsyncGenerator[Item, None], chunks: Chunks) -> AsyncIterator[bytes]:
    try:
        async with aclosing(items):
            for piece in _pieces(first, chunks):
                yield _event(piece)
            async for item in items:
                for piece in _pieces(item, chunks):
                    yield _event(piece)
    except Exception as error:
        yield b"data: " + bytes(as_api_error(error).response().body) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _pieces(item: Item, chunks: Chunks) -> list[dict[str, Any]]:
    if isinstance(item, Begun):
        return []
    if not isinstance(item, Answered):
        return chunks.of(**asdict(item))
    if item.status >= 400:
        return [item.body]
    return chunks.usage(item.body["usage"])


def _event(piece: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(piece) + b"\n\n"


def _response(answered: Answered) -> Response:
    # Asked again, the same row fails again.
    headers = {"x-should-retry": "false"} if answered.status >= 400 else None
    return JSONResponse(answered.body, answered.status, headers)


def _object(request: Request, raw: bytes) -> dict[str, Any]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"a question is application/json, not {kind}", code="unsupported_media_type")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise invalid("the body is JSON but not an object")
    return body


def _take_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """Takes what no line has: whether the answer is streamed, and the usage with it."""
    stream, options = body.pop("stream", None), body.pop("stream_options", None)
    if stream is not None and not isinstance(stream, bool):
        raise invalid("`stream` must be true or false", param="stream")
    if options is None:
        return bool(stream), False
    if not stream:
        raise invalid("`stream_options` is for `stream: true`", param="stream_options")
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or options.keys() - known:
        raise invalid("`stream_options` may have `include_usage`", param="stream_options")
    if not all(value is None or isinstance(value, bool) for value in options.values()):
        raise invalid("`stream_options.include_usage` must be true or false", param="stream_options.include_usage")
    return True, bool(options.get("include_usage"))


def _line(endpoint: Endpoint, body: dict[str, Any]) -> bytes:
    # The id decides what is drawn where the question has no seed: each is drawn anew.
    line = {"custom_id": new_question_id(), "method": "POST", "url": endpoint.value, "body": body}
    try:
        return orjson.dumps(line)
    except orjson.JSONEncodeError as error:
        raise invalid(f"the body cannot be read: {error}") from None
