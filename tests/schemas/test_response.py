from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from loramill.schemas.request import Row, parse_line
from loramill.schemas.response import Answer, Choice, Served, TokenInfo, error_line, ok_line

HE = TokenInfo("He", b"He", -0.5, (TokenInfo("He", b"He", -0.5), TokenInfo("bytes:\\xc3", b"\xc3", float("-inf"))))
Y = TokenInfo("y", b"y", -1.5, (TokenInfo("x", b"x", -0.1),))
END = TokenInfo("</s>", b"", -0.25)
CHOICE = Choice(0, "Hey", "stop", [5, 6, 2], [HE, Y, END])


def row(**fields: Any) -> Row:
    prompt = {} if "messages" in fields else {"prompt": "p"}
    return parse_line(orjson.dumps({"id": "r-1"} | prompt | fields))


def chat_row(**fields: Any) -> Row:
    return row(messages=[{"role": "user", "content": "p"}], **fields)


def answer(*choices: Choice, adapter: str | None = "sql") -> Answer:
    return Answer(choices, 4, "asked", [Served(adapter, "ab12")] if adapter else [], "dynamic" if adapter else "base")


def body_of(line: bytes) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(line)["response"]["body"]
    return body


def test_chat_line_is_what_the_official_client_reads() -> None:
    line = ok_line("job", 3, chat_row(), answer(CHOICE, Choice(1, "é", "length", [9], None)), created=1_700_000_000)
    parsed = orjson.loads(line)
    assert list(parsed) == ["id", "custom_id", "response", "error"]
    assert (parsed["custom_id"], parsed["error"], parsed["response"]["status_code"]) == ("r-1", None, 200)
    assert parsed["id"].startswith("batch_req_") and parsed["response"]["request_id"]
    reply = ChatCompletion.model_validate(parsed["response"]["body"], strict=True)
    assert (reply.model, reply.created) == ("asked", 1_700_000_000)
    assert [choice.message.content for choice in reply.choices] == ["Hey", "é"]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "length"]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (4, 4, 8)
    assert reply.choices[1].logprobs is None
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    he, _, end = reply.choices[0].logprobs.content
    assert (he.token, he.bytes, he.logprob) == ("He", [72, 101], -0.5)
    assert [(top.token, top.bytes, top.logprob) for top in he.top_logprobs] == [
        ("He", [72, 101], -0.5),
        ("bytes:\\xc3", [0xC3], -9999.0),
    ]
    assert (end.token, end.bytes, end.top_logprobs) == ("</s>", None, [])


def test_completion_line_is_what_the_official_client_reads() -> None:
    reply = Completion.model_validate(body_of(ok_line("job", 3, row(), answer(CHOICE), created=1)), strict=True)
    assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == ("text_completion", "Hey", "stop")
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["He", "y", "</s>"]
    assert logprobs.token_logprobs == [-0.5, -1.5, -0.25]
    assert logprobs.text_offset == [0, 2, 3]
    assert logprobs.top_logprobs == [{"He": -0.5, "bytes:\\xc3": -9999.0}, {"x": -0.1, "y": -1.5}, {"</s>": -0.25}]


def test_logprobs_without_alternatives() -> None:
    choice = Choice(0, "y", "stop", [6], [TokenInfo("y", b"y", -1.5)])
    body = body_of(ok_line("job", 3, row(), answer(choice), created=1))
    assert body["choices"][0]["logprobs"]["top_logprobs"] is None


def test_text_offsets_count_characters_and_stop_where_the_text_does() -> None:
    tokens = [TokenInfo("", raw, -1.0) for raw in (b"\xf0\x9f", b"\x98\x80", b"a", b"\xc3", b"\xa9", b"st", b"op")]
    choice = Choice(0, "\U0001f600aé", "stop", [1, 2, 3, 4, 5, 6, 7], tokens)
    body = body_of(ok_line("job", 3, row(), answer(choice), created=1))
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("make", [row, chat_row])
def test_token_ids_only_when_asked_for(make: Any) -> None:
    for asked, expected in ((True, [5, 6, 2]), (False, None)):
        body = body_of(ok_line("job", 3, make(return_token_ids=asked), answer(CHOICE), created=1))
        assert body["choices"][0].get("token_ids") == expected


def test_who_answered() -> None:
    with_adapter = body_of(ok_line("job", 3, row(), answer(CHOICE), created=1))
    assert with_adapter["loramill"] == {"adapter": "sql", "adapter_sha256": "ab12", "mode": "dynamic"}
    base = body_of(ok_line("job", 3, row(), answer(CHOICE, adapter=None), created=1))
    assert base["loramill"] == {"adapter": None, "adapter_sha256": None, "mode": "base"}


def test_who_answered_at_what_strength() -> None:
    def said(mode: str, *served: Served) -> dict[str, Any]:
        answered = Answer([CHOICE], 4, "asked", served, mode)
        found: dict[str, Any] = body_of(ok_line("job", 3, row(), answered, created=1))["loramill"]
        return found

    scaled = said("static", Served("sql", "ab12", 0.5))
    assert scaled == {"adapter": "sql", "adapter_sha256": "ab12", "mode": "static", "scale": 0.5}
    assert said("dynamic", Served("sql", "ab12", 0.5), Served("chat", "cd34")) == {
        "adapter": None,
        "adapter_sha256": None,
        "mode": "dynamic",
        "adapters": [
            {"name": "sql", "adapter_sha256": "ab12", "scale": 0.5},
            {"name": "chat", "adapter_sha256": "cd34", "scale": 1.0},
        ],
    }


def test_ids_depend_on_the_job_and_the_row_and_on_nothing_else() -> None:
    def ids(job: str, number: int, created: int) -> tuple[str, str, str]:
        line = orjson.loads(ok_line(job, number, row(), answer(CHOICE), created=created))
        return line["id"], line["response"]["request_id"], line["response"]["body"]["id"]

    assert ids("job", 1, 5) == ids("job", 1, 6)
    assert len({*ids("job", 1, 5), *ids("job", 2, 5), *ids("job2", 1, 5)}) == 9


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (500, "server_error")])
def test_error_line(status: int, kind: str) -> None:
    line = orjson.loads(error_line("job", 1, None, "bad\nthing", code="c", param="n", status=status))
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == (None, None, status)
    assert line["response"]["body"] == {"error": {"message": "bad\nthing", "type": kind, "param": "n", "code": "c"}}


def test_a_line_is_one_line() -> None:
    choice = Choice(0, "a\nb\r\u2028", "stop", [1])
    assert b"\n" not in ok_line("job", 1, chat_row(), answer(choice), created=1)
