from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.schemas.errors import LineError
from loramill.schemas.request import MAX_LINE_BYTES, Endpoint, Row, parse_line

CHAT = [{"role": "user", "content": "hi"}]


def native(**fields: Any) -> bytes:
    return orjson.dumps({"id": "r", "prompt": "p"} | fields)


def openai(url: str = "/v1/completions", line: dict[str, Any] | None = None, **body: Any) -> bytes:
    prompt: dict[str, Any] = {"messages": CHAT} if "chat" in url else {"prompt": "p"}
    return orjson.dumps(
        {"custom_id": "r", "method": "POST", "url": url, "body": prompt | body} | (line or {}),
    )


def refusal(raw: bytes) -> LineError:
    with pytest.raises(LineError) as caught:
        parse_line(raw)
    assert "\n" not in caught.value.message
    return caught.value


def test_openai_chat_line() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        {"role": "user", "content": ""},
    ]
    row = parse_line(openai("/v1/chat/completions", model="sql", messages=messages, max_completion_tokens=7))
    assert (row.custom_id, row.endpoint, row.model, row.is_chat) == ("r", Endpoint.CHAT, "sql", True)
    assert row.prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]
    assert row.params.token_cap == 7


def test_native_line_is_the_same_row_as_the_openai_line() -> None:
    fields = {"max_tokens": 3, "temperature": 0, "stop": "x", "seed": -1, "logit_bias": {"5": -1}, "logprobs": 2}
    assert parse_line(native(adapter="sql", **fields)) == parse_line(openai(model="sql", **fields))
    chat = orjson.dumps({"id": 7, "messages": CHAT, "model": "sql"})
    assert parse_line(chat).custom_id == "7"
    assert parse_line(chat).endpoint is Endpoint.CHAT


@pytest.mark.parametrize("prompt", ["text", [1, 2], ["text"], [[1, 2]]])
def test_prompt_forms(prompt: Any) -> None:
    assert parse_line(native(prompt=prompt)).prompt in ("text", [1, 2])


def test_null_is_absent() -> None:
    names = [*parse_line(native()).params.__class__.model_fields, "tools", "stream", "user", "adapter"]
    nulls = {name: None for name in names if name != "prompt"}
    assert parse_line(native(**nulls)) == parse_line(native())


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False, "tools": [], "tool_choice": "none", "echo": False, "suffix": ""},
        {"response_format": {"type": "text"}, "modalities": ["text"], "best_of": 1},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "parallel_tool_calls": True},
        {"n": 3, "best_of": 3},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert parse_line(openai(**fields)) == parse_line(openai(**{k: v for k, v in fields.items() if k == "n"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("stream", True),
        ("stream", 0),
        ("stream_options", {"include_usage": True}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "v"}),
        ("prediction", {}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("verbosity", "low"),
        ("echo", True),
        ("suffix", "s"),
        ("best_of", 2),
        ("best_of", True),
        ("guided_json", {}),
        ("structured_outputs", {"json": {}}),
        ("min_tokens", 1),
        ("min_tokens", False),
    ],
)
def test_fields_that_we_do_not_honour_are_refused_by_name(field: str, value: Any) -> None:
    for raw in (native(**{field: value}), openai(**{field: value}), openai("/v1/chat/completions", **{field: value})):
        error = refusal(raw)
        assert (error.code, error.param, error.custom_id) == ("invalid_request", field, "r")
        assert f"`{field}` is not supported" in error.message


def test_unknown_field_names_the_nearest() -> None:
    error = refusal(native(temprature=1))
    assert error.message == "unknown field `temprature`; did you mean `temperature`?"
    assert "did you mean" not in refusal(native(zzzzzzzz=1)).message
    assert len(refusal(native(**{"z" * 10_000: 1})).message) < 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 1.0}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids.1"),
        ({"stop_token_ids": 1}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"logit_bias": {str(k): 1 for k in range(1025)}}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"return_token_ids": "yes"}, "return_token_ids"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"model": 3}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
    ],
)
def test_types_and_ranges_of_completions(fields: dict[str, Any], param: str) -> None:
    for raw in (native(**fields), openai(**fields)):
        error = refusal(raw)
        assert (error.code, error.param) == ("invalid_request", param)
        assert f"`{param.split('.')[0]}" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages.0.contents"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"prompt": "p"}, "prompt"),
    ],
)
def test_types_and_ranges_of_chats(fields: dict[str, Any], param: str) -> None:
    error = refusal(openai("/v1/chat/completions", **fields))
    assert (error.code, error.param) == ("invalid_request", param)


