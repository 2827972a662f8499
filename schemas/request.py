"""One line of the input: an OpenAI batch line or the short native line."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson
from pydantic import ValidationError

from .content import Message
from .errors import ErrorCode, LineError, invalid
from .fields import INERT, UNSUPPORTED, unknown_field, without_unmodelled
from .sampling import ChatBody, CompletionBody, Params
from .wanted import Strengths, take_routes

MAX_LINE_BYTES = 16 * 2**20
MAX_ID_CHARS = 512


class Endpoint(StrEnum):
    """What a row asks for; the value is the line's `url`."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(slots=True, frozen=True)
class Row:
    """A line that is well-formed; whether its model exists and its prompt fits is not known yet."""

    custom_id: str
    endpoint: Endpoint
    model: str
    """As written: an adapter, an alias, the base, `base:adapter`, or "" for what a route says, else the base."""
    prompt: str | list[int] | list[Message]
    """Text or token ids for completions, messages for a chat."""
    params: Params
    scale: float | None = None
    """Strength of the one adapter that answers."""
    adapters: tuple[tuple[str, float], ...] = ()
    """A mix: names as written, each with its strength."""
    routes: tuple[tuple[str, str], ...] = ()
    """The route fields that the line has, with their values."""

    @property
    def is_chat(self) -> bool:
        """Whether `prompt` is messages."""
        return self.endpoint is Endpoint.CHAT


_ENVELOPE = frozenset({"custom_id", "method", "url", "body"})
_ENVELOPE_MARKS = ("custom_id", "body", "url")
_STRENGTHS = frozenset(Strengths.model_fields)
_NATIVE = frozenset({"id", "adapter", *_STRENGTHS})
_CHAT_FIELDS = frozenset(ChatBody.model_fields)
_COMPLETION_FIELDS = frozenset(CompletionBody.model_fields)
_ENDPOINTS = {endpoint.value: endpoint for endpoint in Endpoint}
_OURS = "loramill"
RESERVED_FIELDS = frozenset(
    {*_ENVELOPE, *_NATIVE, *_CHAT_FIELDS, *_COMPLETION_FIELDS, *INERT, *UNSUPPORTED, "best_of", _OURS}
)
"""Every field that means something, or is refused by name: no route can go by one."""


def parse_line(raw: bytes, route_fields: Collection[str] = ()) -> Row:
    """The row that one line of the input asks for; `route_fields` may stand in it too.

    Raises LineError with the line's custom_id where it has one.
    """
    line = _load(raw)
    is_envelope, id_field, custom_id = _find_id(line)
    try:
        checked = _check_id(custom_id, id_field)
        parse = _parse_envelope if is_envelope else _parse_native
        return parse(checked, line, route_fields)
    except LineError as error:
        error.custom_id = custom_id if isinstance(custom_id, str) else None
        raise


def custom_id_of(raw: bytes) -> str:
    """The custom_id of a line that was checked before, without checking it again. Raises LineError for any other."""
    _, field, custom_id = _find_id(_load(raw))
    return _check_id(custom_id, field)


