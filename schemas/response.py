"""Output lines: an answered row as an OpenAI batch output line, a failed one as an error line."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import orjson

from .request import Row

# JSON has no infinity: a token that cannot follow has this log probability, as with OpenAI.
LOWEST_LOGPROB = -9999.0


@dataclass(slots=True, frozen=True)
class TokenInfo:
    """One token's text, bytes (empty for a special token) and log probability, with the alternatives, best first."""

    text: str
    raw: bytes
    logprob: float
    top: Sequence[TokenInfo] = ()


@dataclass(slots=True, frozen=True)
class Choice:
    """One answer of a row."""

    index: int
    text: str
    finish_reason: str
    """`stop` or `length`."""
    token_ids: Sequence[int]
    """All that was generated, the end-of-sequence token included."""
    logprobs: Sequence[TokenInfo] | None = None
    """One for each token that counts towards the text; None when they were not asked for."""


@dataclass(slots=True, frozen=True)
class Served:
    """An adapter that answered, by its name and its content's hash, and at what strength."""

    name: str
    sha256: str
    scale: float = 1.0


@dataclass(slots=True, frozen=True)
class Answer:
    """What one row came to: everything its output line says beside the row itself."""

    choices: Sequence[Choice]
    prompt_tokens: int
    model: str
    """The name shown as `model`; by convention the row's own, the base's where the row has none."""
    adapters: Sequence[Served] = ()
    """One, several mixed, or none: the base."""
    mode: str = "base"
    """`base`, `dynamic` or `static`."""
    completion_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "completion_tokens", sum(len(choice.token_ids) for choice in self.choices))


def ok_line(job: str, number: int, row: Row, answer: Answer, created: int) -> bytes:
    """The output line of an answered row, without a newline.

    `job` and `number` (the job's identity, the row's number in it) make the ids, so a rerun makes the same ones;
    `created` is in seconds since 1970.
    """
    render = _chat_choice if row.is_chat else _text_choice
    with_ids = bool(row.params.return_token_ids)
    body = {
        "id": answer_id(job, number, is_chat=row.is_chat),
        "object": "chat.completion" if row.is_chat else "text_completion",
        "created": created,
        "model": answer.model,
        "choices": [
            render(choice) | ({"token_ids": choice.token_ids} if with_ids else {}) for choice in answer.choices
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
        "loramill": _served(answer),
    }
    return _line(job, number, row.custom_id, 200, body)


def answer_id(job: str, number: int, *, is_chat: bool) -> str:
    """The id of a row's answer."""
    return ("chatcmpl-" if is_chat else "cmpl-") + _digest(job, number, "body")


def _served(answer: Answer) -> dict[str, Any]:
    one = answer.adapters[0] if len(answer.adapters) == 1 else None
    said: dict[str, Any] = {
        "adapter": one and one.name,
        "adapter_sha256": one and one.sha256,
        "mode": answer.mode,
    }
    if one and one.scale != 1:
        said["scale"] = one.scale
    if len(answer.adapters) > 1:
        said["adapters"] = [
            {"name": each.name, "adapter_sha256": each.sha256, "scale": each.scale} for each in answer.adapters
        ]
    return said


def error_line(
    job: str,
    number: int,
    custom_id: str | None,
    message: str,
    *,
    code: str,
    param: str | None = None,
    status: int = 400,
) -> bytes:
    """The error-file line of a row that failed, without a newline: `status` 4xx is the row's fault, 5xx is ours."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _line(job, number, custom_id, status, {"error": error})


def result_id_of(line: bytes) -> str | None:
    """The custom_id of an output or error line; None if the row had none that could be read."""
    custom_id: str | None = orjson.loads(line)["custom_id"]
    return custom_id


def never_run_line(job: str, number: int, custom_id: str, *, code: str, message: str) -> bytes:
    """The error-file line of a row that its job ended without, without a newline: `error` says why, nobody answered."""
    return orjson.dumps(_envelope(job, number, custom_id) | {"error": {"code": code, "message": message}})


def _line(job: str, number: int, custom_id: str | None, status: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": "req_" + _digest(job, number, "request"), "body": body}
    return orjson.dumps(_envelope(job, number, custom_id) | {"response": response})


def _envelope(job: str, number: int, custom_id: str | None) -> dict[str, Any]:
    return {
        "id": "batch_req_" + _digest(job, number, "line"), "custom_id": custom_id, "response": None, "error": None,
    }  # fmt: skip


def _digest(job: str, number: int, kind: str) -> str:
    return blake2b(f"{job}\0{number}\0{kind}".encode(), digest_size=12).hexdigest()


def logprobs_of(tokens: Sequence[TokenInfo], text: str, *, is_chat: bool, first: int = 0) -> dict[str, Any]:
    """The log probabilities of an answer's tokens, from number `first` on, as OpenAI shows them."""
    if not is_chat:
        return {name: said and said[first:] for name, said in _text_logprobs(text, tokens).items()}
    content = [
        _chat_token(token) | {"top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens[first:]
    ]
    return {"content": content, "refusal": None}


def _chat_choice(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None if choice.logprobs is None else logprobs_of(choice.logprobs, choice.text, is_chat=True),
        "finish_reason": choice.finish_reason,
    }


def _chat_token(token: TokenInfo) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": max(token.logprob, LOWEST_LOGPROB),
        "bytes": list(token.raw) if token.raw else None,
    }


def _text_choice(choice: Choice) -> dict[str, Any]:
    logprobs = None if choice.logprobs is None else logprobs_of(choice.logprobs, choice.text, is_chat=False)
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def _text_logprobs(text: str, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
        "top_logprobs": [_top(token) for token in tokens] if any(token.top for token in tokens) else None,
        "text_offset": _offsets(text, tokens),
    }


def _top(token: TokenInfo) -> dict[str, float]:
    # As with OpenAI, the chosen token is always there, so there can be one more than asked for.
    named = {other.text: max(other.logprob, LOWEST_LOGPROB) for other in token.top}
    return named | {token.text: max(token.logprob, LOWEST_LOGPROB)}


def _offsets(text: str, tokens: Sequence[TokenInfo]) -> list[int]:
    """Where in `text` each token starts, in characters; a token inside a character starts where that one does."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    offsets = []
    position = 0
    for token in tokens:
        offsets.append(min(position, len(text)))
        position += len(decoder.decode(token.raw))
    return offsets
