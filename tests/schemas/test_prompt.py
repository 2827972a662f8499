from __future__ import annotations

import copy
import logging
from typing import Any

import orjson
import pytest

from loramill.schemas.errors import LineError
from loramill.schemas.prompt import Limits, Prompter
from loramill.schemas.request import Row, parse_line

LIMITS = Limits(max_model_len=100, vocab_size=260)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
BOS = 256


def text(prompt: Any) -> Row:
    return parse_line(orjson.dumps({"id": "r", "prompt": prompt}))


def chat(*contents: str) -> Row:
    messages = [{"role": "user", "content": content} for content in contents]
    return parse_line(orjson.dumps({"id": "r", "messages": messages}))


def ids_of(tokenizer: Any, string: str) -> list[int]:
    ids: list[int] = tokenizer(string, add_special_tokens=False)["input_ids"]
    return ids


def encode(prompter: Prompter, row: Row, template: str | None) -> list[int]:
    (ids,) = prompter.encode_rows([row], [template])
    if isinstance(ids, LineError):
        raise ids
    return ids


def refusal(prompter: Prompter, row: Row) -> LineError:
    with pytest.raises(LineError) as caught:
        encode(prompter, row, None)
    assert "\n" not in caught.value.message
    return caught.value


def test_special_tokens_come_from_the_tokenizer_or_the_template_never_from_both(byte_tokenizer: Any) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS, chat_template="<s>" + TEMPLATE)
    assert encode(prompter, text("hé"), None) == [BOS, *ids_of(byte_tokenizer, "hé")]
    assert encode(prompter, chat("a", "b"), None) == [BOS, *ids_of(byte_tokenizer, "[user]a[user]b>")]


def test_a_mixed_batch_keeps_its_places(byte_tokenizer: Any) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS, chat_template=TEMPLATE)
    rows = [chat("a"), text("b"), text([1, 2]), text([1, 260]), chat("c"), text("d")]
    got = prompter.encode_rows(rows, [None] * len(rows))
    assert isinstance(got[3], LineError)
    assert got[:3] + got[4:] == [encode(prompter, row, None) for row in rows[:3] + rows[4:]]
    assert prompter.encode_rows([], []) == []


def test_which_template_serves_a_row(byte_tokenizer: Any) -> None:
    own = copy.copy(byte_tokenizer)
    own.chat_template = "base{{ messages[0].content }}"
    of_adapter = "sql{{ messages[0].content }}"
    for chat_template, expected in ((None, "base?"), ("flag{{ messages[0].content }}", "flag?")):
        prompter = Prompter(own, LIMITS, chat_template=chat_template)
        assert encode(prompter, chat("?"), of_adapter) == ids_of(own, "sql?")
        assert encode(prompter, chat("?"), None) == ids_of(own, expected)
    without = Prompter(byte_tokenizer, LIMITS)
    assert encode(without, chat("?"), of_adapter) == ids_of(own, "sql?")
    error = refusal(without, chat("?"))
    assert (error.code, error.param) == ("invalid_request", "messages")
    assert "--chat-template" in error.message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "undefined|has no element"),
        ("{% for %}", "refuses the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("", "no tokens"),
        ("{{ messages.append(1) }}", "unsafe|refuses"),
    ],
)
def test_a_template_that_fails_fails_its_row(byte_tokenizer: Any, template: str, words: str) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS, chat_template=template)
    error = refusal(prompter, chat("x"))
    assert error.code == "invalid_request"
    with pytest.raises(LineError, match=words):
        raise error


def test_token_ids_must_be_in_the_vocabulary(byte_tokenizer: Any) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS)
    assert encode(prompter, text([0, 259]), None) == [0, 259]
    error = refusal(prompter, text([0, 260]))
    assert (error.param, "260" in error.message) == ("prompt", True)


def test_text_that_cannot_fit_is_not_tokenized(byte_tokenizer: Any) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS)
    longest_token = len("</s>")
    assert len(encode(prompter, text("x" * 100 * longest_token * 4), None)) == 1601
    error = refusal(prompter, text("x" * (100 * longest_token * 4 + 1)))
    assert (error.code, error.param) == ("token_limit_exceeded", "prompt")


def test_long_text_makes_no_noise(byte_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    short = copy.copy(byte_tokenizer)
    short.model_max_length = 4
    short.deprecation_warnings = {}
    log = logging.getLogger("transformers")  # does not hand its records on to the root
    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "transformers"):  # whatever other tests have silenced
            encode(Prompter(short, LIMITS), text("x" * 50), None)
            assert caplog.records == []
            short("x" * 50)
            assert caplog.records, "without the prompter there is noise"
    finally:
        log.removeHandler(caplog.handler)


def test_decode_leaves_special_tokens_out_and_spaces_alone(byte_tokenizer: Any) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS)
    string = " can 't , é\U0001f600 ."
    assert prompter.decode([BOS, *ids_of(byte_tokenizer, string), 257]) == string


def test_pieces_of_a_byte_level_vocabulary(byte_tokenizer: Any) -> None:
    prompter = Prompter(byte_tokenizer, LIMITS)
    space, first, second = ids_of(byte_tokenizer, " é")
    assert prompter.piece(space) == (" ", b" ")
    assert prompter.piece(first) == ("bytes:\\xc3", b"\xc3")
    assert prompter.piece(second) == ("bytes:\\xa9", b"\xa9")
    assert prompter.piece(257) == ("</s>", b"")
    assert prompter.piece(259) == ("<|259|>", b"")
    every = b"".join(prompter.piece(token)[1] for token in range(256))
    assert sorted(every) == list(range(256))


def test_pieces_of_a_sentencepiece_vocabulary() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁": 1, "a": 2, "Ġ": 3, "▁a": 4, "<0xE2>": 5, "é": 6}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=backend), Limits(10, 7))
    assert prompter.piece(4) == (" a", b" a")
    assert prompter.piece(3) == ("Ġ", "Ġ".encode())
    assert prompter.piece(5) == ("bytes:\\xe2", b"\xe2")
    assert prompter.piece(6) == ("é", "é".encode())