def _find_id(line: dict[str, Any]) -> tuple[bool, str, Any]:
    """Whether it is an OpenAI batch line, what its id's field is called, and the id as it is to be checked."""
    is_envelope = any(mark in line for mark in _ENVELOPE_MARKS)
    field = "custom_id" if is_envelope else "id"
    custom_id = line.get(field)
    return is_envelope, field, str(custom_id) if not is_envelope and type(custom_id) is int else custom_id


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise LineError(ErrorCode.INVALID_JSON_LINE, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise LineError(ErrorCode.INVALID_JSON_LINE, _explain(raw, error)) from None
    if not isinstance(line, dict):
        raise LineError(ErrorCode.INVALID_JSON_LINE, "the line is JSON but not an object")
    return line


def _explain(raw: bytes, error: orjson.JSONDecodeError) -> str:
    """orjson's reason in the words of the person who wrote the file."""
    try:
        raw.decode()
    except UnicodeDecodeError as bad:
        return f"the line is not UTF-8 (byte {bad.start + 1})"
    if "surrogate" in error.msg:
        return f"the line holds a lone surrogate (\\ud800 to \\udfff without its pair) at column {error.colno}"
    if raw.startswith(b"NaN", error.pos) or raw.startswith((b"Infinity", b"-Infinity"), error.pos):
        return f"NaN and Infinity are not JSON (column {error.colno})"
    return f"the line is not JSON: {error.msg} at column {error.colno}"


def _check_id(custom_id: Any, field: str) -> str:
    if custom_id is None:
        if field == "id":
            raise invalid("the line has no `id` (native line) or `custom_id` (OpenAI batch line)", "id")
        raise invalid("`custom_id` is missing", field)
    if not isinstance(custom_id, str):
        raise invalid(f"`{field}` must be a string", field)
    if not custom_id:
        raise invalid(f"`{field}` is empty", field)
    if len(custom_id) > MAX_ID_CHARS:
        raise invalid(f"`{field}` is longer than {MAX_ID_CHARS} characters", field)
    return custom_id


def _parse_envelope(custom_id: str, line: dict[str, Any], route_fields: Collection[str]) -> Row:
    if line.keys() != _ENVELOPE:
        for name in sorted(line.keys() - _ENVELOPE):
            raise unknown_field(name, _ENVELOPE)
        for name in sorted(_ENVELOPE - line.keys()):
            raise invalid(f"`{name}` is missing", name)
    if line["method"] != "POST":
        raise invalid('`method` must be "POST"', "method")
    url = line["url"]
    endpoint = _ENDPOINTS.get(url) if isinstance(url, str) else None
    if endpoint is None:
        raise LineError(ErrorCode.URL_MISMATCH, f"`url` must be one of {', '.join(_ENDPOINTS)}", "url")
    body = line["body"]
    if not isinstance(body, dict):
        raise invalid("`body` must be an object", "body")
    ours = body.pop(_OURS, None)
    if ours is not None and not isinstance(ours, dict):
        raise invalid(f"`{_OURS}` must be an object", _OURS)
    return _parse_body(custom_id, endpoint, body, _strengths(ours or {}, f"{_OURS}."), route_fields)


def _parse_native(custom_id: str, line: dict[str, Any], route_fields: Collection[str]) -> Row:
    if line.pop(_OURS, None):
        raise invalid(f"`{_OURS}` is for OpenAI batch lines; `scale` and `adapters` stand by themselves here", _OURS)
    body = {name: value for name, value in line.items() if name not in _NATIVE}
    adapter = line.get("adapter")
    if adapter is not None:
        if not isinstance(adapter, str):
            raise invalid("`adapter` must be a string", "adapter")
        if body.get("model") not in (None, adapter):
            raise invalid("`adapter` and `model` name different things; give one", "adapter")
        body["model"] = adapter
    is_chat = body.get("messages") is not None
    if is_chat == (body.get("prompt") is not None):
        how = "both `prompt` and `messages`" if is_chat else "neither `prompt` nor `messages`"
        raise invalid(f"the line has {how}; give exactly one", "prompt")
    body.pop("prompt" if is_chat else "messages", None)
    endpoint = Endpoint.CHAT if is_chat else Endpoint.COMPLETIONS
    given = {name: line[name] for name in _STRENGTHS if name in line}
    return _parse_body(custom_id, endpoint, body, _strengths(given), route_fields)


def _parse_body(
    custom_id: str, endpoint: Endpoint, body: dict[str, Any], asked: Strengths, route_fields: Collection[str]
) -> Row:
    wanted = (asked.scale, asked.mix, take_routes(body, route_fields) if route_fields else ())
    try:
        if endpoint is Endpoint.CHAT:
            chat = ChatBody.model_validate(without_unmodelled(body, _CHAT_FIELDS))
            if chat.top_logprobs is not None and not chat.logprobs:
                raise invalid("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
            row = Row(custom_id, endpoint, chat.model or "", chat.messages, chat, *wanted)
        else:
            completion = CompletionBody.model_validate(without_unmodelled(body, _COMPLETION_FIELDS))
            row = Row(custom_id, endpoint, completion.model or "", completion.prompt, completion, *wanted)
    except ValidationError as error:
        raise _line_error(error) from None
    params = row.params
    if params.max_tokens is not None and params.max_completion_tokens not in (None, params.max_tokens):
        raise invalid("`max_tokens` and `max_completion_tokens` differ; give one", "max_tokens")
    return row


def _strengths(given: dict[str, Any], path: str = "") -> Strengths:
    """`scale` and `adapters`; `path` is where they stand."""
    if not given:
        return _NOTHING_ASKED
    if extra := given.keys() - _STRENGTHS:
        raise unknown_field(min(extra), _STRENGTHS, path)
    try:
        asked = Strengths.model_validate(given)
    except ValidationError as error:
        raise _line_error(error, path) from None
    if asked.scale is not None and asked.adapters is not None:
        raise invalid(f"`{path}scale` and `{path}adapters`: each adapter of a mix has its own scale", f"{path}scale")
    return asked


_NOTHING_ASKED = Strengths()


def _line_error(error: ValidationError, where: str = "") -> LineError:
    """The first complaint of pydantic, as one sentence about one field; `where` goes before the field's path."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LineError):
        return cause
    path = where + ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "missing":
        return invalid(f"`{path}` is missing", path)
    complaint = first["msg"].removeprefix("Input ").removeprefix("Value ").removesuffix(" after validation")
    glue = " " if complaint.startswith("should") else ": "
    value = first["input"]
    got = f", got {orjson.dumps(value).decode()}" if isinstance(value, (int, float)) else ""
    return invalid(f"`{path}`{glue}{complaint[0].lower()}{complaint[1:]}{got}", path)