def test_an_image_part_is_refused_by_its_type_and_never_fetched() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    error = refusal(native(prompt=None, messages=[{"role": "user", "content": [part]}]))
    assert "`image_url`" in error.message


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ({"custom_id": None}, "invalid_request", "custom_id"),
        ({"custom_id": ""}, "invalid_request", "custom_id"),
        ({"custom_id": 5}, "invalid_request", "custom_id"),
        ({"custom_id": "x" * 513}, "invalid_request", "custom_id"),
        ({"method": "GET"}, "invalid_request", "method"),
        ({"url": "/v1/embeddings"}, "url_mismatch", "url"),
        ({"url": None}, "url_mismatch", "url"),
        ({"url": ["/v1/completions"]}, "url_mismatch", "url"),
        ({"body": []}, "invalid_request", "body"),
        ({"extra": 1}, "invalid_request", "extra"),
    ],
)
def test_envelope(line: dict[str, Any], code: str, param: str) -> None:
    error = refusal(openai(line=line))
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize("field", ["custom_id", "method", "url", "body"])
def test_missing_envelope_field(field: str) -> None:
    line = orjson.loads(openai())
    del line[field]
    assert (refusal(orjson.dumps(line)).message, refusal(orjson.dumps(line)).param) == (f"`{field}` is missing", field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": None}, "id"),
        ({"id": True}, "id"),
        ({"id": 1.5}, "id"),
        ({"id": ""}, "id"),
        ({"adapter": 3}, "adapter"),
        ({"adapter": "a", "model": "b"}, "adapter"),
        ({"messages": CHAT}, "prompt"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_native_envelope(fields: dict[str, Any], param: str) -> None:
    assert refusal(native(**fields)).param == param


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "not JSON"),
        (b"hello", "not JSON"),
        (b"[1]", "not an object"),
        (b"null", "not an object"),
        (b'{"id":"a","prompt":"p","temperature":NaN}', "NaN"),
        (b'{"id":"a","prompt":"p","temperature":-Infinity}', "Infinity"),
        (b'{"id":"a","prompt":"p","temperature":1e999}', "infinity"),
        (b'{"id":"a","prompt":"\\ud800"}', "lone surrogate"),
        (b'{"id":"a","prompt":"\\udc00x"}', "lone surrogate"),
        (b'{"id":"a","prompt":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"id":"a","prompt":"\xff"}', "not UTF-8 (byte 21)"),
        (b'{"id":"a","prompt":"\x00"}', "not JSON"),
        (b"[" * 100_000, "depth"),
        (b'{"a":' * 100_000, "depth"),
        (b'{"id":"a","prompt":"' + b"x" * MAX_LINE_BYTES + b'"}', "16 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_lines_that_are_not_json_objects(raw: bytes, words: str) -> None:
    error = refusal(raw)
    assert error.code == "invalid_json_line"
    assert words in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("seed", [b"18446744073709551616", b"-9223372036854775809"])
def test_seeds_beyond_64_bits_are_refused_and_not_rounded(seed: bytes) -> None:
    assert refusal(b'{"id":"a","prompt":"p","seed":' + seed + b"}").param == "seed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENVELOPE_FIELDS = ["id", "custom_id", "method", "url", "body", "adapter"]
BODY_FIELDS = ["model", "prompt", "messages", "stop", "n", "seed", "logit_bias", "tools", "best_of", "logprobs"]
FIELDS = st.sampled_from([*ENVELOPE_FIELDS, *BODY_FIELDS])


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_object_is_a_row_or_a_line_error(line: dict[str, Any], body: dict[str, Any]) -> None:
    for candidate in (line, {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}):
        try:
            row = parse_line(json.dumps(candidate).encode())
        except LineError as error:
            assert error.message
        else:
            assert isinstance(row, Row) and row.custom_id and row.prompt


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_line_error(raw: bytes) -> None:
    try:
        parse_line(raw)
    except LineError as error:
        assert error.message


def test_strengths_and_mixes_stand_on_native_lines_and_under_loramill() -> None:
    for fields, scale, mix in (
        ({}, None, ()),
        ({"scale": None, "adapters": None}, None, ()),
        ({"scale": 0.5}, 0.5, ()),
        ({"scale": -10}, -10, ()),
        ({"adapters": [{"name": "a"}, {"name": "b", "scale": 2}]}, None, (("a", 1.0), ("b", 2.0))),
    ):
        row = parse_line(native(**fields))
        assert (row.scale, row.adapters) == (scale, mix)
        assert row == parse_line(openai(loramill=fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scale": 10.5}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"scale": True}, "scale"),
        ({"adapters": []}, "adapters"),
        ({"adapters": "a"}, "adapters"),
        ({"adapters": ["a"]}, "adapters.0"),
        ({"adapters": [{"scale": 1}]}, "adapters.0.name"),
        ({"adapters": [{"name": ""}]}, "adapters.0.name"),
        ({"adapters": [{"name": "a", "scale": -11}]}, "adapters.0.scale"),
        ({"adapters": [{"name": "a", "weight": 1}]}, "adapters.0.weight"),
        ({"adapters": [{"name": f"a{n}"} for n in range(9)]}, "adapters"),
        ({"adapters": [{"name": "a"}], "scale": 1}, "scale"),
    ],
)
def test_strengths_and_mixes_that_cannot_be(fields: dict[str, Any], param: str) -> None:
    assert refusal(native(**fields)).param == param
    error = refusal(openai(loramill=fields))
    assert error.param == f"loramill.{param}"
    assert f"`loramill.{param.split('.')[0]}" in error.message


def test_loramill_is_for_openai_lines_and_holds_nothing_else() -> None:
    assert refusal(native(loramill={"scale": 0.5})).param == "loramill"
    assert parse_line(native(loramill={})) == parse_line(native(loramill=None)) == parse_line(native())
    assert refusal(openai(loramill=3)).param == "loramill"
    assert "did you mean `loramill.scale`" not in refusal(openai(loramill={"scal": 1})).message
    assert refusal(openai(loramill={"scal": 1})).param == "loramill.scal"


def test_route_fields_stand_in_the_line_or_its_metadata() -> None:
    def routes(raw: bytes) -> Any:
        return parse_line(raw, ["task"]).routes

    for raw in (native(task="sum"), openai(task="sum"), openai(metadata={"task": "sum", "other": 1})):
        assert routes(raw) == (("task", "sum"),)
    assert routes(openai(task="sum", metadata={"task": "sum"})) == (("task", "sum"),)
    assert routes(openai(task=None, metadata={"task": None})) == routes(native()) == ()
    for raw, says in ((openai(task="a", metadata={"task": "b"}), "differ"), (native(task=3), "must be a string")):
        with pytest.raises(LineError, match=says) as caught:
            routes(raw)
        assert (caught.value.param, caught.value.custom_id) == ("task", "r")
    assert "unknown field `task`" in refusal(native(task="sum")).message, "only where a route goes by it"
