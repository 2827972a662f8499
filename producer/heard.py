"""What was heard of a question's answers, put together: each part once, whoever said it; the result has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramill.schemas.said import Said, SaidChoice


class AnswerChanged(Exception):
    """Another worker, or the same one later, came to another answer than was passed on."""

    def __init__(self) -> None:
        super().__init__("the worker was lost, and the answer came out differently when it was made again; ask again")


@dataclass(slots=True, frozen=True)
class Delta:
    """More of an answer."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    """On the last one of each answer."""
    loramill: dict[str, Any] | None = None
    """Who answered; beside the reason for its end."""


@dataclass(slots=True)
class _Answer:
    text: str = ""
    tokens: int = 0


class Heard:
    """The answers of one question, by index."""

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}

    def take(self, entry: bytes) -> list[Delta]:
        """What an entry of the channel adds. What was said before is passed over, as is what has a gap before it: the
        result has all of it. Raises AnswerChanged."""
        deltas = (self._more(choice) for choice in Said.model_validate_json(entry).choices)
        return [delta for delta in deltas if delta is not None]

    def rest(self, body: dict[str, Any]) -> list[Delta]:
        """What the result adds, with the reason for the end of each answer. Raises AnswerChanged."""
        deltas = []
        for choice in body["choices"]:
            index, known = choice["index"], self._answers.get(choice["index"], _Answer())
            text: str = choice["message"]["content"] if "message" in choice else choice["text"]
            if not text.startswith(known.text):
                raise AnswerChanged
            logprobs, ids = _after(choice["logprobs"], known.tokens), choice.get("token_ids")
            new_ids = ids and ids[known.tokens :]
            ending = choice["finish_reason"], body["loramill"]
            deltas.append(Delta(index, text[len(known.text) :], logprobs, new_ids, *ending))
        return deltas

    def _more(self, said: SaidChoice) -> Delta | None:
        known = self._answers.setdefault(said.index, _Answer())
        has = len(known.text) - said.at
        if has < 0:
            return None
        again = known.text[said.at : said.at + len(said.text)]
        if again != said.text[: len(again)]:
            raise AnswerChanged
        known.text += said.text[has:]
        had = known.tokens - said.first
        if had < 0:
            return Delta(said.index, said.text[has:])
        logprobs, ids = _after(said.logprobs, had), said.token_ids and said.token_ids[had:]
        known.tokens += max(_count(logprobs), len(ids or ()))
        return Delta(said.index, said.text[has:], logprobs, ids)


def _after(logprobs: dict[str, Any] | None, count: int) -> dict[str, Any] | None:
    """Without those of the first tokens; None if none are left."""
    if logprobs is None:
        return None
    left = {name: said[count:] if isinstance(said, list) else said for name, said in logprobs.items()}
    return left if _count(left) else None


def _count(logprobs: dict[str, Any] | None) -> int:
    """Of how many tokens."""
    return max((len(said) for said in (logprobs or {}).values() if isinstance(said, list)), default=0)
