"""What questions and models are answered with, for the API's document: the answers are a result line's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

_FINISHED = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatAnswer(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: _FINISHED


class ChatCompletion(BaseModel):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatAnswer]
    usage: Usage
    loramill: dict[str, Any]
    """Which adapter answered, of which content, and how."""


class TextAnswer(BaseModel):
    """One of the answers."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: _FINISHED


class TextCompletion(BaseModel):
    """The answers to a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextAnswer]
    usage: Usage
    loramill: dict[str, Any]


class ModelObject(BaseModel):
    """Something that can stand in `model`. The fields beyond OpenAI's are vLLM's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When the first of the workers that are there was started, in seconds since 1970."""
    owned_by: str = "loramill"
    root: str
    """What it comes to: the base, an adapter, or an alias of several."""
    parent: str | None
    """The base, of everything else."""
    max_model_len: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
