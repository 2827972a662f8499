"""An answer in pieces, as OpenAI streams it: chat.completion.chunk and text_completion objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Chunks:
    """Makes the pieces of one question's answers."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    is_chat: bool
    with_usage: bool = False
    """Whether the last piece has the usage, and the others a null in its place."""
    _begun: set[int] = field(default_factory=set)

    def of(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        token_ids: list[int] | None = None,
        finish_reason: str | None = None,
        loramill: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """More of answer `index`, and its end with a `finish_reason`, where `loramill` says who answered."""
        pieces = [] if index in self._begun else self._opening(index)
        if text or logprobs or token_ids:
            content: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
            ids = {} if token_ids is None else {"token_ids": token_ids}
            pieces.append(self._piece(index, content | ids, logprobs))
        if finish_reason is not None:
            content = {"delta": {}} if self.is_chat else {"text": ""}
            pieces.append(self._piece(index, content, None, finish_reason) | {"loramill": loramill})
        return pieces

    def usage(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """The last piece, if it was asked for."""
        return [self._head() | {"choices": [], "usage": usage}] if self.with_usage else []

    def _opening(self, index: int) -> list[dict[str, Any]]:
        self._begun.add(index)
        opening = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return [self._piece(index, opening, None)] if self.is_chat else []

    def _piece(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head() | {"choices": [choice]} | ({"usage": None} if self.with_usage else {})

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
