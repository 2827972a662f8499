"""One question, whole or as it is answered, and talks of several turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loramill.producer.generated import Generated, of_body
from loramill.producer.remote.errors import ClientError, refused
from loramill.producer.remote.steps import Body, Call, Item, Next, Steps, asked

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | Sequence[int]
END = "[DONE]"


@dataclass(slots=True, frozen=True)
class Delta:
    """Some text of an answer, or its end."""

    text: str
    index: int = 0
    """Of the answer, where several were asked for."""
    finish_reason: str | None = None
    """`stop` or `length`, with the last text."""
    usage: Mapping[str, Any] | None = None
    """At the very end, of all answers, where `stream_options` asked for it."""


def question(
    given: Prompt | Sequence[Message], model: str | None, sampling: Mapping[str, Any], *, stream: bool, timeout_s: float
) -> Call:
    """The request: a text or token ids are a prompt, messages a chat."""
    is_chat = not isinstance(given, str) and bool(given) and isinstance(given[0], Mapping)
    body = {"model": model or "", "messages" if is_chat else "prompt": given, **sampling}
    return Call(
        "POST",
        "chat/completions" if is_chat else "completions",
        json=body | ({"stream": True} if stream else {}),
        body=Body.EVENTS if stream else Body.WHOLE,
        timeout_s=timeout_s,
    )


def answered(call: Call, patience_s: float) -> Steps[Generated]:
    """Raises Refused, Unreachable."""
    reply = yield from asked(call, patience_s)
    return of_body(0, "", json.loads(reply.content))


def streamed(call: Call, patience_s: float, hear: Callable[[Delta], None] = lambda delta: None) -> Steps[None]:
    """Deltas, as items. What was begun is not asked again: an answer that breaks off is an error."""
    yield from asked(call, patience_s)
    while (event := (yield Next())) is not None:
        if event.data == END:
            return
        for delta in _deltas(json.loads(event.data)):
            hear(delta)
            yield Item(delta)
    raise ClientError("the answer ended before its end: the connection was closed")


def _deltas(said: Mapping[str, Any]) -> list[Delta]:
    if "error" in said:
        raise refused(int(said["error"].get("status") or 500), {}, json.dumps(said).encode())
    made = [
        Delta(
            choice.get("text") or (choice.get("delta") or {}).get("content") or "",
            choice["index"],
            choice["finish_reason"],
        )
        for choice in said["choices"]
    ]
    return made or [Delta("", usage=said["usage"])] if said.get("usage") else made


def begun(model: str | None, system: str | None, sampling: Mapping[str, Any], timeout_s: float) -> Talk:
    """A talk in which nobody has spoken yet."""
    return Talk(model, sampling, timeout_s, [] if system is None else [Message(role="system", content=system)])


@dataclass(slots=True)
class Talk:
    """Several turns with one model: what was asked and answered, each pair once its answer is whole."""

    model: str | None
    sampling: Mapping[str, Any]
    timeout_s: float
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str, patience_s: float) -> Steps[Generated]:
        """The next answer. Raises Refused, Unreachable."""
        turn = Message(role="user", content=text)
        result = yield from answered(self._question(turn, stream=False), patience_s)
        self.messages += [turn, Message(role="assistant", content=result.text)]
        return result

    def stream(self, text: str, patience_s: float) -> Steps[None]:
        """The next answer as it is made: Deltas, as items. Raises Refused, Unreachable."""
        turn, parts = Message(role="user", content=text), list[str]()

        def hear(delta: Delta) -> None:
            if delta.index == 0:
                parts.append(delta.text)

        yield from streamed(self._question(turn, stream=True), patience_s, hear)
        self.messages += [turn, Message(role="assistant", content="".join(parts))]

    def _question(self, turn: Message, *, stream: bool) -> Call:
        return question([*self.messages, turn], self.model, self.sampling, stream=stream, timeout_s=self.timeout_s)
