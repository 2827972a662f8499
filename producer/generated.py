"""What goes into the Python API and what comes out: rows as dicts, results as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
"""An input line of `loramill run`, native or OpenAI's, as a dict; a native one needs no `id`."""


@dataclass(slots=True, frozen=True)
class Sample:
    """One answer to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    """All that was generated, the end-of-sequence token included; none where the row did not ask for them."""
    finish_reason: str
    """`stop` or `length`."""
    logprobs: dict[str, Any] | None
    """As in OpenAI's choices."""


@dataclass(slots=True, frozen=True)
class Generated:
    """What came of one row: `n` samples, or an `error` and none."""

    index: int
    """The row's position among those that were passed."""
    id: str
    samples: list[Sample]
    prompt_tokens: int
    completion_tokens: int
    adapter: str | None
    adapter_sha256: str | None
    """Of the one adapter that answered; None for the base and for a mix."""
    error: str | None = None
    adapters: dict[str, float] = field(default_factory=dict)
    """All that answered, with the strength of each."""
    mode: str | None = None
    """`base`, `dynamic` or `static`."""

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self._first.text

    @property
    def token_ids(self) -> list[int]:
        """The first sample's tokens."""
        return self._first.token_ids

    @property
    def finish_reason(self) -> str:
        """The first sample's."""
        return self._first.finish_reason

    @property
    def _first(self) -> Sample:
        if self.error is not None:
            raise RuntimeError(f"row {self.index} failed: {self.error}")
        return self.samples[0]


def rows_of(prompts: Any, adapter: str | None, sampling: Mapping[str, Any]) -> Iterator[Row]:
    """One native line for each prompt."""
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    if several and isinstance(several[0], int | Mapping):
        several = [several]  # token ids, or messages: one prompt
    for prompt in several:
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
        yield {"messages" if is_chat else "prompt": prompt, "adapter": adapter, **sampling}


def line_of(row: Row, number: int) -> dict[str, Any]:
    """The row as an input line that has an id."""
    return dict(row) if isinstance(row.get("body"), Mapping) else {"id": str(number), **row}


def with_token_ids(line: dict[str, Any]) -> dict[str, Any]:
    """The input line asking for token ids too."""
    if isinstance(line.get("body"), Mapping):
        return {**line, "body": {**line["body"], "return_token_ids": True}}
    return {**line, "return_token_ids": True}


def generated(index: int, line: bytes) -> Generated:
    """The result that an output or error line holds."""
    return result_of(index, json.loads(line))


def result_of(index: int, result: Mapping[str, Any]) -> Generated:
    """The same of a line that was read."""
    if result["response"] is None:  # it never ran
        return failed(index, result["custom_id"], result["error"]["message"])
    return of_body(index, result["custom_id"], result["response"]["body"])


def failed(index: int, id: str, error: str) -> Generated:
    """Of a row without an answer."""
    return Generated(index, id, [], 0, 0, None, None, error)


def of_body(index: int, id: str, body: Mapping[str, Any]) -> Generated:
    """The result that a completion holds, or an error instead of one."""
    if "error" in body:
        return failed(index, id, body["error"]["message"])
    samples = [
        Sample(
            choice["index"],
            choice["message"]["content"] if "message" in choice else choice["text"],
            choice.get("token_ids", []),
            choice["finish_reason"],
            choice["logprobs"],
        )
        for choice in body["choices"]
    ]
    usage, served = body["usage"], body["loramill"]
    return Generated(
        index,
        id,
        samples,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        served["adapter"],
        served["adapter_sha256"],
        adapters=_strengths(served),
        mode=served["mode"],
    )


def _strengths(served: Mapping[str, Any]) -> dict[str, float]:
    if served["adapter"] is not None:
        return {served["adapter"]: served.get("scale", 1.0)}
    return {one["name"]: one["scale"] for one in served.get("adapters", ())}
