"""The sampling fields of a request body, and the final values that they and the defaults come to."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .content import MAX_TOKEN_ID, Message, check_messages, check_prompt
from .errors import ErrorCode, LineError

COMPLETION_MAX_TOKENS = 16
"""What OpenAI's completions stop at when `max_tokens` is absent; a chat goes on to the context's end."""

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopText = Annotated[str, Field(min_length=1)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Params(BaseModel):
    """Sampling fields common to both endpoints. None is absent (or null): the model's default holds."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """-1 and 0 keep every token."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    """Token id, as a string -> what is added to its logit."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[list[StopText], Field(max_length=16), BeforeValidator(_as_list)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @property
    def token_cap(self) -> int | None:
        """`max_completion_tokens` or its older name `max_tokens`; None when neither is given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives to report beside each token; None when no log probabilities are asked for."""
        return None

    @property
    def samples(self) -> int:
        """How many answers are asked for (`n`)."""
        return self.n or 1


class ChatBody(Params):
    """The body of a /v1/chat/completions line."""

    model: str | None = None
    messages: Annotated[list[Message], BeforeValidator(check_messages)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Params):
    """The body of a /v1/completions line."""

    model: str | None = None
    prompt: Annotated[str | list[int], BeforeValidator(check_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs


def resolve_max_tokens(params: Params, prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens a row may generate.

    Raises LineError (token_limit_exceeded) when the prompt leaves no room for one, or not for as many as were asked.
    """
    room = max_model_len - prompt_tokens
    asked = params.token_cap
    if room < 1:
        message = f"the prompt has {prompt_tokens} tokens, and the model's context is {max_model_len}"
        raise LineError(
            ErrorCode.TOKEN_LIMIT_EXCEEDED, message, "messages" if isinstance(params, ChatBody) else "prompt"
        )
    if asked is None:
        return room if isinstance(params, ChatBody) else min(COMPLETION_MAX_TOKENS, room)
    if asked > room:
        raise LineError(
            ErrorCode.TOKEN_LIMIT_EXCEEDED,
            f"{prompt_tokens} prompt tokens and {asked} to generate exceed the model's context of {max_model_len}",
            "max_tokens" if params.max_completion_tokens is None else "max_completion_tokens",
        )
    return asked


def resolve_params(
    params: Params,
    custom_id: str,
    *,
    defaults: Mapping[str, float],
    prompt_tokens: int,
    max_model_len: int,
    seed: int,
) -> dict[str, Any]:
    """The final value of every sampling field, by the engine's names (`Sampling(**resolve_params(...))`).

    A field that the row leaves out takes `defaults` (the model's generation config), else OpenAI's default. A row
    without a seed gets one from the run's `seed` and its custom_id, so that a rerun gives the same tokens.
    Raises LineError (token_limit_exceeded) like `resolve_max_tokens`.
    """

    def pick(value: float | None, name: str, default: float) -> float:
        return float(defaults.get(name, default) if value is None else value)

    return {
        "max_tokens": resolve_max_tokens(params, prompt_tokens, max_model_len),
        "temperature": pick(params.temperature, "temperature", 1.0),
        "top_p": pick(params.top_p, "top_p", 1.0),
        "top_k": max(0, int(pick(params.top_k, "top_k", 0))),
        "min_p": pick(params.min_p, "min_p", 0.0),
        "repetition_penalty": pick(params.repetition_penalty, "repetition_penalty", 1.0),
        "presence_penalty": params.presence_penalty or 0.0,
        "frequency_penalty": params.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (params.logit_bias or {}).items()},
        "seed": _row_seed(seed, custom_id) if params.seed is None else params.seed % 2**64,
        "n": params.samples,
        "stop": tuple(params.stop or ()),
        "stop_token_ids": tuple(params.stop_token_ids or ()),
        "ignore_eos": bool(params.ignore_eos),
        "logprobs": params.logprob_count,
    }


def _row_seed(seed: int, custom_id: str) -> int:
    digest = blake2b(f"{seed}\0{custom_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
