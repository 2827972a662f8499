"""An answer while it is made, as a worker says it on the channel of its question."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class SaidChoice(BaseModel):
    """More of one of the answers. All that is said of an answer is a beginning of what its result line has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    at: int
    """Where in the answer the text stands, in characters: what is said again, by another engine, is known by it."""
    text: str
    first: int = 0
    """Which token `logprobs` and `token_ids` begin with. They may be behind the text."""
    logprobs: dict[str, Any] | None = None
    """As in the result line, of these tokens; None if they were not asked for."""
    token_ids: list[int] | None = None


class Said(BaseModel):
    """What is said at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str
    """The lease's."""
    choices: list[SaidChoice]
